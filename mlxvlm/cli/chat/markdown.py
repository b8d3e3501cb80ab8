"""Markdown on a terminal while it is still being written. Knows blocks, lines and rows, not who writes.

Blocks that are finished are printed for good and scroll away; only the last one is drawn again, in place, as it grows.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, TypeAlias

from markdown_it import MarkdownIt
from rich.markdown import Markdown
from rich.segment import ControlType, Segment, Segments

from mlxvlm.cli.printable import printable

if TYPE_CHECKING:
    from markdown_it.token import Token
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
            self._draw(last_block(self._text))
            now = time.monotonic()
            self._due = now + max(_INTERVAL_S, _SHARE * (now - begun))

    def close(self) -> None:
        """Prints what is not finished as it is."""
        self._draw(len(self._text))

    def _draw(self, end: int) -> None:
        """`end`: of the text that is printed for good."""
        done, self._text = self._text[:end], self._text[end:]
        final, growing = self._lines(done), self._lines(self._text)
        room = max(self._console.height - 3, 2)
        if len(growing) > room:
            growing = [[Segment(_MORE)], *growing[1 - room :]]
        # An empty line before each part but the first.
        if final and self._has_final:
            final.insert(0, [])
        self._has_final |= bool(final)
        if growing and self._has_final:
            growing.insert(0, [])
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

    def _lines(self, text: str) -> list[Line]:
        """Without the empty ones at both ends."""
        if not text.strip():
            return []
        lines = self._console.render_lines(_Text(text), pad=False)
        lines = [_trimmed(line) for line in lines]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
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


def last_block(text: str) -> int:
    """Where the last block begins: what comes next can change no other."""
    tops = [token for token in _PARSER.parse(text) if _is_top(token)]
    if len(tops) < 2 or tops[-1].map is None:
        return 0
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[: tops[-1].map[0]]))


def _is_top(token: Token) -> bool:
    return token.level == 0 and token.nesting >= 0 and token.map is not None


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
