"""Writes the tables of docs/server.md from the models that validate requests. --check: exits 1 if they are out of date.

python tools/server_fields.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "server.md"
_LIMITS = (("minimum", "from {}"), ("exclusiveMinimum", "above {}"), ("maximum", "to {}"), ("maxItems", "at most {}"))


def type_of(schema: Mapping[str, Any]) -> str:
    """A schema in a few words; null is possible everywhere and not told."""
    if "$ref" in schema:
        return "object"
    if "const" in schema:
        return f"`{str(schema['const']).lower()}`"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = [type_of(each) for each in schema[key] if each.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    words = str(schema.get("type", "anything"))
    if words == "array":
        words = f"list of {_plural(type_of(schema['items']))}"
    # Beyond a billion a limit is no one's concern.
    limits = [text.format(_number(schema[key])) for key, text in _LIMITS if key in schema and abs(schema[key]) < 1e9]
    return " ".join([words, *limits])


def _number(value: float) -> str:
    return f"{int(value) if value == int(value) else value:,}"


def _plural(word: str) -> str:
    """Of "string or object" as well."""
    return " or ".join(each if "`" in each else f"{each}s" for each in dict.fromkeys(word.split(" or ")))


def fields() -> str:
    from mlxvlm.api.schema import ChatCompletionRequest

    schema = ChatCompletionRequest.model_json_schema()
    names = sorted(schema["properties"], key=lambda name: (name not in ("messages", "model"), name))
    rows = [(name, schema["properties"][name]) for name in names]
    told = [(name, each) for name, each in rows if not str(each.get("description")).startswith("Ignored")]
    lines = [f"| `{name}` | {type_of(each)} | {each.get('description', '')} |" for name, each in told]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *lines])


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


def filled(text: str) -> str:
    """The document with each table between its two marks anew."""
    for name, make in (("fields", fields), ("ignored", ignored), ("refused", refused)):
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
