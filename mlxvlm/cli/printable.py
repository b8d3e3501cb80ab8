"""Text that others wrote, for a terminal to show. Knows control characters, nothing else."""

from __future__ import annotations

# Control characters as Unicode's pictures of them; U+0080 to U+009F are the same controls in one byte more.
_SHOWN = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_TABLE = {code: shown for code, shown in _SHOWN.items() if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The same text with escape sequences that are seen rather than obeyed."""
    return text.translate(_TABLE)
