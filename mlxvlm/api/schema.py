"""The body of POST /v1/chat/completions.

One rule: a field is honoured, or refused by name. The few that OpenAI has and that have nothing to act on in a local
server are taken and passed over: IGNORED_FIELDS names them and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from mlxvlm.agent.web_search import MAX_PLACE_CHARS
from mlxvlm.api.base import Body
from mlxvlm.api.messages import MAX_MESSAGES, ChatMessage
from mlxvlm.api.sampling import MAX_TOKENS, SamplingFields
from mlxvlm.api.tools import MAX_TOOLS, ResponseFormat, Tool, ToolChoice
from mlxvlm.engine.params import MAX_TOP_LOGPROBS

MAX_MODEL_CHARS = 1024  # a path
MAX_LABEL_CHARS = 512
MAX_METADATA = 16  # OpenAI's limit
MAX_TEMPLATE_VARIABLES = 64
MAX_SEARCHES = 10_000  # no answer has so many

# Fields that are checked and then passed over, with the reason.
IGNORED_FIELDS: Mapping[str, str] = {
    "user": "accounts and abuse detection are a cloud's",
    "metadata": "nothing is stored that it could describe",
    "service_tier": "there is one tier",
    "safety_identifier": "accounts and abuse detection are a cloud's",
    "prompt_cache_key": "the prefix cache finds what prompts share by itself",
    "prompt_cache_retention": "the prefix cache keeps what fits, the least recently used goes first",
    "verbosity": "these models were not trained to follow it: say it in a message",
    "stream_options.include_obfuscation": "padding against eavesdroppers is a matter of the network in between",
    "messages[].name": "the chat templates of these models have no place for it",
    "messages[].content[].image_url.detail": "a model's pictures have one resolution; see min_pixels and max_pixels",
    "response_format.json_schema.name": "the schema alone binds the answer; so with its description",
}


def _ignored(name: str, **limits: Any) -> Any:
    return Field(None, description=f"Ignored: {IGNORED_FIELDS[name]}.", **limits)


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")
    include_obfuscation: bool | None = _ignored("stream_options.include_obfuscation")


class Place(Body):
    """As far as it is told."""

    country: str | None = Field(None, max_length=MAX_PLACE_CHARS)
    region: str | None = Field(None, max_length=MAX_PLACE_CHARS)
    city: str | None = Field(None, max_length=MAX_PLACE_CHARS)
    timezone: str | None = Field(None, max_length=MAX_PLACE_CHARS)


class UserLocation(Body):
    """Roughly where the user is."""

    type: Literal["approximate"]
    approximate: Place


class WebSearchOptions(Body):
    """Lets the model search the web, on a server that was started with it."""

    search_context_size: Literal["low", "medium", "high"] | None = Field(
        None, description="How much of pages it reads."
    )
    user_location: UserLocation | None = None
    max_uses: int | None = Field(None, ge=1, le=MAX_SEARCHES, description="Extension. Most searches of an answer.")


def search_options(place: Place | None, size: str | None = None, max_uses: int | None = None) -> dict[str, Any]:
    """WebSearchOptions from the tools of other APIs, which name a place without a nested object."""
    told = None if place is None else place.model_dump(include=set(Place.model_fields))
    location = None if told is None else {"type": "approximate", "approximate": told}
    return {"search_context_size": size, "user_location": location, "max_uses": max_uses}


class ChatCompletionRequest(SamplingFields):
    """A chat to go on with. Null always means "not given"."""

    messages: list[ChatMessage] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True, description="The chat so far, in order."
    )
    model: str = Field("default", max_length=MAX_MODEL_CHARS, description="A name of /v1/models, or `default`.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Most tokens of an answer; left out: as many as fit."
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Tell the model's probability of each token of the answer.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="With logprobs: that many likeliest tokens at each place."
    )
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="With stream: {'include_usage': true}.")
    response_format: ResponseFormat | None = Field(
        None, description="`text`, `json_object`, or `json_schema` with a schema that the answer is bound to."
    )
    tools: list[Tool] | None = Field(
        None, max_length=MAX_TOOLS, fail_fast=True, description="Functions that the model may ask for."
    )
    tool_choice: ToolChoice | None = Field(
        None, description="`none`, `auto`, `required`, one function by name, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    web_search_options: WebSearchOptions | None = Field(
        None, description="Let the model search the web; needs a server with --enable-search."
    )
    reasoning_effort: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        None, description="Handed to the chat template under this name."
    )
    enable_thinking: bool | None = Field(None, description="Extension. Handed to the chat template under this name.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=MAX_TEMPLATE_VARIABLES, description="Extension. More variables for the chat template."
    )
    truncate_sequence: bool | None = Field(
        None, description="Extension. Drop the oldest turns of a chat that does not fit into the context."
    )
    modalities: list[Literal["text"]] | None = Field(None, max_length=1, description="Only ['text'].")
    store: Literal[False] | None = Field(None, description="Only false: nothing is stored.")
    user: str | None = _ignored("user", max_length=MAX_LABEL_CHARS)
    metadata: dict[str, str] | None = _ignored("metadata", max_length=MAX_METADATA)
    service_tier: str | None = _ignored("service_tier", max_length=MAX_LABEL_CHARS)
    safety_identifier: str | None = _ignored("safety_identifier", max_length=MAX_LABEL_CHARS)
    prompt_cache_key: str | None = _ignored("prompt_cache_key", max_length=MAX_LABEL_CHARS)
    prompt_cache_retention: str | None = _ignored("prompt_cache_retention", max_length=MAX_LABEL_CHARS)
    verbosity: Literal["low", "medium", "high"] | None = _ignored("verbosity")
