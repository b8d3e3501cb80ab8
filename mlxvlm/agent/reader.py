"""Text that is still arriving, and values in it. Knows JSON and Python's literals, no tools.

Everything here is a coroutine that yields where it needs more text, so that how the text was cut changes nothing. No
character is looked at twice: what can't be read is left behind the place where that shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import TypeAlias, TypeVar

MAX_DEPTH = 64  # of nested values; coroutines that wait cost their depth

T = TypeVar("T")
Reading: TypeAlias = Generator[None, None, T]

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER_CHARS = re.compile(r"[-+.\w]*")
_WORD = re.compile(r"\w*")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_HEX = re.compile(r"[0-9a-fA-F]*")

_PYTHON_TEXT = {"'": re.compile(r"[^'\\\n]*"), '"': re.compile(r'[^"\\\n]*')}
_PYTHON_NUMBER = re.compile(r"-?(?P<whole>[0-9]*)(?P<part>\.[0-9]*)?(?P<exponent>[eE][-+]?[0-9]+)?")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


class MalformedError(Exception):
    """The text is not what was looked for. Never leaves the room."""


class Reader:
    """A place in a text that grows."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def drop(self) -> None:
        """Forgets what lies behind, now and then."""
        if self.at > len(self.text) // 2:
            self.text, self.at = self.text[self.at :], 0

    def more(self) -> Reading[bool]:
        """Waits for text; False at its end."""
        length = len(self.text)
        while len(self.text) == length and not self.ended:
            yield
        return len(self.text) > length

    def peek(self) -> Reading[str]:
        """The next character, "" at the end."""
        if self.at == len(self.text):
            yield from self.more()
        return self.text[self.at : self.at + 1]

    def starts_with(self, word: str) -> Reading[bool]:
        """Whether `word` comes next; waits no longer than it may."""
        while word != self.text[self.at : self.at + len(word)]:
            if not word.startswith(self.text[self.at : self.at + len(word)]) or not (yield from self.more()):
                return False
        return True

    def take(self, pattern: re.Pattern[str]) -> Reading[str]:
        """What matches a pattern of the form [...]*."""
        start = self.at
        while True:
            found = pattern.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text) or not (yield from self.more()):
                return self.text[start : self.at]

    def skip_space(self) -> Reading[str]:
        """The character after white space."""
        yield from self.take(_SPACE)
        return (yield from self.peek())

    def skip(self, word: str) -> Reading[bool]:
        """Passes over `word` if it comes next."""
        found = yield from self.starts_with(word)
        if found:
            self.at += len(word)
        return found

    def expect(self, word: str) -> Reading[None]:
        if not (yield from self.skip(word)):
            raise MalformedError

    def next_char(self) -> Reading[str]:
        """The next character, passed over."""
        char = yield from self.peek()
        if not char:
            raise MalformedError
        self.at += 1
        return char


def json_string(reader: Reader) -> Reading[str]:
    """A JSON string's value."""
    start = reader.at
    yield from reader.expect('"')
    while True:
        yield from reader.take(_STRING)
        char = yield from reader.peek()
        if char == '"':
            reader.at += 1
            value: str = json.loads(reader.text[start : reader.at])
            return value
        yield from reader.expect("\\")
        if (yield from reader.peek()) not in tuple('"\\/bfnrtu'):
            raise MalformedError
        if (yield from reader.next_char()) == "u":
            yield from _hex(reader, 4)


def _hex(reader: Reader, digits: int) -> Reading[int]:
    start = reader.at
    for _ in range(digits):
        if not _HEX.fullmatch((yield from reader.peek()) or "?"):
            raise MalformedError
        reader.at += 1
    return int(reader.text[start : reader.at], 16)


def json_value(reader: Reader, depth: int = 0) -> Reading[None]:
    """Passes over one JSON value, strictly: no NaN, no comments, no comma too many."""
    if depth > MAX_DEPTH:
        raise MalformedError
    char = yield from reader.skip_space()
    if char == '"':
        yield from json_string(reader)
    elif char == "{":
        yield from _json_object(reader, depth)
    elif char == "[":
        yield from _json_array(reader, depth)
    elif char and char in "tfn":
        yield from reader.expect({"t": "true", "f": "false", "n": "null"}[char])
    else:
        start = reader.at
        if not _JSON_NUMBER.fullmatch((yield from reader.take(_NUMBER_CHARS))):
            reader.at = start
            raise MalformedError


def is_json(text: str) -> bool:
    """Whether a whole text is one JSON value."""
    reader = Reader()
    reader.text, reader.ended = text, True
    try:
        next(json_value(reader), None)
    except MalformedError:
        return False
    return reader.at == len(text)


