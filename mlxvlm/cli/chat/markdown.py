"""Markdown on a terminal while it is still being written. Knows blocks, lines and rows, not who writes.

Blocks that are finished are printed for good and scroll away; only the last one is drawn again, in place, as it grows.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from markdown_it import MarkdownIt
from rich.markdown import Markdown
from rich.segment import ControlType, Segment, Segments

from mlxvlm.cli.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

Line: TypeAlias = list[Segment]

_INTERVAL_S = 1 / 20  # between two drawings
_SHARE = 5  # drawing takes a fifth of the time at most, however long a block is
_CODE_THEME = "ansi_dark"  # the terminal's own colours, on its own background
_MORE = "..."
# HTML is shown as text, not dropped; a picture's address is shown, as a link's is.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("image")


class MarkdownView:
    """Feed it text, then close it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""  # of the last block, and what follows
        self._widths: list[int] = []  # in cells, of the lines that are drawn again
        self._has_final = False
        self._due = 0.0

    def feed(self, text: str) -> None:
        """Adds text; it is seen at once, or with what comes next."""
        self._text += printable(text)
        begun = time.monotonic()
        if begun >= self._due:
            # What a line is shows at its end: "#" may become a heading, or a word of the paragraph before it.
            *finished, _ = blocks(self._text[: self._text.rfind("\n") + 1]) or [""]
            self._draw(finished)
            now = time.monotonic()
            self._due = now + max(_INTERVAL_S, _SHARE * (now - begun))

    def close(self) -> None:
        """Prints what is not finished as it is."""
        self._draw(blocks(self._text))

    def _draw(self, finished: list[str]) -> None:
        """`finished`: blocks that the text begins with, to be printed for good."""
        self._text = self._text[sum(map(len, finished)) :]
        final = self._lines(finished)
        growing = self._lines(blocks(self._text))
        if not self._has_final and (final or growing):
            (final or growing).pop(0)
        self._has_final |= bool(final)
        room = max(self._console.height - 3, 2)
        if len(growing) > room:
            growing = [[Segment(_MORE)], *growing[1 - room :]]
        self._write(self._rows(), [*final, *growing])
        self._widths = [Segment.get_line_length(line) for line in growing]

    def _rows(self) -> int:
        """How many rows the growing block takes now: a terminal that was made narrower has broken its lines."""
        return sum(max(1, math.ceil(width / self._console.width)) for width in self._widths)

    def _write(self, rows_up: int, lines: list[Line]) -> None:
        """Over what is there, line by line and in one piece: nothing is ever blank in between."""
        up = f"\x1b[{min(rows_up, self._console.height - 1)}A" if rows_up else ""
        segments = [_control(f"\r{up}")]
        for line in lines:
            segments += [*line, _control("\x1b[K"), Segment.line()]
        segments.append(_control("\x1b[J"))
        self._console.print(Segments(segments), end="", crop=False)
        self._console.file.flush()

    def _lines(self, parts: list[str]) -> list[Line]:
        """Each block's behind an empty one."""
        lines: list[Line] = []
        for part in parts:
            drawn = [_trimmed(line) for line in self._console.render_lines(_Text(part), pad=False)]
            places = [place for place, line in enumerate(drawn) if line]
            if places:
                lines += [[], *drawn[places[0] : places[-1] + 1]]
        return lines


class _Text(Markdown):
    """rich's, but for HTML, line breaks and links, which are the writer's to give and the reader's to see."""

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme=_CODE_THEME, hyperlinks=False)
        self.markup = text
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def blocks(text: str) -> list[str]:
    """The text in pieces: paragraphs, lists, tables ... What follows whole lines can change no block but the last."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.nesting >= 0 and token.map]
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    bounds = [0, *starts[1:], len(lines)]
    return ["".join(lines[begin:end]) for begin, end in pairwise(bounds)] if text else []


def _control(codes: str) -> Segment:
    return Segment(codes, None, [(ControlType.CLEAR,)])


def _trimmed(line: Line) -> Line:
    """Without the spaces at its end, which a narrower terminal would break into rows of their own."""
    line = list(line)
    while line and not line[-1].text.strip() and not _is_coloured(line[-1]):
        line.pop()
    if line and not _is_coloured(line[-1]):
        line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
    return line


def _is_coloured(segment: Segment) -> bool:
    background = segment.style.bgcolor if segment.style else None
    return background is not None and not background.is_default
