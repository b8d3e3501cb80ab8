"""Writes the tables of docs/server.md from the models that validate requests. --check: exits 1 if they are out of date.

python tools/server_fields.py [--check]
"""

from __future__ import annotations

import sys
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


def completion_fields() -> str:
    """Those that a chat does not have, or has otherwise."""
    from mlxvlm.api.completions import CompletionRequest
    from mlxvlm.api.sampling import SamplingFields

    own = create_model(
        "Own",
        **{
            name: (each.annotation, each)
            for name, each in CompletionRequest.model_fields.items()
            if name not in SamplingFields.model_fields
        },
    )
    return table(own, "prompt", "model")


def endpoints() -> str:
    from mlxvlm.server.openapi import OPERATIONS

    lines = [f"| `{each.method.upper()} {each.path}` | {each.summary} |" for each in OPERATIONS]
    return "\n".join(["| endpoint | |", "|---|---|", *lines])


def ignored() -> str:
    from mlxvlm.api.schema import IGNORED_FIELDS

    return "\n".join(
        ["| field | why |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in IGNORED_FIELDS.items())]
    )


def refused() -> str:
    from mlxvlm.api.base import REFUSED_FIELDS

    return "\n".join(
        ["| field | remedy |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in REFUSED_FIELDS.items())]
    )


TABLES = {
    "endpoints": endpoints,
    "fields": fields,
    "completion fields": completion_fields,
    "ignored": ignored,
    "refused": refused,
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
