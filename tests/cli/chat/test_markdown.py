"""Markdown that streams: whatever the pieces, the screen ends up the same, and obeys nobody but us."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pyte
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlxvlm.cli.chat.markdown import MarkdownView, blocks
from mlxvlm.cli.printable import printable

TEXT = """# Title

Some **bold** and a [link](http://example.org/x), ![beacon](http://example.org/y).
The second line.

<script>alert(1)</script>

- one
- two
  1. nested

| a | b |
|---|---|
| 1 | 2 |

> quoted

```python
def f(x):

    return x
```

The end."""
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # each example draws many screens
OURS = re.compile(r"\x1b\[[0-9;]*[mAKJ]")


class Window:
    """A console, and the screen that it draws."""

    def __init__(self, columns: int = 60, lines: int = 24) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, force_terminal=True, width=columns, height=lines, color_system="256", legacy_windows=False
        )
        self.screen = pyte.HistoryScreen(columns, lines, history=5000)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)

    def draw(self) -> str:
        """What is seen, with what has scrolled away."""
        self._stream.feed(self.file.getvalue())
        self.file.seek(0)
        self.file.truncate()
        past = ["".join(line[column].data for column in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*past, *self.screen.display]).rstrip()


def streamed(pieces: list[str], columns: int = 60, lines: int = 24) -> str:
    window = Window(columns, lines)
    view = MarkdownView(window.console)
    for piece in pieces:
        view._due = 0.0  # each piece is drawn
        view.feed(piece)
    view.close()
    return window.draw()


def cut(text: str, places: list[int]) -> list[str]:
    marks = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in pairwise(marks)]


@settings(max_examples=20, deadline=None, phases=NO_SHRINKING)
@given(st.lists(st.integers(0, 1000), max_size=12), st.sampled_from([(60, 24), (30, 40), (60, 6), (20, 5)]))
def test_whatever_the_pieces_the_end_is_the_same(places: list[int], size: tuple[int, int]) -> None:
    assert streamed(cut(TEXT, places), *size) == streamed([TEXT], *size)


@pytest.mark.parametrize("text", ["a\n#1 b\n\nc", "a\n-b\n\n* c\n*d*", "a\n1.5 b\n```c"])
def test_a_line_is_judged_when_it_is_whole(text: str) -> None:
    assert streamed(list(text)) == streamed([text])


def test_what_it_looks_like() -> None:
    shown = streamed([TEXT])
    assert shown.splitlines()[0].strip() == "Title"
    assert "Some bold and a link (http://example.org/x)" in shown
    assert "http://example.org/y" in shown  # nothing is hidden
    assert "\nThe second line." in shown  # the writer's line break
    assert "<script>alert(1)</script>" in shown
    assert "    return x" in shown
    assert "\n\n\n" not in shown


def test_a_long_answer_scrolls_and_keeps_every_line() -> None:
    text = "```\n" + "\n".join(f"line {number}" for number in range(200)) + "\n```\nDone."
    shown = streamed([text[place : place + 50] for place in range(0, len(text), 50)], 60, 10)
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    assert lines == [*(f"line {number}" for number in range(200)), "Done."]


def test_while_a_block_is_longer_than_the_window_its_end_is_seen() -> None:
    window = Window(60, 10)
    view = MarkdownView(window.console)
    view.feed("```\n" + "\n".join(f"line {number}" for number in range(50)))
    shown = window.draw().splitlines()
    assert len(shown) < 10
    assert shown[0] == "..."
    assert shown[-1].strip() == "line 49"


def test_a_narrower_window_is_counted_in_its_rows() -> None:
    """Terminals break the lines that are there; the next drawing goes over all of their rows."""
    window = Window(40, 24)
    view = MarkdownView(window.console)
    view.feed("x" * 35)
    window.draw()
    window.console.width = 20
    view._due = 0.0
    view.feed("y")
    assert "\x1b[2A" in window.file.getvalue()


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_text_can_not_drive_the_terminal(pieces: list[str]) -> None:
    window = Window()
    view = MarkdownView(window.console)
    for piece in [*pieces, "\x1b]0;title\x07\x1b[2J\x9b31m\x1bc\r", "[x](http://a/\x1b]8;;b)", "\n```\n\x1b[5A"]:
        view._due = 0.0
        view.feed(piece)
    view.close()
    left = OURS.sub("", window.file.getvalue())
    assert not [char for char in left if not char.isprintable() and printable(char) != char and char != "\r"]
    assert left.count("\r") == window.file.getvalue().count("\x1b[J")  # one a drawing, and none of the text's


@pytest.mark.parametrize("text", ["a\x1b[31mb", "\x00\x7f\x9b", "\r"])
def test_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert printable("a\n\tü猫") == "a\n\tü猫"


@given(st.text(st.sampled_from("a \n#-|`>*1."), max_size=60), st.text(st.sampled_from("a \n#-|`>*1."), max_size=30))
@settings(max_examples=300, deadline=None)
def test_finished_blocks_are_not_changed_by_what_follows(text: str, more: str) -> None:
    lines = text[: text.rfind("\n") + 1]
    assert "".join(blocks(lines)) == lines
    *finished, _ = blocks(lines) or [""]
    assert blocks(text + more)[: len(finished)] == finished
