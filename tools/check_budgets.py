"""Checks sizes: lines of a file, lines and arguments of a function. Exits 1 naming each place that is over.

    python tools/check_budgets.py

Raising a number here is a reviewed one-line change.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mlxvlm", "tools", "tests", "examples")
FILE_LINES = 400
FAMILY_FILE_LINES = 550  # a model or processor that families.py names
FUNCTION_LINES = 50
ARGUMENTS = 7
KEYWORD_ARGUMENTS = 16  # that callers can only give by name
EXAMPLE_LINES = 40


def family_files() -> set[Path]:
    sys.path.insert(0, str(ROOT))
    from mlxvlm.families import FAMILIES

    rooms = ((room, name) for family in FAMILIES.values() for room, name in zip(family._fields, family, strict=True))
    return {ROOT / "mlxvlm" / f"{room}s" / f"{name}.py" for room, name in rooms}


def file_limit(path: Path, families: set[Path]) -> int:
    if path.is_relative_to(ROOT / "examples"):
        return EXAMPLE_LINES
    return FAMILY_FILE_LINES if path in families else FILE_LINES


def problems(path: Path, limit: int) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    name = path.relative_to(ROOT)
    if lines > limit:
        yield f"{name}: {lines} lines, {limit} are allowed"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{name}:{node.lineno}: {node.name} has {length} lines, {FUNCTION_LINES} are allowed"
        positional = [*node.args.posonlyargs, *node.args.args]
        counts = {
            "arguments": (len([each for each in positional if each.arg not in ("self", "cls")]), ARGUMENTS),
            "keyword-only arguments": (len(node.args.kwonlyargs), KEYWORD_ARGUMENTS),
        }
        for kind, (count, allowed) in counts.items():
            if count > allowed:
                yield f"{name}:{node.lineno}: {node.name} has {count} {kind}, {allowed} are allowed"


def main() -> int:
    families = family_files()
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    found = [problem for path in files for problem in problems(path, file_limit(path, families))]
    print("\n".join(found) or f"{len(files)} files are within their budgets")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
