"""A chat request -> the engine's requests. What fields mean, and which of them exclude each other. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxvlm.agent.rounds import ToolFormat as ToolFormat
from mlxvlm.agent.rounds import ToolParser as ToolParser
from mlxvlm.agent.tools import NamedTool, Tool, ToolChoice
from mlxvlm.api.messages import AssistantMessage, ChatMessage, ImageContent, ToolMessage, UserMessage
from mlxvlm.api.naming import Blame
from mlxvlm.api.sampling import SamplingFields
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.api.tools import GrammarFormat, JsonSchema, JsonSchemaFormat, ResponseFormat
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import RequestError
from mlxvlm.messages import ImageOptions, ImagePart, Message, Part, TextPart, ToolCall

# What the engine calls by the same name.
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers", "ignore_eos", "seed"),
)
_RESERVED = ("messages", "tools", "self")  # of a template's variables


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """What the engine is asked, and how its answers are to be read.

    requests: one for each choice, equal but for their seeds. tools: what may be called; a parser is needed only then.
    is_streamed: calls may be told in pieces, before it is sure that they will be whole.
    """

    requests: tuple[Request, ...]
    format: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    is_constrained: bool = False
    max_calls: int | None = None
    is_streamed: bool = False

    def parser(self) -> ToolParser | None:
        """Of one choice."""
        if self.format is None or not self.tools:
            return None
        return self.format.parser(self.tools, constrained=self.is_constrained, grows=self.is_streamed)


def chat_plan(
    body: ChatCompletionRequest,
    defaults: SamplingParams,
    format: ToolFormat | None = None,
    own: Sequence[Tool] = (),
) -> ChatPlan:
    """Raises RequestError naming the field. defaults: the checkpoint's, for what the body leaves out.

    own: the server's tools, which are offered beside the request's.
    """
    _check_together(body)
    tools, choice = chosen_tools(body, own)
    if tools and format is None:
        raise RequestError("this model's server knows no tools: leave tools out", "tools", "unsupported_parameter")
    messages, template = to_messages(body.messages), _template(body)
    sampling = _sampling(body, defaults)
    forced: Grammar | None = None
    if format is not None and (tools or any(each.tool_calls or each.role == "tool" for each in messages)):
        messages = format.messages(messages, tools, choice)
        template |= format.variables(tools, choice)
        if tools and choice != "none":  # else nobody reads markers out of the text
            sampling = replace(sampling, visible_token_ids=format.visible_token_ids)
        forced = format.grammar(tools, choice, body.parallel_tool_calls is not False)
    grammar = _grammar(body)
    if grammar is not None and tools and choice != "none":
        name = "grammar" if body.grammar is not None else "response_format"
        raise RequestError(
            f"{name} binds the whole answer, which then can't call tools: set tool_choice to 'none'", name
        )
    sampling = replace(sampling, grammar=forced or grammar)
    options = ImageOptions(body.min_pixels, body.max_pixels)
    request = Request(
        messages, sampling, template, options, timeout_s=body.timeout, truncate=bool(body.truncate_sequence)
    )
    return ChatPlan(
        tuple(with_seed(request, index) for index in range(body.n or 1)),
        format,
        () if choice == "none" else tools,
        forced is not None,
        1 if body.parallel_tool_calls is False else None,
        bool(body.stream),
    )


def blame_of(body: ChatCompletionRequest, names: Mapping[str, str] | None = None) -> Blame:
    """For what the engine finds wrong with the plan. names: a chat request's field -> the request's own."""
    form = "grammar" if body.grammar is not None else "response_format" if body.response_format is not None else "tools"
    names = names or {}
    return Blame(names.get("messages", "messages"), names.get(form, form))


def with_seed(request: Request, index: int) -> Request:
    """Of the choice with that index."""
    sampling = request.sampling
    if not index or sampling is None or sampling.seed is None:
        return request
    return replace(request, sampling=replace(sampling, seed=sampling.seed + index))


def _check_together(body: ChatCompletionRequest) -> None:
    """Fields that say nothing alone, or two things together."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    limits = (body.max_tokens, body.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise RequestError("max_tokens is the older name of max_completion_tokens: give one of them", "max_tokens")


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The turns in order, with their parts in order. Raises RequestError for an answer to a call that nobody made."""
    calls: set[str] = set()
    turns = []
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            calls.update(call.id for call in message.tool_calls or ())
        elif isinstance(message, ToolMessage) and message.tool_call_id not in calls:
            raise RequestError(
                f"messages[{index}] answers a call that no message before it makes: its tool_call_id must be the id "
                "of one of an assistant's tool_calls",
                f"messages[{index}].tool_call_id",
            )
        turns.append(_turn(message))
    return turns


def _turn(message: ChatMessage) -> Message:
    if isinstance(message, AssistantMessage):
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
        )
        parts = _parts(message.content)
        if message.refusal:
            parts = (*parts, TextPart(message.refusal))
        return Message("assistant", parts, calls)
    if isinstance(message, ToolMessage):
        return Message("tool", _parts(message.content), tool_call_id=message.tool_call_id)
    # No template knows "developer", OpenAI's later name of the same role.
    return Message("user" if isinstance(message, UserMessage) else "system", _parts(message.content))


def _parts(content: str | Sequence[Any] | None) -> tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return (TextPart(content),) if content else ()
    return tuple(_part(part) for part in content)


def _part(part: Any) -> Part:
    if isinstance(part, ImageContent):
        return ImagePart(part.url)
    return TextPart(part.refusal if part.type == "refusal" else part.text)


def chosen_tools(body: ChatCompletionRequest, own: Sequence[Tool] = ()) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that stay and the choice among them. Raises RequestError for a choice that names none of them.

    A tool of the request takes the place of one of `own` with its name.
    """
    tools = tuple(
        Tool(each.function.name, each.function.description or "", each.function.parameters, bool(each.function.strict))
        for each in body.tools or ()
    )
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
        raise RequestError("two tools have the same name", "tools")
    tools += tuple(tool for tool in own if tool.name not in names)
    names = [tool.name for tool in tools]
    choice = body.tool_choice
    if choice is None or choice == "auto":
        return tools, "auto" if tools else "none"
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise RequestError("tool_choice is 'required', but there are no tools", "tool_choice")
        return tools, choice
    wanted = [choice.function] if choice.type == "function" else [each.function for each in choice.allowed_tools.tools]
    for each in wanted:
        if each.name not in names:
            raise RequestError(f"tool_choice names {each.name!r}, which is not among the tools", "tool_choice")
    if choice.type == "function":
        return tools, NamedTool(choice.function.name)
    allowed = {each.name for each in wanted}
    return tuple(tool for tool in tools if tool.name in allowed), choice.allowed_tools.mode


