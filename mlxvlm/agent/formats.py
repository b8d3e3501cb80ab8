"""How a checkpoint's chat template writes tools and calls. Chosen by what the template does, not by a family's name.

Sources: the templates themselves; https://www.llama.com/docs/model-cards-and-prompt-formats (Llama 3.x, Llama 4),
https://github.com/NousResearch/Hermes-Function-Calling, https://docs.mistral.ai/capabilities/function_calling.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mlxvlm.agent.grammars import grammar_of
from mlxvlm.agent.parser import Syntax, ToolParser
from mlxvlm.agent.styles import MARKERS, CallStyle, in_plain_text
from mlxvlm.agent.tools import CallDelta, NamedTool, Tool, ToolChoice, allowed
from mlxvlm.engine.params import Grammar
from mlxvlm.errors import TemplateError
from mlxvlm.messages import Message, ToolCall
from mlxvlm.processors.chat_template import ChatTemplate
from mlxvlm.processors.tokenizer import Tokenizer

__all__ = ["CallDelta", "NamedTool", "Tool", "ToolChoice", "ToolFormat", "ToolParser", "tool_format"]

_PROBE = "mlxvlm_probe"  # a tool that no template knows
_PROBE_ID = "callprobe"  # Mistral's templates want nine letters or digits
# A turn's content: most templates that know tools take text, some take parts only.
_SHAPES: tuple[Callable[[str], Any], ...] = (str, lambda text: [{"type": "text", "text": text}])
_OPENING = re.compile(
    rf'(?P<open><tool_call>\s*|\[TOOL_CALLS\]\s*\[|)\{{"name": ?"{_PROBE}", ?"(?P<key>arguments|parameters)": '
)

_LLAMA = CallStyle(
    Syntax(
        markers=(("<|python_tag|>", ""), ("<|python_start|>", "<|python_end|>")),
        bare="{[",
        pythonic=True,
        closers=("<|python_end|>",),
    ),
    key="parameters",
)
_HERMES = CallStyle(
    Syntax(markers=(("<tool_call>", "</tool_call>"),)), open="<tool_call>\n", close="\n</tool_call>", separator="\n"
)
_MISTRAL = CallStyle(Syntax(markers=(("[TOOL_CALLS]", ""),)), before="[TOOL_CALLS] [", after="]", separator=", ")


class ToolFormat:
    """One way of writing calls. An answer with tools is made of

    - Request(format.messages(messages, tools, choice), template=format.variables(tools, choice)), whose SamplingParams
      have grammar=format.grammar(tools, choice, parallel) and visible_token_ids=format.visible_token_ids,
    - format.parser(tools, constrained=...), which its Deltas go through; tools are () where the choice is "none".
    """

    def __init__(
        self, style: CallStyle, tokenizer: Tokenizer | None = None, *, native: bool = True, takes_system: bool = True
    ) -> None:
        """native: the template itself describes tools and renders calls and their results.

        control_texts: what foreign text in a prompt must not hold, see without_special_tokens.
        """
        self.style = style
        self.native = native
        self._takes_system = takes_system
        self._special = _special_tokens(tokenizer, style.syntax.words)
        self.control_texts = control_texts(tokenizer) | MARKERS

    @property
    def visible_token_ids(self) -> frozenset[int]:
        """Special tokens that the parser must see as text."""
        return frozenset(self._special.values())

    def messages(self, messages: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice) -> list[Message]:
        """The turns as the template can render them."""
        if not self.native:
            return in_plain_text(messages, allowed(tools, choice), self.style, takes_system=self._takes_system)
        if self.style.id_length:
            messages = [_with_short_ids(message, self.style.id_length) for message in messages]
        return list(messages) if self.style.parallel else _one_call_a_turn(messages)

    def variables(self, tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
        """Variables for the chat template. A named choice leaves the others in: the prompt's cache stays of use."""
        if not self.native or not allowed(tools, choice):
            return {}
        return {"tools": [tool.as_template() for tool in tools]}

    def grammar(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True) -> Grammar | None:
        """What the answer must look like; None where the model is free to write what it likes.

        Under "auto" it is free unless a tool is strict or only one call may come: then text stays free and calls are
        not. A named choice is one call.
        """
        tools = allowed(tools, choice)
        optional = choice == "auto"
        if not tools or (optional and parallel and not any(tool.strict for tool in tools)):
            return None
        parallel = parallel and self.style.parallel and not isinstance(choice, NamedTool)
        return grammar_of(self.style, tools, self._special, parallel=parallel, optional=optional)

    def parser(self, tools: Sequence[Tool], *, constrained: bool = False, grows: bool = True) -> ToolParser:
        """constrained: the answer follows grammar(). grows: arguments are then given out as they come."""
        syntax = self.style.syntax
        if constrained:  # calls of other spellings are not the grammar's
            spelt = self.render([ToolCall("", "", "")])
            syntax = replace(syntax, markers=tuple(pair for pair in syntax.markers if spelt.startswith(pair[0])))
        return ToolParser(syntax, tools, self._special, constrained=constrained, grows=grows)

    def render(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model should write them."""
        return self.style.render([(call.name, call.arguments or "{}") for call in calls])


def tool_format(template: ChatTemplate, tokenizer: Tokenizer | None = None) -> ToolFormat:
    """The format of a processor's `template` and `tokenizer`, found by rendering a call.

    Templates that know no tools, and those that write calls in a way unknown here, get tools described in plain text.
    """
    written = _rendered(template, calls=1)
    # A template may describe tools as it writes calls, so the call is looked for where nothing describes it.
    found = max(_OPENING.finditer(written), key=lambda match: len(match["open"]), default=None)
    if found is None or _PROBE not in _rendered(template, calls=0):
        return ToolFormat(_HERMES, tokenizer, native=False, takes_system=_takes_system(template))
    style = replace(_style_of(found["open"]), key=found["key"], parallel=bool(_rendered(template, calls=2)))
    return ToolFormat(style, tokenizer)


def _style_of(opening: str) -> CallStyle:
    if opening.startswith("<tool_call>"):
        space = opening.removeprefix("<tool_call>")
        return replace(_HERMES, open=opening, close=f"{space}</tool_call>")
    return replace(_MISTRAL, before=opening, id_length=len(_PROBE_ID)) if opening else _LLAMA


def _rendered(template: ChatTemplate, calls: int) -> str:
    """A question and calls that answer it, or a question with tools where there are no calls; "" if refused."""
    call = {"type": "function", "id": _PROBE_ID, "function": {"name": _PROBE, "arguments": {}}}
    variables = {} if calls else {"tools": [Tool(_PROBE).as_template()]}
    for shape in _SHAPES:
        turns: list[dict[str, Any]] = [{"role": "user", "content": shape("?")}]
        if calls:
            turns.append({"role": "assistant", "content": shape(""), "tool_calls": [call] * calls})
            turns += [{"role": "tool", "content": shape("!"), "tool_call_id": _PROBE_ID}] * calls
        with suppress(TemplateError):
            return template.render(turns, variables)
    return ""


def _takes_system(template: ChatTemplate) -> bool:
    for shape in _SHAPES:
        turns = [{"role": "system", "content": shape(_PROBE)}, {"role": "user", "content": shape("?")}]
        with suppress(TemplateError):
            if _PROBE in template.render(turns):
                return True
    return False


def control_texts(tokenizer: Tokenizer | None) -> frozenset[str]:
    """Texts that a tokenizer takes as tokens of their own, so that who writes them can steer the model.

    Runs of spaces, which some tokenizers add too, steer nothing.
    """
    added: Mapping[int, Any] = tokenizer.backend.get_added_tokens_decoder() if tokenizer else {}
    return frozenset(token.content for token in added.values() if token.content.strip())


def _special_tokens(tokenizer: Tokenizer | None, words: Collection[str]) -> dict[str, int]:
    """Those of the markers that a tokenizer has as one special token, which decoded text leaves out."""
    added: Mapping[int, Any] = tokenizer.backend.get_added_tokens_decoder() if tokenizer else {}
    return {token.content: number for number, token in added.items() if token.special and token.content in words}


def _with_short_ids(message: Message, length: int) -> Message:
    """Ids that the template takes: the same for the same, whatever they were."""

    def short(call_id: str) -> str:
        return call_id if re.fullmatch(rf"[a-zA-Z0-9]{{{length}}}", call_id) else _digest(call_id)[:length]

    calls = tuple(replace(call, id=short(call.id)) for call in message.tool_calls)
    answered = message.tool_call_id
    return replace(message, tool_calls=calls, tool_call_id=None if answered is None else short(answered))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _one_call_a_turn(messages: Sequence[Message]) -> list[Message]:
    """A turn with several calls as several turns, each before its result: some templates take no more than one."""
    turns: list[Message] = []
    waiting = deque(messages)
    while waiting:
        message = waiting.popleft()
        if len(message.tool_calls) < 2:
            turns.append(message)
            continue
        results: dict[str, list[Message]] = {call.id: [] for call in message.tool_calls}
        others: list[Message] = []
        while waiting and waiting[0].role == "tool":
            result = waiting.popleft()
            results.get(result.tool_call_id or "", others).append(result)
        for index, call in enumerate(message.tool_calls):
            turns.append(replace(message, parts=() if index else message.parts, tool_calls=(call,)))
            turns += results.pop(call.id, [])
        turns += others
    return turns
