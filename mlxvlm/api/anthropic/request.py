"""The bodies of POST /v1/messages and /v1/messages/count_tokens. The rule for fields is that of chat completions.

Source: https://docs.anthropic.com/en/api/messages, and the types of the `anthropic` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, Tag

from mlxvlm.api.base import Body, Returned, by, one_of, text_or
from mlxvlm.api.messages import MAX_MESSAGES, MAX_NAME_CHARS, MAX_PARTS
from mlxvlm.api.sampling import MAX_STOP_CHARS, MAX_TOKENS, SamplingFields
from mlxvlm.api.schema import MAX_LABEL_CHARS, MAX_METADATA, MAX_MODEL_CHARS, MAX_SEARCHES, Place
from mlxvlm.api.tools import MAX_DESCRIPTION_CHARS, MAX_TOOLS, NAME_PATTERN
from mlxvlm.engine.params import MAX_STOP_STRINGS

# Fields that are checked and then passed over, with the reason.
IGNORED_FIELDS: Mapping[str, str] = {
    "metadata": "accounts and abuse detection are a cloud's",
    "service_tier": "there is one tier",
    "thinking": "these models don't think apart from their answers",
    "cache_control": "the prefix cache finds what prompts share by itself",
}
_BLOCKS_INSTEAD = {
    "image_url": "a picture is {'type': 'image', 'source': {'type': 'url', 'url': ...}}",
    "document": "send its text, or pictures of its pages as image",
    "search_result": "send its text",
    "server_tool_use": "what the server's tools did is not told, so leave it out",
    "web_search_tool_result": "send its text",
}
_IN_USER = dict.fromkeys(("image", "tool_result"), "it belongs into messages of the user")
_SERVER_TOOLS = (
    "the server's tools here are web_search_20250305 and those of --mcp-config; others are the client's: "
    "{'name': ..., 'input_schema': ...}"
)
_Cache: TypeAlias = Annotated[
    dict[str, Any], Field(max_length=MAX_METADATA, description=f"Ignored: {IGNORED_FIELDS['cache_control']}.")
]
_Objects: TypeAlias = Annotated[list[object], Field(max_length=MAX_PARTS, fail_fast=True)]


class TextBlock(Returned):
    """A piece of text."""

    type: Literal["text"]
    text: str
    cache_control: _Cache | None = None
    citations: _Objects | None = None


class Base64Source(Returned):
    """A picture in the request. What it holds decides, not the type that it names."""

    type: Literal["base64"]
    media_type: Annotated[str, Field(pattern=r"^image/[a-z0-9.+-]{1,64}$")]
    data: str = Field(min_length=1)


class URLSource(Returned):
    """A picture elsewhere."""

    type: Literal["url"]
    url: str = Field(min_length=1)


class ImageBlock(Returned):
    """A picture, at its place among the texts."""

    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")] | Annotated[URLSource, Tag("<url>")],
        by("type"),
        one_of("type", "base64", "url", remedies={"file": "files are not kept here: send it as base64 or url"}),
    ]
    cache_control: _Cache | None = None


class ToolUseBlock(Returned):
    """A call that the model made earlier."""

    type: Literal["tool_use"]
    id: str = Field(max_length=MAX_NAME_CHARS)
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    input: dict[str, Any]
    cache_control: _Cache | None = None


Shown: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")],
    by("type"),
    one_of("type", "text", "image", remedies=_BLOCKS_INSTEAD),
]
_Shown: TypeAlias = Annotated[list[Shown], Field(max_length=MAX_PARTS, fail_fast=True)]


class ToolResultBlock(Returned):
    """What a tool returned: text, or texts and pictures."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=MAX_NAME_CHARS, description="The id of the tool_use that this answers.")
    content: Annotated[Annotated[str, Tag("<text>")] | Annotated[_Shown, Tag("<blocks>")], text_or("blocks")] | None = (
        None
    )
    is_error: bool | None = None
    cache_control: _Cache | None = None


class ThinkingBlock(Returned):
    """Of another server's earlier answer; ignored."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Returned):
    """Of another server's earlier answer; ignored."""

    type: Literal["redacted_thinking"]
    data: str


UserBlock: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    by("type"),
    one_of("type", "text", "image", "tool_result", remedies=_BLOCKS_INSTEAD),
]
AssistantBlock: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")],
    by("type"),
    one_of("type", "text", "tool_use", "thinking", "redacted_thinking", remedies=_BLOCKS_INSTEAD | _IN_USER),
]
_Texts: TypeAlias = Annotated[
    list[Annotated[TextBlock, one_of("type", "text", remedies=_BLOCKS_INSTEAD | _IN_USER)]],
    Field(max_length=MAX_PARTS, fail_fast=True),
]
System: TypeAlias = Annotated[Annotated[str, Tag("<text>")] | Annotated[_Texts, Tag("<blocks>")], text_or("blocks")]


