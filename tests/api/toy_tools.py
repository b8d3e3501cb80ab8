"""A ToolFormat that can be read on paper: <name:arguments> is a call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mlxvlm.agent.tools import CallDelta, NamedTool, Tool, ToolChoice
from mlxvlm.engine.params import Grammar
from mlxvlm.engine.request import Delta
from mlxvlm.messages import Message, TextPart

CALL = re.compile(r"<(\w+):([^>]*)>")


class ToyParser:
    """Gives text out up to a "<", and a call in two pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._count = 0

    def feed(self, delta: Delta) -> list[str | CallDelta]:
        self._held += delta.text
        return self._out(ended=False)

    def finish(self) -> list[str | CallDelta]:
        return self._out(ended=True)

    def _out(self, *, ended: bool) -> list[str | CallDelta]:
        out: list[str | CallDelta] = []
        while match := CALL.search(self._held):
            if match.start():
                out.append(self._held[: match.start()])
            call_id = f"call_{self._count}"
            out += [CallDelta(self._count, call_id, match[1], ""), CallDelta(self._count, call_id, None, match[2])]
            self._count += 1
            self._held = self._held[match.end() :]
        end = len(self._held) if ended or "<" not in self._held else self._held.index("<")
        out.append(self._held[:end])
        self._held = self._held[end:]
        return out


class ToyFormat:
    """Forces with a regular expression; names tools in a template variable."""

    visible_token_ids = frozenset[int]()
    control_texts = frozenset({"<end>"})

    def messages(self, messages: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice) -> list[Message]:
        return [
            Message(
                each.role, (*each.parts, *(TextPart(f"<{call.name}:{call.arguments}>") for call in each.tool_calls))
            )
            for each in messages
        ]

    def variables(self, tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
        return {"tools": [tool.name for tool in tools]}

    def grammar(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True) -> Grammar | None:
        if choice in ("auto", "none"):
            return None
        names = choice.name if isinstance(choice, NamedTool) else "|".join(tool.name for tool in tools)
        return Grammar("regex", rf"(<({names}):\{{\}}>){'+' if parallel else ''}")

    def parser(self, tools: Sequence[Tool], *, constrained: bool = False, grows: bool = True) -> ToyParser:
        return ToyParser()
