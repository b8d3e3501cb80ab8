"""Who may import whom: the table of docs/architecture.md, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlxvlm"
NEVER = {"torch", "torchvision", "transformers"}
RUNTIME = {"numpy", "PIL", "tokenizers", "jinja2", "httpx2", "pi_heif", "tqdm", "huggingface_hub", "safetensors"}

# room -> what it may import of ours, and whether MLX is among its means
WALLS: dict[str, tuple[set[str], bool]] = {
    "messages": (set(), False),
    "errors": (set(), False),
    "families": ({"errors"}, False),
    "processors": ({"processors", "messages", "errors"}, False),
    "models": ({"models", "processors.base", "errors"}, True),
    "checkpoint": ({"checkpoint", "models.base", "families", "processors.base", "processors.files", "errors"}, True),
    "engine": ({"engine", "models.base", "processors.base", "messages", "errors"}, True),
    "runner": ({"checkpoint.load", "engine", "messages", "errors"}, False),
    "cli": ({"", "cli", "runner", "checkpoint.load", "checkpoint.estimate", "engine", "messages", "errors"}, False),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Dotted names, those inside functions and for type checkers included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            # `from mlxvlm.cli import run` names a module, `from mlxvlm.errors import X` does not.
            base = str(node.module)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = (PACKAGE.parent / full.replace(".", "/")).with_suffix(".py").is_file()
                names.append(full if is_module else base)
    return names


def allows(allowed: set[str], module: str) -> bool:
    return any(module == name or (name and module.startswith(f"{name}.")) for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_inside_the_walls(path: Path) -> None:
    room = room_of(path)
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top not in NEVER, f"{path.name} imports {name}"
        if room in ("__init__", "__main__"):
            continue
        allowed, may_use_mlx = WALLS[room]
        if top == "mlxvlm":
            module = name.removeprefix("mlxvlm").removeprefix(".")
            assert allows(allowed, module), f"{room} may not import {name}"
        if top in ("mlx", "mlx_lm"):
            assert may_use_mlx, f"{room} may not import {name}"
        if room in ("messages", "errors"):
            assert top == "mlxvlm" or top not in RUNTIME, f"{room} imports {name}"


def test_only_the_table_and_its_files_name_a_family() -> None:
    from mlxvlm.families import FAMILIES

    words = {name for row in FAMILIES.items() for name in (row[0], *row[1])}
    own = {f"{room}/{word}.py" for room in ("processors", "models") for word in words} | {"families.py"}
    for path in FILES:
        if str(path.relative_to(PACKAGE)) in own:
            continue
        text = ast.unparse(ast.parse(path.read_text()))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in words:
                raise AssertionError(f"{path} names the family {node.value!r}")
            if isinstance(node, (ast.Name, ast.Attribute)):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert name.lower() not in words, f"{path} names the family {name}"


def test_every_room_has_a_wall() -> None:
    assert {room_of(path) for path in FILES} - {"__init__", "__main__"} == set(WALLS)
