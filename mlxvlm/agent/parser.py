"""Finds the calls in an answer as it arrives. Knows the forms that calls take, no chat templates.

What is no call stays text, in its place: a call that is cut off or malformed, one of a tool that there is not, one with
keys that calls don't have. A call is given out when it is complete, so its arguments are JSON; under a grammar, which
leaves no other way to go on, they can be given out as they grow. White space beside calls and markers is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mlxvlm.agent.reader import MalformedError, Reader, Reading, is_json, json_string, json_value, python_arguments
from mlxvlm.agent.tools import CallDelta, Tool, new_call_id
from mlxvlm.engine.request import Delta

Piece: TypeAlias = str | CallDelta
Call: TypeAlias = tuple[str, str]  # name, arguments

_WHITE = " \t\r\n"
_SEPARATORS = ",;"
_NAME = re.compile(r"[\w.\-]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("type", "id", "name", *_ARGUMENTS)


@dataclass(frozen=True, slots=True)
class Syntax:
    """Where calls stand in a text.

    markers: what stands in front of calls, each with what may stand after them ("" for nothing).
    bare: characters that begin calls at the start of a line without any marker.
    pythonic: whether [f(a=1), g()] and f(a=1) are calls beside JSON.
    closers: markers that mean nothing where no call stood before them.
    """

    markers: tuple[tuple[str, str], ...] = ()
    bare: str = ""
    pythonic: bool = False
    closers: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """All markers, longest first."""
        words = {*self.closers, *(word for pair in self.markers for word in pair if word)}
        return tuple(sorted(words, key=len, reverse=True))


class ToolParser:
    """One answer."""

    def __init__(
        self,
        syntax: Syntax,
        tools: Sequence[Tool],
        hidden: Collection[str] = (),
        *,
        constrained: bool = False,
        grows: bool = True,
    ) -> None:
        """hidden: markers that are special tokens, which no answer shows even where they mean nothing.

        constrained: the answer follows a grammar. grows: then arguments are given out as they come, so that a call
        which is cut off is a call with broken JSON; else it stays text, as without a grammar.
        """
        self._syntax = syntax if tools else Syntax(closers=tuple(hidden))
        self._names = frozenset(tool.name for tool in tools)
        self._hidden = frozenset(hidden)
        self._constrained = constrained
        self._grows = constrained and grows
        self._reader = Reader()
        self._out: list[Piece] = []
        self._count = 0  # calls given out
        self._growing = ""  # the id of the last of them, while its arguments are being read
        self._sent = 0  # up to where they were given out
        self._space = ""  # held back, as it is dropped beside calls
        self._after_call = False
        self._line_start = True
        firsts = "".join({word[0] for word in self._syntax.words} | set(self._syntax.bare) | set(_SEPARATORS))
        self._plain = re.compile(f"[^{re.escape(firsts)}]+")
        self._run = self._answer()

    def feed(self, delta: Delta) -> list[Piece]:
        """Text and calls in the order of the answer; text that may become a call is held back."""
        self._reader.text += delta.text
        return self._advance()

    def finish(self) -> list[Piece]:
        """What was held back, once no more will come."""
        self._reader.ended = True
        return self._advance()

    def _advance(self) -> list[Piece]:
        next(self._run, None)
        self._grow()
        out, self._out = self._out, []
        return _joined(out)

    def _answer(self) -> Reading[None]:
        reader = self._reader
        while char := (yield from reader.peek()):
            reader.drop()
            word = yield from self._marker()
            if word:
                yield from self._marked(word)
            elif char in self._syntax.bare and self._line_start:
                yield from self._attempt("")
            elif char in _SEPARATORS and self._after_call:
                yield from self._separator(char)
            else:
                self._read_plain()
        if not self._after_call:
            self._out.append(self._space)

    def _marker(self) -> Reading[str]:
        """The marker that comes next, if one does."""
        for word in self._syntax.words:
            if (yield from self._reader.starts_with(word)):
                return word
        return ""

    def _marked(self, word: str) -> Reading[None]:
        if word in dict(self._syntax.markers):
            yield from self._attempt(word)
        else:
            self._reader.at += len(word)
            self._show(word)

    def _separator(self, char: str) -> Reading[None]:
        """Between two calls without markers: text, should no call follow."""
        reader = self._reader
        start = reader.at
        reader.at += 1
        following = yield from reader.skip_space()
        if following and following in self._syntax.bare:
            self._space += reader.text[start : reader.at]
        else:
            self._text(reader.text[start : reader.at])

    def _read_plain(self) -> None:
        reader = self._reader
        start = reader.at
        found = self._plain.match(reader.text, start)
        reader.at = found.end() if found else start + 1
        self._text(reader.text[start : reader.at])

    def _text(self, text: str) -> None:
        """Gives text out, but for the white space at its end."""
        body = text.rstrip(_WHITE)
        if body:
            self._out.append(self._space + body)
            self._space, self._after_call = "", False
        self._space += text[len(body) :]
        *lines, last = text.split("\n")
        self._line_start = (bool(lines) or self._line_start) and not last.strip(_WHITE)

    def _show(self, word: str) -> None:
        """A marker that means nothing."""
        if word in self._hidden:
            self._line_start = True
        else:
            self._text(word)

    def _attempt(self, opener: str) -> Reading[None]:
        """Reads calls after an opener, or text as far as it could have been calls."""
        reader = self._reader
        reader.at += len(opener)
        start, begun = reader.at, self._count
        try:
            calls = yield from self._calls(marked=bool(opener))
        except MalformedError:
            if self._count > begun:  # they grow, so the answer was cut off: what is open is the arguments'
                reader.at = len(reader.text)
                self._grow()
                self._growing = ""
                return
            if opener:
                self._show(opener)
            self._text(reader.text[start : reader.at])
            return
        for name, arguments in calls:
            self._begin(name, arguments)
        self._space, self._after_call, self._line_start = "", True, True
        yield from self._close(dict(self._syntax.markers).get(opener, ""))

    def _close(self, closer: str) -> Reading[None]:
        """Passes over the marker after calls, if it is there: models forget it, and limits cut it off."""
        reader = self._reader
        if not closer:
            return
        start = reader.at
        yield from reader.skip_space()
        if not (yield from reader.skip(closer)):
            rest = reader.text[reader.at : reader.at + len(closer)]
            reader.at = len(reader.text) if closer.startswith(rest) else start

    def _begin(self, name: str, arguments: str = "") -> None:
        self._growing = new_call_id()
        self._out.append(CallDelta(self._count, self._growing, name, _SURROGATE.sub(_escaped, arguments)))
        self._count += 1
        if not self._grows:
            self._growing = ""

    def _grow(self) -> None:
        """Gives out the arguments as far as they were read."""
        if self._growing and self._reader.at > self._sent:
            piece = self._reader.text[self._sent : self._reader.at]
            self._out.append(CallDelta(self._count - 1, self._growing, None, piece))
            self._sent = self._reader.at

    def _calls(self, *, marked: bool) -> Reading[list[Call]]:
        """What of the calls was not given out yet. Raises MalformedError."""
        reader = self._reader
        char = yield from reader.skip_space()
        if char == "{":
            return (yield from self._json_call())
        pythonic = self._syntax.pythonic and not self._constrained
        if char == "[":
            reader.at += 1
            is_json = (yield from reader.skip_space()) == "{"
            if not is_json and not pythonic:
                raise MalformedError
            calls = yield from self._list(self._json_call if is_json else self._python_call)
            yield from reader.expect("]")
            return calls
        if pythonic and marked:
            return (yield from self._python_call())
        raise MalformedError

    def _list(self, call: Callable[[], Reading[list[Call]]]) -> Reading[list[Call]]:
        calls = yield from call()
        while (yield from self._reader.skip_space()) == ",":
            self._reader.at += 1
            yield from self._reader.skip_space()
            calls += yield from call()
        return calls

    def _json_call(self) -> Reading[list[Call]]:
        """{"name": ..., "arguments": {...}}: refused at the first key that tells it is something else."""
        reader = self._reader
        members: dict[str, str] = {}  # JSON text
        yield from reader.expect("{")
        while True:
            yield from reader.skip_space()
            key = yield from json_string(reader)
            if not self._may_follow(key, members):
                raise MalformedError
            yield from reader.skip_space()
            yield from reader.expect(":")
            yield from reader.skip_space()
            members[key] = yield from self._member(key, members.get("name", ""))
            if key == "name" and members[key] not in map(json.dumps, self._names):
                raise MalformedError
            if (yield from reader.skip_space()) != ",":
                break
            reader.at += 1
        if self._constrained and len(members) < 2:  # no grammar's
            raise MalformedError
        if not self._constrained or (yield from reader.peek()):  # where only this is cut off, the arguments are whole
            yield from reader.expect("}")
        return [] if self._grows else [_call(members)]

    def _may_follow(self, key: str, members: Mapping[str, str]) -> bool:
        if self._constrained:  # a grammar leaves one order
            return not members if key == "name" else key in _ARGUMENTS and [*members] == ["name"]
        return key in _KEYS and key not in members and not (key in _ARGUMENTS and members.keys() & _ARGUMENTS)

    def _member(self, key: str, name: str) -> Reading[str]:
        """The text of a call's member; arguments that grow are given out on the way."""
        reader = self._reader
        start = reader.at
        if key == "name":
            return json.dumps((yield from json_string(reader)))
        if self._grows and key in _ARGUMENTS and (yield from reader.peek()):
            self._begin(json.loads(name))
            self._sent = start
        yield from json_value(reader)
        self._grow()
        self._growing = ""
        return reader.text[start : reader.at]

    def _python_call(self) -> Reading[list[Call]]:
        reader = self._reader
        start = reader.at
        name = yield from reader.take(_NAME)
        name = name if name in self._names else name.removesuffix(".call")  # how Llama 3 calls its built-in tools
        if name not in self._names:
            reader.at = start
            raise MalformedError
        return [(name, (yield from python_arguments(reader)))]


def _call(members: Mapping[str, str]) -> Call:
    """Raises MalformedError for a call without a name, or whose arguments are no object."""
    arguments = next((members[key] for key in _ARGUMENTS if key in members), "{}")
    if arguments.startswith('"'):  # some models write JSON inside of a string
        arguments = json.loads(arguments).strip(_WHITE)
        if not is_json(arguments):
            raise MalformedError
    if "name" not in members or members.get("type", '"function"') != '"function"' or not arguments.startswith("{"):
        raise MalformedError
    return json.loads(members["name"]), arguments


def _escaped(found: re.Match[str]) -> str:
    """Half of a surrogate pair is no character, but JSON has a way to write it."""
    return f"\\u{ord(found[0]):04x}"


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Text that stands side by side as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece:
            joined.append(piece)
    return joined
