"""A typed line -> the pictures it names and the rest. Knows quoting and file names, opens nothing.

Terminals paste a dropped file's path quoted, or with a backslash before each odd character. A shell's quotes end
before an apostrophe and begin again behind it: 'it'\\''s.png', or 'it'"'"'s.png'.
"""

from __future__ import annotations

import re
from pathlib import Path

PICTURES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".ppm", ".ico"),
)
# Only these part words: macOS writes the time in a screenshot's name with a narrow no-break space.
SPACES = " \t\r\n"
_APOSTROPHE = r"""'(?:\\'|"'")'"""  # inside a shell's single quotes
_WORD = re.compile(rf"""'((?:[^']|{_APOSTROPHE})*)'?|"([^"]*)"?|((?:\\.|[^ \t\r\n])+)""")
_URL = re.compile(r"(https?|file)://|data:", re.IGNORECASE)
_DROPPED = re.compile(r"""['"]?(/|~/|file://)|data:image/""", re.IGNORECASE)
_MAX_PATH_CHARS = 1024  # macOS's limit


def split_sources(text: str) -> tuple[list[str], str]:
    """The pictures that a text begins with, unquoted, and what follows. Its first word always counts as one."""
    sources: list[str] = []
    rest = text.strip(SPACES)
    while rest:
        source, end = _first(rest)
        if sources and not _is_picture(source):
            break
        sources.append(source)
        rest = rest[end:].lstrip(SPACES)
    return sources, rest


def is_dropped(line: str) -> bool:
    """Whether a line begins with a picture itself: a file dropped on the terminal, or a pasted data: URL."""
    if not _DROPPED.match(line):
        return False
    source = _first(line)[0]
    return is_url(source) or (is_file(source) and _is_picture(source))


def last_word(text: str) -> tuple[str, str]:
    """What a text ends with, unquoted, and the quote it stands in: of a name that is being typed."""
    words = list(_WORD.finditer(text))
    if not words or words[-1].end() < len(text):
        return "", ""
    raw = words[-1][0]
    return _value(words[-1]), raw[0] if raw[0] in "'\"" else ""


def escaped(name: str) -> str:
    """A piece of a path as it must be typed outside of quotes."""
    return re.sub(r"""([ \t\\'"])""", r"\\\1", name)


def is_url(source: str) -> bool:
    """Whether a picture's source is an http, https, file or data URL."""
    return bool(_URL.match(source))


def is_file(name: str) -> bool:
    """Whether a file of that name is there, "~" meaning home."""
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, nobody's home
        return False


def _is_picture(source: str) -> bool:
    return is_url(source) or (source.lower().endswith(PICTURES) and is_file(source))


def _first(text: str) -> tuple[str, int]:
    """The first word and its end. Where it names nothing, the longest beginning that is a file: spaces and all."""
    word = _WORD.match(text)
    assert word is not None
    if word[3] is not None and not is_url(word[3]) and not is_file(_value(word)):
        line = text[:_MAX_PATH_CHARS].partition("\n")[0]
        ends = [match.start() for match in re.finditer(r"[ \t]|$", line) if match.start() > word.end()]
        for end in reversed(ends):
            if is_file(line[:end]):
                return line[:end], end
    return _value(word), word.end()


def _value(word: re.Match[str]) -> str:
    single, double, bare = word.groups()
    if bare is None:
        return re.sub(_APOSTROPHE, "'", single) if double is None else str(double)
    if is_url(bare) or is_file(bare):
        return str(bare)
    return re.sub(r"\\(.)", r"\1", bare)
