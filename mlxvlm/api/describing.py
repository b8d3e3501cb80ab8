"""JSON schemas in a few words, for documents and pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LIMITS = (("minimum", "from {}"), ("exclusiveMinimum", "above {}"), ("maximum", "to {}"))


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
        most = f"at most {_number(schema['maxItems'])} " if "maxItems" in schema else ""
        return f"list of {most}{_plural(type_of(schema['items']))}"
    # Beyond a billion a limit is no one's concern.
    limits = [text.format(_number(schema[key])) for key, text in _LIMITS if key in schema and abs(schema[key]) < 1e9]
    return " ".join([words, *limits])


def _number(value: float) -> str:
    return f"{int(value) if value == int(value) else value:,}"


def _plural(words: str) -> str:
    """Of "string or list of integers" as well: "strings or lists of integers"."""
    kinds = dict.fromkeys(words.split(" or "))
    return " or ".join(each if "`" in each else re.sub(r"^\w+", r"\g<0>s", each) for each in kinds)
