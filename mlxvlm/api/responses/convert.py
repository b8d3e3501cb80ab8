"""A request to the Responses API -> the chat request that says the same. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mlxvlm.agent.web_search import SEARCH_NAME
from mlxvlm.api.base import parse
from mlxvlm.api.messages import ChatMessage, SystemMessage, TextContent
from mlxvlm.api.naming import named
from mlxvlm.api.responses.items import (
    AnswerMessage,
    AskedMessage,
    FunctionCall,
    FunctionCallOutput,
    InputPart,
    InputText,
    InstructingMessage,
    OutputPart,
    OutputText,
    Reasoning,
)
from mlxvlm.api.responses.request import (
    LOGPROBS,
    FunctionTool,
    JsonSchemaFormat,
    NamedTool,
    ResponsesRequest,
    SearchChoice,
    SearchTool,
)
from mlxvlm.api.sampling import SamplingFields
from mlxvlm.api.schema import ChatCompletionRequest, search_options
from mlxvlm.api.turns import Shown, Turns, picture
from mlxvlm.errors import RequestError

# A chat request's fields by their names here.
NAMES: Mapping[str, str] = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "web_search_options": "tools",
}

AnyItem: TypeAlias = AskedMessage | InstructingMessage | AnswerMessage | FunctionCall | FunctionCallOutput | Reasoning


def items_of(body: ResponsesRequest) -> list[AnyItem]:
    """A text is the user's message."""
    if isinstance(body.input, str):
        return [AskedMessage(role="user", content=body.input)]
    return list(body.input)


def turns_of(body: ResponsesRequest, earlier: Sequence[ChatMessage] = ()) -> list[ChatMessage]:
    """All turns but the instructions. Raises RequestError for an output of a call that nobody made."""
    turns = Turns(earlier)
    for index, item in enumerate(items_of(body)):
        if isinstance(item, FunctionCallOutput) and not turns.is_called(item.call_id):
            path = f"input[{index}].call_id"
            raise RequestError(f"{path} names a call that nothing before it makes: send the function_call too", path)
        _add(turns, item)
    return turns.messages()


def _add(turns: Turns, item: AnyItem) -> None:
    if isinstance(item, AskedMessage):
        turns.ask(_shown(item.content))
    elif isinstance(item, InstructingMessage):
        parts = _shown(item.content)
        texts = [part.text for part in parts if isinstance(part, TextContent)]
        if len(texts) < len(parts):
            raise RequestError("pictures belong into messages of the user", "input")
        turns.instruct("".join(texts), item.role)
    elif isinstance(item, AnswerMessage):
        turns.answer(item.content if isinstance(item.content, str) else "".join(map(_said, item.content)))
    elif isinstance(item, FunctionCall):
        turns.call(item.call_id, item.name, item.arguments)
    elif isinstance(item, FunctionCallOutput):
        turns.result(item.call_id, item.output if isinstance(item.output, str) else _shown(item.output))


def _shown(content: str | Sequence[InputPart]) -> list[Shown]:
    if isinstance(content, str):
        return [TextContent(type="text", text=content)]
    return [
        TextContent(type="text", text=part.text) if isinstance(part, InputText) else picture(part.image_url)
        for part in content
    ]


def _said(part: OutputPart) -> str:
    return part.text if isinstance(part, OutputText) else part.refusal


def chat_request(body: ResponsesRequest, turns: Sequence[ChatMessage]) -> ChatCompletionRequest:
    """Raises RequestError in this API's words."""
    head = [SystemMessage(role="system", content=body.instructions)] if body.instructions else []
    same = ("model", "parallel_tool_calls", "enable_thinking", "chat_template_kwargs", *SamplingFields.model_fields)
    fields: dict[str, Any] = {name: getattr(body, name) for name in same}
    wants_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not wants_logprobs:
        raise RequestError(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
    with named(NAMES):
        return parse(
            ChatCompletionRequest,
            fields
            | {
                "messages": [*head, *turns],
                "max_completion_tokens": body.max_output_tokens,
                "response_format": _format(body),
                "tools": _tools(body),
                "tool_choice": _choice(body),
                "web_search_options": _search(body),
                "logprobs": wants_logprobs,
                "top_logprobs": body.top_logprobs if wants_logprobs else None,
                "truncate_sequence": body.truncation == "auto",
                "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
                "stream": bool(body.stream),
            },
        )


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = None if body.text is None else body.text.format
    if form is None:
        return None
    if isinstance(form, JsonSchemaFormat):
        schema = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": "json_schema", "json_schema": schema}
    return {"type": form.type}


def _tools(body: ResponsesRequest) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": tool.model_dump(exclude={"type"})}
        for tool in body.tools or ()
        if isinstance(tool, FunctionTool)
    ]


def _search(body: ResponsesRequest) -> dict[str, Any] | None:
    searches = [tool for tool in body.tools or () if isinstance(tool, SearchTool)]
    if not searches:
        return None
    if len(searches) > 1:
        raise RequestError("two tools search the web: give one", "tools")
    return search_options(searches[0].user_location, searches[0].search_context_size)


def _choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if isinstance(choice, NamedTool):
        return _named(choice.name)
    if isinstance(choice, SearchChoice):
        return _named(SEARCH_NAME)
    some = {"mode": choice.mode, "tools": [_named(tool.name) for tool in choice.tools]}
    return {"type": "allowed_tools", "allowed_tools": some}


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
