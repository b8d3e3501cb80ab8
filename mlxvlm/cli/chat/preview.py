"""A picture on a terminal that can show one, through textual-image (optional). Knows what it offers, no protocol."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mlxvlm.cli.chat.session import Picture

_MAX_COLUMNS, _MAX_ROWS = 40, 12
_MAX_PIXELS = 1024  # a side: a preview needs no more, and sixels are text
# Only these are asked what they can: others, like macOS's Terminal, print the question. tmux passes none on.
_TERMINALS = ("kitty", "iterm", "wezterm", "ghostty", "konsole", "foot", "mlterm", "contour")
_NAMES = ("TERM", "TERM_PROGRAM", "LC_TERMINAL")


def show(console: Console, picture: Picture) -> None:
    """Draws it small if that is possible, and names it with its size."""
    kind = _renderable() if console.is_terminal and is_promising() else None
    if kind is not None:
        thumbnail = picture.image.copy()
        thumbnail.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
        columns = min(_MAX_COLUMNS, console.width - 1, 2 * _MAX_ROWS * thumbnail.width // thumbnail.height)
        console.print(kind(thumbnail, width=max(columns, 1), height="auto"))
    console.print(str(picture), style="dim")


def is_promising() -> bool:
    """Whether this terminal is of a kind that shows pictures."""
    words = " ".join(os.environ.get(name, "") for name in _NAMES).lower()
    return "tmux" not in words and any(name in words for name in _TERMINALS)


@cache
def _renderable() -> Any:
    """The way this terminal shows pictures (sixel: iTerm2, WezTerm, foot; Kitty's protocol), or None.

    Importing the library asks the terminal, for a tenth of a second at most.
    """
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    try:
        from textual_image.renderable import Image, SixelImage, TGPImage
    except ImportError:
        return None
    return Image if Image in (SixelImage, TGPImage) else None  # half blocks show little