class UserMessage(Returned):
    """What the user says and shows, and what tools returned."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[Annotated[list[UserBlock], Field(max_length=MAX_PARTS, fail_fast=True)], Tag("<blocks>")],
        text_or("blocks"),
    ]


class AssistantMessage(Returned):
    """What the model said and called earlier."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[Annotated[list[AssistantBlock], Field(max_length=MAX_PARTS, fail_fast=True)], Tag("<blocks>")],
        text_or("blocks"),
    ]


class SystemMessage(Returned):
    """Instructions in the middle of a chat."""

    role: Literal["system"]
    content: System


Message: TypeAlias = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    by("role"),
    one_of("role", "user", "assistant", "system"),
]


class Tool(Returned):
    """A function that the model may ask for."""

    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = Field(None, max_length=MAX_DESCRIPTION_CHARS)
    input_schema: dict[str, Any] = Field(description="JSON schema of the input.")
    strict: bool | None = Field(None, description="The input is bound to the schema exactly.")
    cache_control: _Cache | None = None
    eager_input_streaming: bool | None = Field(None, description="Ignored: input is streamed as soon as it is sure.")


class UserPlace(Place, Returned):
    """Roughly where the user is."""

    type: Literal["approximate"]


class SearchTool(Returned):
    """Lets the model search the web, on a server that was started with it."""

    type: Literal["web_search_20250305"]
    name: Literal["web_search"]
    max_uses: int | None = Field(None, ge=1, le=MAX_SEARCHES, description="Most searches of an answer.")
    user_location: UserPlace | None = None
    cache_control: _Cache | None = None


class ToolChoice(Returned):
    """Which tools the model may or must use."""

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = Field(None, description="With `tool`.")
    disable_parallel_tool_use: bool | None = Field(None, description="At most one tool use in an answer.")


AnyTool: TypeAlias = Annotated[
    Annotated[Tool, Tag("<custom>")] | Annotated[SearchTool, Tag("<web_search_20250305>")],
    by("type", "custom"),
    one_of("type", "custom", "web_search_20250305", default="custom", other=_SERVER_TOOLS),
]


class OutputFormat(Body):
    """JSON after a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the answer must look like."""

    format: OutputFormat | None = None
    effort: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        None, description="Handed to the chat template as `reasoning_effort`."
    )


class CountTokensRequest(Body):
    """A chat whose length is asked for. Null always means "not given"."""

    model: str = Field(max_length=MAX_MODEL_CHARS, description="A name of /v1/models, or `default`.")
    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description="The chat so far; the last turn is the user's.",
    )
    system: System | None = Field(None, description="Instructions: a text, or text blocks.")
    tools: list[AnyTool] | None = Field(
        None,
        max_length=MAX_TOOLS,
        fail_fast=True,
        description="Functions that the model may ask for; and web_search_20250305, on a server with --enable-search.",
    )
    tool_choice: ToolChoice | None = Field(None, description="`auto`, `any`, `tool` with a name, or `none`.")
    output_config: OutputConfig | None = Field(None, description="`format`: a JSON schema that binds the answer.")
    thinking: dict[str, Any] | None = Field(
        None, max_length=MAX_METADATA, description=f"Ignored: {IGNORED_FIELDS['thinking']}."
    )
    cache_control: _Cache | None = Field(None, description=f"Ignored: {IGNORED_FIELDS['cache_control']}.")


class MessagesRequest(CountTokensRequest, SamplingFields):
    """A chat to go on with."""

    max_tokens: int = Field(ge=1, le=MAX_TOKENS, description="Most tokens of the answer.")
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None = Field(
        None, max_length=MAX_STOP_STRINGS, fail_fast=True, description="The answer ends before the first of these."
    )
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    metadata: dict[str, Any] | None = Field(
        None, max_length=MAX_METADATA, description=f"Ignored: {IGNORED_FIELDS['metadata']}."
    )
    service_tier: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        None, description=f"Ignored: {IGNORED_FIELDS['service_tier']}."
    )
    stop: None = Field(None, description="Its name is stop_sequences here.")
    n: Literal[1] | None = Field(None, description="Only 1.")
    return_token_ids: Literal[False] | None = Field(None, description="Only false: this API has no place for them.")
