"""Who may import whom: the table of docs/architecture.md, read off the source."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlxvlm"

# room -> what it may import of ours, and of others beside the standard library
WALLS: dict[str, tuple[set[str], set[str]]] = {
    "messages": (set(), set()),
    "errors": (set(), set()),
    "families": ({"errors"}, set()),
    "processors": (
        {"processors", "messages", "errors"},
        {"numpy", "PIL", "tokenizers", "jinja2", "httpx2", "pi_heif"},
    ),
    "models": ({"models", "processors.base", "errors"}, {"mlx", "numpy"}),
    "checkpoint": (
        {
            *("checkpoint", "models.base", "models.repacked", "models.shares", "families", "errors"),
            *("processors.base", "processors.files", "processors.tokenizer", "processors.ggml_tokenizer"),
        },
        {"mlx", "numpy", "safetensors", "yaml", "huggingface_hub", "httpx2"},
    ),
    "engine": ({"engine", "models.base", "processors.base", "messages", "errors"}, {"mlx", "numpy", "llguidance"}),
    "agent": (
        {"agent", "engine.params", "engine.request", "processors.chat_template", "processors.tokenizer"}
        | {"processors.base", "messages", "errors"},
        {"ddgs", "httpx2", "mcp"},
    ),
    "api": (
        {"api", "agent", "engine.params", "engine.request", "processors.base", "messages", "errors"},
        {"pydantic", "pydantic_core"},
    ),
    "mistralrs": (
        {
            *("mistralrs", "runner", "engine", "checkpoint.load", "checkpoint.build", "checkpoint.hub"),
            *("api", "agent", "processors.base", "messages", "errors"),
        },
        {"pydantic"},
    ),
    "ranks": (
        {"", "ranks", "engine", "models.base", "models.shares", "processors.base", "errors"},
        {"mlx", "numpy"},
    ),
    "runner": ({"checkpoint.load", "engine", "ranks.place", "ranks.roles", "messages", "errors"}, set()),
    "server": (
        {
            *("", "server", "runner", "engine", "checkpoint.load", "checkpoint.build", "checkpoint.estimate"),
            "ranks.place",
            *("processors.sources", "processors.base", "api", "agent", "messages", "errors"),
        },
        {"starlette", "uvicorn", "h11", "httpx2", "prometheus_client", "pydantic"},
    ),
    "cli": (
        {
            "",
            "cli",
            "server",
            "agent",
            "runner",
            "checkpoint.load",
            "checkpoint.build",
            "checkpoint.estimate",
            "checkpoint.quantize",
            "engine",
            "messages",
            "errors",
            # Pictures are decoded when they are attached, and shown; none is larger than the limits.
            "processors.images",
            "processors.sources",
            "checkpoint.inventory",
            "ranks.place",
            "ranks.launch",
            # What its users' commands say.
            "mistralrs.architectures",
        },
        {"tqdm", "prompt_toolkit", "rich", "markdown_it", "PIL", "textual_image"},
    ),
    "__init__": ({"engine", "runner", "mistralrs", "messages", "errors"}, set()),
    "__main__": ({"cli"}, set()),
}
DOORS = {"__init__", "__main__"}
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
    ours, others = WALLS[room_of(path)]
    for name in imports_of(path):
        top = name.split(".")[0]
        if top == "mlxvlm":
            module = name.removeprefix("mlxvlm").removeprefix(".")
            assert allows(ours, module), f"{room_of(path)} may not import {name}"
        else:
            assert top in others or top in sys.stdlib_module_names, f"{room_of(path)} may not import {name}"


def test_the_documents_know_every_room_and_file_they_name() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| ([a-z, ]+) \|", text, re.MULTILINE)
    told = {name for row in rows for name in row.split(", ")} - {"room"}
    assert told == {name for name in WALLS if not name.startswith("__")} == {room_of(path) for path in FILES} - DOORS
    tree = (PACKAGE.parent / "README.md").read_text()
    for name in told:
        assert re.search(rf"^ +{name}(/|\.py) ", tree, re.MULTILINE), f"README.md's tree lacks {name}"
    for document in sorted((PACKAGE.parent / "docs").glob("*.md")):
        for name in re.findall(r"(?<!/)\b[a-z_]+/(?:[a-z_]+/)*[a-z_]+\.py\b", document.read_text()):
            assert (PACKAGE / name).is_file() or (PACKAGE.parent / name).is_file(), f"{document.name}: {name}"


def test_only_the_table_and_its_files_name_a_family() -> None:
    from mlxvlm.families import FAMILIES

    words = {name for row in FAMILIES.items() for name in (row[0], *row[1])}
    own = {f"{room}/{word}.py" for room in ("processors", "models") for word in words} | {"families.py"}
    # A text part alone is a family too; llama.cpp's architectures, projectors and tokenizers bear families' names.
    own |= {"models/decoder.py", "processors/ggml_tokenizer.py", "processors/files.py"}
    own |= {"mistralrs/architectures.py"}  # the other runtime's names of them
    own |= {f"checkpoint/llama_cpp/{name}.py" for name in ("text", "vision", "names")}
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
    assert {room_of(path) for path in FILES} == set(WALLS)
