"""The check of sizes, on files of known sizes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "check_budgets.py"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, made to look at an empty project."""
    spec = importlib.util.spec_from_file_location("check_budgets", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module


def function(lines: int, arguments: str = "", head: str = "def") -> str:
    return f"{head} work({arguments}):\n" + "    pass\n" * (lines - 1)


def found(tool: ModuleType, text: str) -> list[str]:
    path = tool.ROOT / "a.py"
    path.write_text(text)
    return list(tool.problems(path, tool.FILE_LINES))


def test_files(tool: ModuleType) -> None:
    assert found(tool, "x = 1\n" * tool.FILE_LINES) == []
    lines = tool.FILE_LINES + 1
    assert found(tool, "x = 1\n" * lines) == [f"a.py: {lines} lines, {tool.FILE_LINES} are allowed"]


@pytest.mark.parametrize("head", ["def", "async def"])
def test_functions(head: str, tool: ModuleType) -> None:
    assert found(tool, function(tool.FUNCTION_LINES, head=head)) == []
    lines = tool.FUNCTION_LINES + 1
    expected = [f"a.py:2: work has {lines} lines, {tool.FUNCTION_LINES} are allowed"]
    assert found(tool, "\n" + function(lines, head=head)) == expected


@pytest.mark.parametrize("arguments", ["{}", "{}, /", "self, {}", "cls, {}", "{}, *rest, **more", "{}, *, named"])
def test_arguments(arguments: str, tool: ModuleType) -> None:
    def names(count: int) -> str:
        return arguments.format(", ".join(f"a{number}" for number in range(count)))

    count = tool.ARGUMENTS + 1
    assert found(tool, function(2, names(tool.ARGUMENTS))) == []
    expected = [f"a.py:1: work has {count} arguments, {tool.ARGUMENTS} are allowed"]
    assert found(tool, function(2, names(count))) == expected


def test_keyword_arguments(tool: ModuleType) -> None:
    def names(count: int) -> str:
        return "first, *, " + ", ".join(f"a{number}" for number in range(count))

    count = tool.KEYWORD_ARGUMENTS + 1
    assert found(tool, function(2, names(tool.KEYWORD_ARGUMENTS))) == []
    expected = [f"a.py:1: work has {count} keyword-only arguments, {tool.KEYWORD_ARGUMENTS} are allowed"]
    assert found(tool, function(2, names(count))) == expected


def test_each_kind_of_file_has_its_limit(tool: ModuleType) -> None:
    family = tool.ROOT / "mlxvlm" / "models" / "idefics3.py"
    assert family in tool.family_files()
    assert tool.file_limit(family, {family}) == tool.FAMILY_FILE_LINES
    assert tool.file_limit(tool.ROOT / "mlxvlm" / "models" / "layers.py", {family}) == tool.FILE_LINES
    assert tool.file_limit(tool.ROOT / "examples" / "ask.py", {family}) == tool.EXAMPLE_LINES


def test_the_whole_project_is_walked(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in tool.FOLDERS:
        (tool.ROOT / folder / "deep").mkdir(parents=True)
        (tool.ROOT / folder / "deep" / "a.py").write_text("x = 1\n")
    assert tool.main() == 0
    assert capsys.readouterr().out == f"{len(tool.FOLDERS)} files are within their budgets\n"
    for folder in tool.FOLDERS:
        (tool.ROOT / folder / "deep" / "a.py").write_text(function(tool.FUNCTION_LINES + 1))
    assert tool.main() == 1
    lines = capsys.readouterr().out.splitlines()
    for folder in tool.FOLDERS:
        assert any(line.startswith(f"{folder}/deep/a.py:1: work") for line in lines)
