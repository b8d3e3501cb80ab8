"""How calls are spelt, and conversations with tools for templates that know none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from mlxvlm.agent.parser import Syntax
from mlxvlm.agent.tools import Tool
from mlxvlm.messages import Message, Part, TextPart

_DESCRIPTION = """\
You can call functions to answer. These are their descriptions, one a line:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as a JSON object inside of <tool_call> tags:
<tool_call>
{{"name": "function", "arguments": {{"argument": "value"}}}}
</tool_call>
Its result is then given to you inside of <tool_response> tags. Answer without a call where none is needed."""

# What stands around calls and results in many templates: not always tokens, but a result with them could end itself.
MARKERS = frozenset({"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"})


@dataclass(frozen=True, slots=True)
class CallStyle:
    """One spelling: before + (open + call + close), separated + after. A call is {"name": ..., key: {...}}.

    parallel: whether the template takes several calls in a turn. id_length: of ids that the template takes, 0 for any.
    """

    syntax: Syntax
    key: str = "arguments"
    before: str = ""
    open: str = ""
    close: str = ""
    separator: str = "\n"
    after: str = ""
    parallel: bool = True
    id_length: int = 0

    def begin(self, name: str) -> str:
        """A call up to its arguments, which are followed by one brace."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": '

    def render(self, calls: Sequence[tuple[str, str]]) -> str:
        """Names and JSON arguments as the model should write them."""
        spelt = [f"{self.open}{self.begin(name)}{arguments}}}{self.close}" for name, arguments in calls]
        return f"{self.before}{self.separator.join(spelt)}{self.after}"


def in_plain_text(
    messages: Sequence[Message], tools: Sequence[Tool], style: CallStyle, *, takes_system: bool
) -> list[Message]:
    """Tools, calls and results as text of system, assistant and user turns, which every template takes."""
    turns: list[Message] = []
    for message in messages:
        if message.role == "tool":
            parts: tuple[Part, ...] = (
                TextPart("<tool_response>\n"),
                *message.parts,
                TextPart("\n</tool_response>"),
            )
            if turns and turns[-1].role == "user" and turns[-1].parts[-1:] == parts[-1:]:
                # Several results make one turn: some templates want user and assistant by turns.
                turns[-1] = replace(turns[-1], parts=(*turns[-1].parts, TextPart("\n"), *parts))
            else:
                turns.append(Message("user", parts))
        elif message.tool_calls:
            spelt = style.render([(call.name, call.arguments or "{}") for call in message.tool_calls])
            gap = "\n" if message.text else ""
            turns.append(Message("assistant", (*message.parts, TextPart(f"{gap}{spelt}"))))
        else:
            turns.append(message)
    turns = _with_description(turns, tools, takes_system=takes_system) if tools else turns
    return [replace(turn, parts=_merged(turn.parts)) for turn in turns]


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Text side by side as one part: some templates write spaces between parts, or read the first only."""
    merged: list[Part] = []
    for is_text, run in groupby(parts, lambda part: isinstance(part, TextPart)):
        pieces = list(run)
        merged += [TextPart("".join(part.text for part in pieces if isinstance(part, TextPart)))] if is_text else pieces
    return tuple(merged)


def _with_description(turns: list[Message], tools: Sequence[Tool], *, takes_system: bool) -> list[Message]:
    """The description in the system turn, or at the start of the first where a template takes no system turn."""
    lines = "\n".join(json.dumps(tool.as_template(), ensure_ascii=False) for tool in tools)
    text = _DESCRIPTION.format(tools=lines)
    if turns and turns[0].role in ("system", "developer"):
        return [replace(turns[0], parts=(*turns[0].parts, TextPart(f"\n\n{text}"))), *turns[1:]]
    if takes_system or not turns:
        return [Message("system", (TextPart(text),)), *turns]
    return [replace(turns[0], parts=(TextPart(f"{text}\n\n"), *turns[0].parts)), *turns[1:]]
