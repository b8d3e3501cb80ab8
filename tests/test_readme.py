"""The README's first block is what a new user pastes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent


def first_block() -> list[str]:
    block = re.search(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    return [line for line in block[1].splitlines() if line and not line.startswith("#")]


def test_two_commands_of_one_line() -> None:
    assert len(first_block()) == 2


def test_ci_runs_the_readmes_test_command() -> None:
    command = first_block()[1]
    assert "pytest" in command
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_demo_command_asks_about_a_picture_that_ships() -> None:
    words = shlex.split(first_block()[0].split("&&")[-1])
    assert words[:4] == [".venv/bin/mlxvlm", "run", "-m", "demo"]
    assert (ROOT / words[words.index("--image") + 1]).is_file()


def test_files_named_in_the_docs_exist() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text()
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
        for link in links:
            assert (document.parent / link).exists(), f"{document.name}: {link}"
