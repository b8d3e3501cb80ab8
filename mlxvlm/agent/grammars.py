"""Grammars whose every answer is a call, or text without one. Knows Lark in llguidance's dialect.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from mlxvlm.agent.styles import CallStyle
from mlxvlm.agent.tools import Tool
from mlxvlm.engine.params import JSON_WHITESPACE, Grammar

_ANY = r"/(.|\n)*/"
_CALL = "\x00"  # stands for the call in a style's spelling


def grammar_of(
    style: CallStyle, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool, optional: bool
) -> Grammar:
    """Calls of these tools with arguments by their schemas; optional: or any text, with or without calls at its end.

    special: markers that are one token, which no text in a grammar stands for.
    """
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        rules.append(f"call_{index}: {_quoted(style.begin(tool.name))} arguments_{index} {_quoted('}')}")
        rules.append(f"arguments_{index}: %json {_schema(tool)}")
    spelt = f"{style.before}{style.open}{_CALL}{style.close}"
    more = f"{style.separator}{style.open}{_CALL}{style.close}"
    repeated = f"({_sequence(more, special)})*" if parallel else ""
    after = _sequence(style.after, special)
    if not optional:
        rules.insert(0, f"start: {_sequence(spelt, special)} {repeated} {after}")
    else:
        marker = next((word for word in style.syntax.words if spelt.startswith(word)), "")
        rest = f"{_sequence(spelt.removeprefix(marker), special)} {repeated} {after}"
        rules[:0] = _optional(marker, rest, tools, style, special)
    return Grammar("lark", "\n".join(rules) + "\n")


def _optional(marker: str, rest: str, tools: Sequence[Tool], style: CallStyle, special: Mapping[str, int]) -> list[str]:
    """The first rules where text may come in front of calls, or instead of them."""
    if marker in special:
        return [f"start: TEXT | TEXT <[{special[marker]}]> {rest}", f"TEXT: {_ANY}"]
    if marker:
        word = _pattern(marker)
        return [
            f"start: TEXT | opening {rest}",
            f"opening[lazy]: /(.|\\n)*{word}/",
            f"TEXT: {_ANY}",  # what holds the marker is an opening: lazy terms go first
        ]
    # Without markers a call is what begins like one, at the start of a line.
    names = "|".join(_pattern(json.dumps(tool.name)) for tool in tools)
    call = rf'/((.|\n)*\n)?[ \t\r]*[\[]?[ \t\r\n]*\{{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*({names})(.|\n)*/'
    return [f"start: TEXT | {rest}", f"TEXT: {_ANY} & ~{call}"]


def _sequence(spelt: str, special: Mapping[str, int]) -> str:
    """Text as terms of a rule."""
    words = "|".join(map(re.escape, (*special, _CALL)))
    terms = []
    for piece in re.split(f"({words})", spelt):
        if piece == _CALL:
            terms.append("call")
        elif piece in special:
            terms.append(f"<[{special[piece]}]>")
        elif piece:
            terms.append(_quoted(piece))
    return " ".join(terms)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    """A regular expression of one text, between slashes."""
    return "".join(char if char.isalnum() or char in '_<>"' else f"\\x{{{ord(char):x}}}" for char in text)


def _schema(tool: Tool) -> str:
    """Arguments are an object, whatever else the schema says. Only a strict tool's must be enforceable in full."""
    options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not tool.strict}
    return json.dumps({**tool.parameters, "type": "object", "x-guidance": options})
