"""The examples run as they stand, with the demo model, and say what their picture shows."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlxvlm
from mlxvlm.cli import main, parser
from tests.serve_demo import demo_server

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURE = EXAMPLES / "pictures" / "pink-heart.png"
# Those that are not only asked what they see are tested below.
OTHERS = {"python/menu_bar.py", "python/caption_folder.py", "http/web_search.py", "http/tools.py"}
SCRIPTS = sorted({str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")} - OTHERS)
SHOWN = "red heart and a black square"
SAYS = {
    "ask.py": "heart",
    "stream_async.py": "three shapes",
    "python/structured.py": "heart is red",
    "http/structured.py": "heart is red",
    "runner/tools.py": "weather({",
    "runner/web_search.py": "\n",
}


FAMILIES = {"llama4", "llama_vision", "qwen2_vl", "idefics3", "smolvlm", "llava"}
CHATS = {
    "llama4": [
        "An orange heart, a red star and a black triangle on a white background.",
        "There are three shapes.",
        "The red star is in the center.",
    ],
    "llama_vision": ["A pink heart on a gray background.", "The heart is pink.", "A green star."],
    "qwen2_vl": ["The second picture.", "A pink heart."],
    "idefics3": [
        "A red heart and a black square on a white background.",
        "The square is black.",
        "The background is light blue.",
    ],
    "smolvlm": [
        '[{"shape": "square", "color": "pink"}, {"shape": "star", "color": "blue"}]',
        "The star is on the right.",
        "No.",
    ],
    "llava": ["A red heart and a black square on a white background.", "The heart is red."],
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with demo_server() as url:
        yield f"{url}/v1/"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *argv: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *argv])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    argv = ["--url", request.getfixturevalue("server")] if name.startswith("http/") else []
    run(monkeypatch, name, *argv)
    shown, errors = capsys.readouterr()
    assert SAYS.get(name, SHOWN) in shown
    assert errors == ""


@pytest.mark.parametrize("door", ["python", "runner", "http", "chat"])
def test_each_door_has_each_family(door: str) -> None:
    assert {path.stem for path in (EXAMPLES / door).iterdir()} >= FAMILIES


@pytest.mark.parametrize("name", sorted(CHATS))
def test_chat(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    with (EXAMPLES / "chat" / f"{name}.txt").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert main(["chat", "-m", "demo"]) == 0
    assert capsys.readouterr().out.splitlines() == CHATS[name]


def test_the_chats_models_are_named() -> None:
    table = (EXAMPLES / "README.md").read_text()
    for path in (EXAMPLES / "chat").iterdir():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{path.name}`"))
        command = row.split("`")[-2].split()
        assert (command[0], parser().parse_args(command[1:]).isq) == ("mlxvlm", "4" if "--isq" in row else None)


def test_an_example_from_a_shell() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "ask.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "red star" in done.stdout


def test_captions_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "captions.jsonl"
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURE.read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    argv = (str(folder), "--output", str(output))
    run(monkeypatch, "python/caption_folder.py", *argv)
    [line] = output.read_text().splitlines()
    assert json.loads(line) == {"file": str(folder / "a.png"), "caption": "A pink heart on a gray background."}
    shown, _ = capsys.readouterr()
    assert "broken.png: " in shown
    (folder / "b.PNG").write_bytes(PICTURE.read_bytes())
    run(monkeypatch, "python/caption_folder.py", *argv)
    assert [Path(json.loads(line)["file"]).name for line in output.read_text().splitlines()] == ["a.png", "b.PNG"]
    assert "3 pictures, 2 of them now" in capsys.readouterr().out


def test_tools_over_http(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "http/tools.py", "--url", server)
    assert "weather(" in capsys.readouterr().out


def test_a_server_without_web_search_says_so(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="--enable-search"):
        run(monkeypatch, "http/web_search.py", "--url", server)


def test_the_menu_bars_engine() -> None:
    names = runpy.run_path(str(EXAMPLES / "python" / "menu_bar.py"), run_name="menu_bar")
    texts: list[str] = []
    describer = names["Describer"]("demo", texts.append)
    try:
        describer.describe(PICTURE).join(60)
        assert texts[-1] == " A pink heart on a gray background."
        assert len(texts) > 3
        describer.describe("/no/such.png").join(60)
        assert "/no/such.png" in texts[-1]
    finally:
        describer.engine.close()
    assert isinstance(describer.engine, mlxvlm.Engine)