def _json_object(reader: Reader, depth: int) -> Reading[None]:
    yield from reader.expect("{")
    if (yield from reader.skip_space()) != "}":
        while True:
            yield from reader.take(_SPACE)
            yield from json_string(reader)
            yield from reader.take(_SPACE)
            yield from reader.expect(":")
            yield from json_value(reader, depth + 1)
            if (yield from reader.skip_space()) != ",":
                break
            reader.at += 1
    yield from reader.expect("}")


def _json_array(reader: Reader, depth: int) -> Reading[None]:
    yield from reader.expect("[")
    if (yield from reader.skip_space()) != "]":
        while True:
            yield from json_value(reader, depth + 1)
            if (yield from reader.skip_space()) != ",":
                break
            reader.at += 1
    yield from reader.expect("]")


def python_value(reader: Reader, depth: int = 0) -> Reading[str]:
    """One of Python's literals as JSON text: strings, numbers, True, False, None, lists, tuples, dicts."""
    if depth > MAX_DEPTH:
        raise MalformedError
    char = yield from reader.skip_space()
    if char in ("'", '"'):
        return _quoted((yield from _python_string(reader, char)))
    if char in ("[", "("):
        return (yield from _python_list(reader, char, depth))
    if char == "{":
        return (yield from _python_dict(reader, depth))
    start = reader.at
    word = yield from reader.take(_NUMBER_CHARS)
    if word in _PYTHON_WORDS:
        return _PYTHON_WORDS[word]
    number = _PYTHON_NUMBER.fullmatch(word)
    digits = number and number["whole"] + (number["part"] or "").strip(".")
    if not number or not digits:
        reader.at = start
        raise MalformedError
    part = (number["part"] or "").rstrip(".")
    return f"{'-' * word.startswith('-')}{number['whole'].lstrip('0') or '0'}{part}{number['exponent'] or ''}"


def _python_string(reader: Reader, quote: str) -> Reading[str]:
    yield from reader.expect(quote)
    pieces: list[str] = []
    while True:
        pieces.append((yield from reader.take(_PYTHON_TEXT[quote])))
        if (yield from reader.skip(quote)):
            return "".join(pieces)
        yield from reader.expect("\\")
        char = yield from reader.next_char()
        if char in _HEX_DIGITS:
            code = yield from _hex(reader, _HEX_DIGITS[char])
            if code > 0x10FFFF:
                raise MalformedError
            pieces.append(chr(code))
        else:
            # As in Python, what is no escape keeps its backslash.
            pieces.append(_ESCAPES.get(char, char if char in "\\'\"" else f"\\{char}"))


def _python_list(reader: Reader, opener: str, depth: int) -> Reading[str]:
    yield from reader.expect(opener)
    closer = {"[": "]", "(": ")"}[opener]
    values = []
    while (yield from reader.skip_space()) != closer:
        values.append((yield from python_value(reader, depth + 1)))
        if (yield from reader.skip_space()) != ",":
            break
        reader.at += 1
    yield from reader.expect(closer)
    return f"[{', '.join(values)}]"


def _python_dict(reader: Reader, depth: int) -> Reading[str]:
    yield from reader.expect("{")
    members = {}
    while (char := (yield from reader.skip_space())) != "}":
        if char not in ("'", '"'):
            raise MalformedError  # JSON's keys are strings
        key = yield from _python_string(reader, char)
        yield from reader.take(_SPACE)
        yield from reader.expect(":")
        members[key] = yield from python_value(reader, depth + 1)
        if (yield from reader.skip_space()) != ",":
            break
        reader.at += 1
    yield from reader.expect("}")
    return as_object(members)


def python_arguments(reader: Reader) -> Reading[str]:
    """(a=1, b="x") as a JSON object's text. Arguments without a name have no place in one."""
    yield from reader.expect("(")
    members: dict[str, str] = {}
    while (yield from reader.skip_space()) != ")":
        start = reader.at
        name = yield from reader.take(_WORD)
        if not name.isidentifier() or name in members:
            reader.at = start
            raise MalformedError
        yield from reader.take(_SPACE)
        yield from reader.expect("=")
        members[name] = yield from python_value(reader)
        if (yield from reader.skip_space()) != ",":
            break
        reader.at += 1
    yield from reader.expect(")")
    return as_object(members)


def as_object(members: dict[str, str]) -> str:
    """A JSON object of values that are JSON text already."""
    return "{" + ", ".join(f"{_quoted(name)}: {text}" for name, text in members.items()) + "}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
