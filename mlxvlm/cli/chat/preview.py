"""A picture on a terminal that can show one, through textual-image (optional). Knows what it offers, no protocol."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mlxvlm.cli.chat.session import Picture

_MAX_COLUMNS, _MAX_ROWS = 40, 12


def show(console: Console, picture: Picture) -> None:
    """Draws it small if that is possible, and names it with its size."""
    kind = None if console.is_dumb_terminal or not console.is_terminal else _renderable()
    if kind is not None:
        thumbnail = picture.image.copy()
        thumbnail.thumbnail((1024, 1024))
        columns = min(_MAX_COLUMNS, console.width - 1, 2 * _MAX_ROWS * thumbnail.width // thumbnail.height)
        console.print(kind(thumbnail, width=max(columns, 1), height="auto"))
    console.print(str(picture), style="dim")


@cache
def _renderable() -> Any:
    """The way this terminal shows pictures (Kitty's protocol, or sixel: iTerm2, WezTerm, foot), or None.

    Importing the library asks the terminal, for a tenth of a second at most.
    """
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    try:
        from textual_image.renderable import Image, SixelImage, TGPImage
    except ImportError:
        return None
    return Image if Image in (SixelImage, TGPImage) else None  # half blocks show little
