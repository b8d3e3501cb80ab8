"""A request to Anthropic's Messages API -> the chat request that says the same. Knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlxvlm.agent.web_search import SEARCH_NAME
from mlxvlm.api.anthropic.request import (
    AssistantMessage,
    Base64Source,
    CountTokensRequest,
    ImageBlock,
    Message,
    MessagesRequest,
    SearchTool,
    SystemMessage,
    TextBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
    UserBlock,
    UserMessage,
)
from mlxvlm.api.base import parse
from mlxvlm.api.messages import TextContent
from mlxvlm.api.naming import named
from mlxvlm.api.sampling import SamplingFields
from mlxvlm.api.schema import ChatCompletionRequest, search_options
from mlxvlm.api.turns import Shown, Turns, picture
from mlxvlm.errors import RequestError

# A chat request's fields by their names here.
NAMES: Mapping[str, str] = {
    "response_format": "output_config.format",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "web_search_options": "tools",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_ERROR = "Error: "  # before what a tool that failed returned, as the loop of agent/ writes it


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """Raises RequestError in this API's words."""
    turns = Turns(joins_users=True)
    if body.system:
        turns.instruct(_text(body.system))
    for index, message in enumerate(body.messages):
        _add(turns, message, f"messages[{index}]")
    if isinstance(body.messages[-1], AssistantMessage):
        raise RequestError(
            "the last message must be the user's: an assistant's can't be gone on with",
            f"messages[{len(body.messages) - 1}]",
        )
    choice = body.tool_choice
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": turns.messages(),
        "tools": _tools(body),
        "tool_choice": _choice(body),
        "web_search_options": _search(body),
        "parallel_tool_calls": not (choice is not None and choice.disable_parallel_tool_use),
        "response_format": _format(body),
        "reasoning_effort": None if body.output_config is None else body.output_config.effort,
    }
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in SamplingFields.model_fields}
        limits = {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences, "stream": bool(body.stream)}
        fields |= limits
    with named(NAMES):
        return parse(ChatCompletionRequest, fields)


def _add(turns: Turns, message: Message, path: str) -> None:
    if isinstance(message, SystemMessage):
        turns.instruct(_text(message.content))
    elif isinstance(message, UserMessage):
        _ask(turns, message.content, path)
    elif isinstance(message.content, str):
        turns.answer(message.content)
    else:
        for block in message.content:
            if isinstance(block, TextBlock):
                turns.answer(block.text)
            elif isinstance(block, ToolUseBlock):
                turns.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))


def _ask(turns: Turns, content: str | Sequence[UserBlock], path: str) -> None:
    """Results come first in what the model reads, wherever they stand: they belong to its calls."""
    if isinstance(content, str):
        turns.ask([TextContent(type="text", text=content)])
        return
    for index, block in enumerate(content):
        if isinstance(block, ToolResultBlock):
            if not turns.is_called(block.tool_use_id):
                where = f"{path}.content[{index}].tool_use_id"
                raise RequestError(f"{where} names a tool_use that no message before it has", where)
            turns.result(block.tool_use_id, _result(block))
    shown = [_shown(block) for block in content if not isinstance(block, ToolResultBlock)]
    if shown:
        turns.ask(shown)


def _result(block: ToolResultBlock) -> str | list[Shown]:
    head = _ERROR if block.is_error else ""
    if block.content is None or isinstance(block.content, str):
        return head + (block.content or "")
    shown = [_shown(each) for each in block.content]
    return [TextContent(type="text", text=head.strip()), *shown] if head else shown


def _shown(block: TextBlock | ImageBlock) -> Shown:
    if isinstance(block, TextBlock):
        return TextContent(type="text", text=block.text)
    source = block.source
    # As a URL: base64 text alone might be taken for a path.
    return picture(f"data:{source.media_type};base64,{source.data}" if isinstance(source, Base64Source) else source.url)


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tools(body: CountTokensRequest) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in body.tools or ()
        if isinstance(tool, Tool)
    ]


def _search(body: CountTokensRequest) -> dict[str, Any] | None:
    search = next((tool for tool in body.tools or () if isinstance(tool, SearchTool)), None)
    return None if search is None else search_options(search.user_location, max_uses=search.max_uses)


def _choice(body: CountTokensRequest) -> Any:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise RequestError("tool_choice needs the tool's name", "tool_choice.name", "missing_required_parameter")
    is_search = any(isinstance(tool, SearchTool) and tool.name == choice.name for tool in body.tools or ())
    return {"type": "function", "function": {"name": SEARCH_NAME if is_search else choice.name}}


def _format(body: CountTokensRequest) -> dict[str, Any] | None:
    form = None if body.output_config is None else body.output_config.format
    if form is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form.schema_}}
