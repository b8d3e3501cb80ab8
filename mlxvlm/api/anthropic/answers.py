"""The bodies and events of Anthropic's Messages API. Source: the types of the `anthropic` package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Citation(BaseModel):
    """A source of the web that a text names. What of it is not told: the server keeps no results."""

    type: Literal["web_search_result_location"] = "web_search_result_location"
    url: str
    title: str
    cited_text: str = ""
    encrypted_index: str = ""


class TextBlock(BaseModel):
    """What the model said."""

    type: Literal["text"] = "text"
    text: str
    citations: list[Citation] | None = None


class ToolUseBlock(BaseModel):
    """A call that the model asks for."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


Block: TypeAlias = TextBlock | ToolUseBlock


class Usage(BaseModel):
    """Counts. What was taken from the prefix cache is not among the input_tokens."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class Message(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: Usage


class TokenCount(BaseModel):
    """How long a prompt is."""

    input_tokens: int


class MessageStart(BaseModel):
    """The message, before anything is said."""

    type: Literal["message_start"] = "message_start"
    message: Message


class Ping(BaseModel):
    """Nothing."""

    type: Literal["ping"] = "ping"


class BlockStart(BaseModel):
    """A block begins."""

    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Block


class TextDelta(BaseModel):
    """A piece of text."""

    type: Literal["text_delta"] = "text_delta"
    text: str


class InputDelta(BaseModel):
    """A piece of an input's JSON."""

    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class CitationsDelta(BaseModel):
    """A source of a text."""

    type: Literal["citations_delta"] = "citations_delta"
    citation: Citation


class BlockDelta(BaseModel):
    """A piece of a block."""

    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: TextDelta | InputDelta | CitationsDelta


class BlockStop(BaseModel):
    """A block ends."""

    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class Stopped(BaseModel):
    """Why the answer ends."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """How the message ends, and what it took."""

    type: Literal["message_delta"] = "message_delta"
    delta: Stopped
    usage: Usage


class MessageStop(BaseModel):
    """The end."""

    type: Literal["message_stop"] = "message_stop"


Event: TypeAlias = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop

# Source: https://docs.anthropic.com/en/api/errors
_ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessagesError(BaseModel):
    """What went wrong."""

    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """The body of every error, and the event that ends a stream which fails."""

    type: Literal["error"] = "error"
    error: MessagesError


def error_of(status: int, message: str) -> MessagesErrorBody:
    """Of an HTTP status."""
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return MessagesErrorBody(error=MessagesError(type=kind, message=message))
