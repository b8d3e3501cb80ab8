"""The chat of a script, and the small parts of the other one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console

from mlxvlm.cli.chat import preview
from mlxvlm.cli.chat.completion import ChatCompleter
from mlxvlm.cli.chat.session import Picture
from mlxvlm.cli.chat.terminal import open_history

ROOT = Path(__file__).parents[3]
HEART = "examples/pictures/pink-heart.png"


def piped(lines: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxvlm", "chat", "-m", "demo", *flags]
    return subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_line_is_a_message_and_only_answers_go_to_stdout() -> None:
    done = piped(f"\\image {HEART} What do you see?\n\\stats\nWhat color is the heart?")
    assert done.returncode == 0
    assert done.stdout == "A pink heart on a gray background.\nThe heart is pink.\n"
    assert "1, 1 encoded so far" in done.stderr


def test_what_fails_is_told_and_the_chat_goes_on() -> None:
    done = piped("\\image nowhere.png What?\n\\dance\nHello!\n\\exit\nHello!\n", "--system", "Be brief.")
    assert done.returncode == 3  # of the first line that failed
    assert len(done.stdout.splitlines()) == 1
    errors = done.stderr.splitlines()
    assert [line.startswith("mlxvlm: error: ") for line in errors] == [True, True]


def test_flags_attach_pictures_and_are_checked_first() -> None:
    assert piped("What do you see?\n", "--image", HEART).stdout == "A pink heart on a gray background.\n"
    for flags, code in ((["--image", "nowhere.png"], 3), (["--top-p", "2"], 2), (["-m", "./nowhere"], 4)):
        done = piped("Hello!\n", *flags)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)


def test_bytes_that_are_no_text() -> None:
    command = f"printf 'Hello!\\n\\377\\n' | PYTHONUTF8=1 {sys.executable} -m mlxvlm chat -m demo"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 3)
    assert "Traceback" not in done.stderr


def completed(text: str) -> list[str]:
    return [text + each.text for each in ChatCompleter().get_completions(Document(text), CompleteEvent())]


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "it's a.png").touch()
    found = [each.text for each in ChatCompleter().get_completions(Document("/te"), CompleteEvent())]
    assert found == ["temperature"]
    assert completed(r"\image my") == ["\\image my\\ pictures/"]
    assert completed("/image 'my") == ["/image 'my pictures/"]
    assert completed(r"\image my\ pictures/it") == [r"\image my\ pictures/it\'s\ a.png"]
    assert completed(r"\image x.png my") == ["\\image x.png my\\ pictures/"]
    assert completed("what is my") == completed(r"\seed m") == completed(r"\imagine m") == []


def test_history_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    history = open_history()
    for line in ("one\ntwo", "x" * 200_000, "three"):
        history.store_string(line)
    assert list(open_history().load_history_strings()) == ["three", "one\ntwo"]
    (path,) = (path for path in tmp_path.rglob("chat_history"))
    assert path.stat().st_mode & 0o077 == 0
    path.unlink()
    path.mkdir()  # can't be written
    assert type(open_history()) is InMemoryHistory
    history.store_string("the disk is full")


class Drawn:
    """In place of textual-image's classes."""

    def __init__(self, image: Image.Image, width: int, height: str) -> None:
        self.text = f"drawn {image.width} {width} {height}"

    def __rich__(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("variables", "is_able", "is_drawn"),
    [
        ({"TERM": "xterm-kitty"}, True, True),
        ({"TERM_PROGRAM": "iTerm.app"}, True, True),
        ({"LC_TERMINAL": "iTerm2"}, False, False),
        ({"TERM": "tmux-256color", "LC_TERMINAL": "iTerm2"}, True, False),
        ({"TERM_PROGRAM": "Apple_Terminal"}, True, False),
    ],
)
def test_previews(variables: dict[str, str], is_able: bool, is_drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.setenv(name, variables.get(name, ""))
    library: Any = ModuleType("textual_image.renderable")
    library.Image = library.SixelImage = Drawn
    library.TGPImage = object
    if not is_able:
        library.Image = str
    monkeypatch.setitem(sys.modules, "textual_image", ModuleType("textual_image"))
    monkeypatch.setitem(sys.modules, "textual_image.renderable", library)
    preview._renderable.cache_clear()
    console = Console(force_terminal=True, width=80, record=True)
    preview.show(console, Picture("/x/wide.png", Image.new("RGB", (3000, 100))))
    assert ("drawn 1024 40 auto" in console.export_text(clear=False)) is is_drawn
    assert "wide.png (3000 x 100)" in console.export_text()
    preview._renderable.cache_clear()


def test_without_the_library_a_picture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.setitem(sys.modules, "textual_image.renderable", None)
    preview._renderable.cache_clear()
    console = Console(force_terminal=True, width=80, record=True)
    preview.show(console, Picture("https://x/y\x1b[2J.png", Image.new("RGB", (3, 1))))
    assert console.export_text().strip() == "y␛[2J.png (3 x 1)"
    preview._renderable.cache_clear()
