"""The body of POST /v1/responses. The rule for fields is that of chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from mlxvlm.api.base import Body, Returned, by, one_of, text_or
from mlxvlm.api.messages import MAX_MESSAGES
from mlxvlm.api.responses.items import Item
from mlxvlm.api.sampling import MAX_TOKENS, SamplingFields
from mlxvlm.api.schema import MAX_LABEL_CHARS, MAX_METADATA, MAX_MODEL_CHARS, MAX_TEMPLATE_VARIABLES, Place
from mlxvlm.api.tools import MAX_DESCRIPTION_CHARS, MAX_TOOLS, NAME_PATTERN, JsonObjectFormat, JsonSchema, TextFormat
from mlxvlm.engine.params import MAX_TOP_LOGPROBS

MAX_ID_CHARS = 64
LOGPROBS = "message.output_text.logprobs"  # of `include`
# Fields that are checked and then passed over, with the reason.
IGNORED_FIELDS: Mapping[str, str] = {
    "user": "accounts and abuse detection are a cloud's",
    "service_tier": "there is one tier",
    "safety_identifier": "accounts and abuse detection are a cloud's",
    "prompt_cache_key": "the prefix cache finds what prompts share by itself",
    "prompt_cache_retention": "the prefix cache keeps what fits, the least recently used goes first",
    "stream_options": "padding against eavesdroppers is a matter of the network in between",
}
_FUNCTIONS_ONLY = dict.fromkeys(
    (
        *("file_search", "computer_use_preview", "computer", "code_interpreter", "image_generation"),
        *("local_shell", "shell", "apply_patch", "custom"),
    ),
    "give a function: {'type': 'function', 'name': ..., 'parameters': ...}",
) | {"mcp": "the server has MCP servers of its own: start it with --mcp-config, then their tools are offered to all"}
# The versions differ in what this server has no use for.
_SEARCHES = ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11")
_Search: TypeAlias = Literal[
    "web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"
]
_Name: TypeAlias = Annotated[str, Field(pattern=NAME_PATTERN)]


def _ignored(name: str) -> Any:
    return Field(None, max_length=MAX_LABEL_CHARS, description=f"Ignored: {IGNORED_FIELDS[name]}.")


def _kind_of(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "search" if kind in _SEARCHES else str(kind)


class FunctionTool(Returned):
    """A function that the model may ask for."""

    type: Literal["function"]
    name: _Name
    description: str | None = Field(None, max_length=MAX_DESCRIPTION_CHARS)
    parameters: dict[str, Any] = Field(default_factory=dict, description="JSON schema of the arguments.")
    strict: bool | None = Field(None, description="Arguments are bound to the schema exactly; left out: they are not.")


class UserPlace(Place, Returned):
    """Roughly where the user is."""

    type: Literal["approximate"] | None = None


class SearchTool(Returned):
    """Lets the model search the web, on a server that was started with it."""

    type: _Search
    search_context_size: Literal["low", "medium", "high"] | None = Field(
        None, description="How much of pages it reads."
    )
    user_location: UserPlace | None = None
    external_web_access: Literal[True] | None = Field(None, description="Only true: searches are live.")


class SearchChoice(Returned):
    """A search of the web comes first."""

    type: _Search


class NamedTool(Returned):
    """The name of one of the request's functions."""

    type: Literal["function"]
    name: _Name


class AllowedTools(Returned):
    """Some of the request's functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Annotated[NamedTool, one_of("type", "function", remedies=_FUNCTIONS_ONLY)]] = Field(
        min_length=1, max_length=MAX_TOOLS, fail_fast=True
    )


_ToolObject: TypeAlias = Annotated[
    Annotated[NamedTool, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")]
    | Annotated[SearchChoice, Tag("<search>")],
    Discriminator(lambda value: f"<{_kind_of(value)}>"),
    one_of("type", "function", "allowed_tools", *_SEARCHES, remedies=_FUNCTIONS_ONLY),
]
Tool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[SearchTool, Tag("<search>")],
    Discriminator(lambda value: f"<{_kind_of(value)}>"),
    one_of("type", "function", *_SEARCHES, remedies=_FUNCTIONS_ONLY),
]
ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[_ToolObject, Tag("<object>")],
    text_or("object"),
]


class JsonSchemaFormat(JsonSchema):
    """JSON after a schema."""

    type: Literal["json_schema"]


class TextConfig(Body):
    """What the answer's text must look like."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
            by("type"),
            one_of("type", "text", "json_object", "json_schema"),
        ]
        | None
    ) = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Ignored.")


class Reasoning(Body):
    """How much to think first, for models that do."""

    effort: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        None, description="Handed to the chat template as `reasoning_effort`."
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="Ignored: answers are not parted.")
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="summary's older name.")


class StreamOptions(Body):
    """What a stream does beside telling the answer."""

    include_obfuscation: bool | None = None


class ResponsesRequest(SamplingFields):
    """Something to answer. Null always means "not given"."""

    input: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[
            Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)], Tag("<items>")
        ],
        text_or("items"),
    ] = Field(description="What the user says, or items: messages, function calls and their outputs, in order.")
    model: str = Field("default", max_length=MAX_MODEL_CHARS, description="A name of /v1/models, or `default`.")
    instructions: str | None = Field(None, description="A system message for this answer alone, before all others.")
    previous_response_id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = Field(
        None, description="A stored response that this one goes on from: what it saw and said comes first."
    )
    store: bool | None = Field(None, description="false: nothing is kept; left out: the response is, for a while.")
    background: bool | None = Field(None, description="Answer at once with the response's id, and generate meanwhile.")
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    max_output_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Most tokens of the answer; left out: as many as fit."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="`auto`: drop the oldest turns of what does not fit into the context."
    )
    text: TextConfig | None = Field(
        None, description="`format`: text, json_object, or json_schema with a schema that the answer is bound to."
    )
    tools: list[Tool] | None = Field(
        None,
        max_length=MAX_TOOLS,
        fail_fast=True,
        description="Functions that the model may ask for; and web_search, on a server with --enable-search.",
    )
    tool_choice: ToolChoice | None = Field(
        None, description="`none`, `auto`, `required`, one function by name, {'type': 'web_search'}, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    include: (
        list[Literal["message.output_text.logprobs", "message.input_image.image_url", "reasoning.encrypted_content"]]
        | None
    ) = Field(None, max_length=MAX_METADATA, description=f"`{LOGPROBS}`; others have nothing to add here.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description=f"With `{LOGPROBS}`: that many likeliest tokens at each place."
    )
    metadata: dict[str, Annotated[str, Field(max_length=MAX_LABEL_CHARS)]] | None = Field(
        None, max_length=MAX_METADATA, description="Kept with the response."
    )
    reasoning: Reasoning | None = Field(None, description="`effort` is handed to the chat template.")
    enable_thinking: bool | None = Field(None, description="Extension. Handed to the chat template under this name.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=MAX_TEMPLATE_VARIABLES, description="Extension. More variables for the chat template."
    )
    n: Literal[1] | None = Field(None, description="Only 1.")
    return_token_ids: Literal[False] | None = Field(None, description="Only false: this API has no place for them.")
    stream_options: StreamOptions | None = Field(None, description=f"Ignored: {IGNORED_FIELDS['stream_options']}.")
    user: str | None = _ignored("user")
    service_tier: str | None = _ignored("service_tier")
    safety_identifier: str | None = _ignored("safety_identifier")
    prompt_cache_key: str | None = _ignored("prompt_cache_key")
    prompt_cache_retention: str | None = _ignored("prompt_cache_retention")
