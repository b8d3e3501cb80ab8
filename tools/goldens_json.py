"""JSON that is both small and readable in a diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, compact_below: int = 9) -> None:
    path.write_text(dumps(value, 0, compact_below) + "\n", encoding="utf-8")


def dumps(value: Any, depth: int, compact_below: int) -> str:
    """JSON with one line for each entry down to a depth: readable, and small."""
    if not isinstance(value, dict) or depth > compact_below or not value:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    pad = " " * (depth + 1)
    items = [(json.dumps(key), dumps(item, depth + 1, compact_below)) for key, item in value.items()]
    lines = [f"{pad}{key}: {item}" for key, item in items]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
