"""Writes the tables of docs/server.md from the models that validate requests. --check: exits 1 if they are out of date.

python tools/server_fields.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, create_model

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "server.md"


def table(body: type[BaseModel], *first: str) -> str:
    """The fields of a request's body; `first` come first, the others by name."""
    from mlxvlm.api.describing import type_of

    schema = body.model_json_schema()
    names = sorted(schema["properties"], key=lambda name: (name not in first, name))
    rows = [(name, schema["properties"][name]) for name in names]
    told = [(name, each) for name, each in rows if not str(each.get("description")).startswith("Ignored")]
    lines = [f"| `{name}` | {type_of(each)} | {each.get('description', '')} |" for name, each in told]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *lines])


def fields() -> str:
    from mlxvlm.api.schema import ChatCompletionRequest

    return table(ChatCompletionRequest, "messages", "model")


def own_fields(body: type[BaseModel], *first: str) -> str:
    """Those that not all endpoints have."""
    from mlxvlm.api.sampling import SamplingFields

    own = {
        name: (each.annotation, each)
        for name, each in body.model_fields.items()
        if name not in SamplingFields.model_fields
    }
    return table(create_model("Own", **own), *first)


def completion_fields() -> str:
    from mlxvlm.api.completions import CompletionRequest

    return own_fields(CompletionRequest, "prompt", "model")


def response_fields() -> str:
    from mlxvlm.api.responses.request import ResponsesRequest

    return own_fields(ResponsesRequest, "input", "model")


def message_fields() -> str:
    from mlxvlm.api.anthropic.request import MessagesRequest

    return own_fields(MessagesRequest, "messages", "model", "max_tokens")


def endpoints() -> str:
    from mlxvlm.server.openapi import OPERATIONS

    lines = [f"| `{each.method.upper()} {each.path}` | {each.summary} |" for each in OPERATIONS]
    return "\n".join(["| endpoint | |", "|---|---|", *lines])


def reasons(fields: Mapping[str, str], head: str) -> str:
    lines = [f"| `{name}` | {why} |" for name, why in fields.items()]
    return "\n".join([f"| field | {head} |", "|---|---|", *lines])


def ignored() -> str:
    from mlxvlm.api.schema import IGNORED_FIELDS

    return reasons(IGNORED_FIELDS, "why")


def response_ignored() -> str:
    from mlxvlm.api.responses.request import IGNORED_FIELDS

    return reasons(IGNORED_FIELDS, "why")


def message_ignored() -> str:
    from mlxvlm.api.anthropic.request import IGNORED_FIELDS

    return reasons(IGNORED_FIELDS, "why")


def refused() -> str:
    from mlxvlm.api.base import REFUSED_FIELDS

    return reasons(REFUSED_FIELDS, "remedy")


TABLES = {
    "endpoints": endpoints,
    "fields": fields,
    "completion fields": completion_fields,
    "ignored": ignored,
    "refused": refused,
    "response fields": response_fields,
    "response ignored": response_ignored,
    "message fields": message_fields,
    "message ignored": message_ignored,
}


def filled(text: str) -> str:
    """The document with each table between its two marks anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        first, last = text.index(begin) + len(begin), text.index(end)
        text = f"{text[:first]}{make()}\n{text[last:]}"
    return text


def main() -> int:
    sys.path.insert(0, str(ROOT))
    old = DOCUMENT.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv[1:]:
        print("up to date" if new == old else "out of date: run python tools/server_fields.py")
        return int(new != old)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