def _template(body: ChatCompletionRequest) -> dict[str, Any]:
    """Variables for the chat template; a field of its own wins over chat_template_kwargs."""
    given = dict(body.chat_template_kwargs or {})
    for name in _RESERVED:
        if name in given:
            raise RequestError(f"chat_template_kwargs can't set {name!r}", f"chat_template_kwargs.{name}")
    for name in ("enable_thinking", "reasoning_effort"):
        if getattr(body, name) is not None:
            given[name] = getattr(body, name)
    return given


def _sampling(body: ChatCompletionRequest, defaults: SamplingParams) -> SamplingParams:
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_of(body, defaults, body.max_completion_tokens or body.max_tokens, top_logprobs)


def sampling_of(
    body: SamplingFields, defaults: SamplingParams, max_tokens: int | None, top_logprobs: int | None
) -> SamplingParams:
    """What the fields say that all endpoints share, without the grammar; None: as the checkpoint says."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if body.stop is not None:
        given["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.logit_bias is not None:
        given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    if top_logprobs is not None:
        given["top_logprobs"] = top_logprobs
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    return replace(defaults, **given)


def _grammar(body: ChatCompletionRequest) -> Grammar | None:
    form = None if body.response_format is None else answer_grammar(body.response_format)
    if body.grammar is None:
        return form
    if form is not None:
        raise RequestError("grammar and response_format both bind the answer: give one of them", "grammar")
    return grammar_of(body.grammar)


def grammar_of(given: GrammarFormat) -> Grammar:
    """Raises RequestError."""
    if isinstance(given.value, Mapping) and given.type in ("regex", "lark"):
        raise RequestError(f"a {given.type} grammar is text", "grammar.value", "invalid_type")
    return Grammar(given.type, given.value)


def answer_grammar(form: ResponseFormat) -> Grammar | None:
    """None for any text."""
    if form.type == "text":
        return None
    if isinstance(form, JsonSchemaFormat) and form.json_schema.schema_ is not None:
        return Grammar("json_schema", _schema(form.json_schema))
    return Grammar("json_object")


def _schema(given: JsonSchema) -> Mapping[str, Any]:
    """Unless it is strict, what can't be enforced of a schema is passed over, as OpenAI does."""
    schema = given.schema_ or {}
    return schema if given.strict else {"x-guidance": {"lenient": True}, **schema}
