"""How a checkpoint's chat template writes tools and calls. Chosen by what the template does, not by a family's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxvlm.agent.tools import CallDelta, NamedTool, Tool, ToolChoice
from mlxvlm.engine.params import Grammar
from mlxvlm.engine.request import Delta
from mlxvlm.messages import Message
from mlxvlm.processors.chat_template import ChatTemplate
from mlxvlm.processors.tokenizer import Tokenizer

__all__ = ["CallDelta", "NamedTool", "Tool", "ToolChoice", "ToolFormat", "ToolParser", "tool_format"]


class ToolParser:
    """Finds calls in one answer as it arrives."""

    def feed(self, delta: Delta) -> list[str | CallDelta]:
        """Text and calls in the order of the answer; text that may become a call is held back."""
        raise NotImplementedError

    def finish(self) -> list[str | CallDelta]:
        """What was held back, once no more will come."""
        raise NotImplementedError


class ToolFormat:
    """One way of writing calls. A request with tools is made of:

    Request(format.messages(messages, tools, choice), template=format.variables(tools, choice),
    sampling=replace(sampling, grammar=format.grammar(tools, choice, parallel) or sampling.grammar,
    visible_token_ids=format.visible_token_ids)), and its Deltas go through
    format.parser(tools, constrained=format.grammar(...) is not None).
    """

    visible_token_ids: frozenset[int]  # special tokens that the parser must see as text

    def messages(self, messages: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice) -> list[Message]:
        """The turns as the template can render them: those of templates that know no tools become plain text."""
        raise NotImplementedError

    def variables(self, tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
        """Variables for the chat template."""
        raise NotImplementedError

    def grammar(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True) -> Grammar | None:
        """What the answer must look like; None where the model is free."""
        raise NotImplementedError

    def parser(self, tools: Sequence[Tool], *, constrained: bool = False) -> ToolParser:
        """constrained: the answer follows grammar(), so arguments are passed on as they grow."""
        raise NotImplementedError


def tool_format(template: ChatTemplate, tokenizer: Tokenizer | None = None) -> ToolFormat:
    """The format of a processor's `template` and `tokenizer`."""
    raise NotImplementedError
