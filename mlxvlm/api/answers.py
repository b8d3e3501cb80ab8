"""The bodies of answers, in OpenAI's shape with mistral.rs's names for speeds."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypedDict

from pydantic import BaseModel, Field

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


def _if_any(description: str | None = None) -> Any:
    """A field that is left out, not null, where there is nothing to tell."""
    return Field(None, exclude_if=lambda value: value is None, description=description)


class TokenText(TypedDict):
    """A token as it is shown."""

    token: str
    bytes: list[int]


class TopLogprob(BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that was chosen; natural logarithms, of the model's own probabilities."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """One entry for each token of the answer, without the end token."""

    content: list[TokenLogprob] | None
    refusal: None = None


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="Taken from the prefix cache.")
    image_tokens: int
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """Of the answers' tokens."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(BaseModel):
    """Counts as OpenAI's: the prompt once, the answers of all choices. Seconds are the slowest choice's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    avg_tok_per_sec: float = Field(description="All tokens, by the total time.")
    avg_prompt_tok_per_sec: float = Field(description="Prompt tokens that had to be run, by the prompt's time.")
    avg_compl_tok_per_sec: float = Field(description="Tokens of all answers but their first, by their time.")
    total_time_sec: float
    total_prompt_time_sec: float
    total_completion_time_sec: float
    time_to_first_token_sec: float


class CalledFunction(BaseModel):
    """The name and the arguments as JSON text; of a chunk, a piece of them."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class UrlCitation(BaseModel):
    """A source of the web, and the characters [start_index, end_index) of the content that name it."""

    url: str
    title: str
    start_index: int
    end_index: int


class Annotation(BaseModel):
    """What a place of the content rests on."""

    type: Literal["url_citation"] = "url_citation"
    url_citation: UrlCitation


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[MessageToolCall] | None = _if_any()
    annotations: list[Annotation] | None = _if_any("After a web search: the sources that the content names.")


class Choice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = _if_any("With return_token_ids: the end token included.")


class ChatCompletion(BaseModel):
    """The whole answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[int] | None = _if_any("With return_token_ids: placeholders expanded.")


class CalledFunctionDelta(BaseModel):
    """A piece of a call."""

    name: str | None = _if_any()
    arguments: str


class ToolCallDelta(BaseModel):
    """A piece of a call; the first of an index has its id, type and name."""

    index: int
    id: str | None = _if_any()
    type: Literal["function"] | None = _if_any()
    function: CalledFunctionDelta


class ChunkDelta(BaseModel):
    """What is new."""

    role: Literal["assistant"] | None = _if_any()
    content: str | None = _if_any()
    tool_calls: list[ToolCallDelta] | None = _if_any()
    annotations: list[Annotation] | None = _if_any("After a web search, at the end of the answer.")


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChunkDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = _if_any("With return_token_ids.")
    stop_string: str | None = Field(default=None, exclude=True, description="For APIs that tell it.")


class ChatCompletionChunk(BaseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = _if_any("With stream_options.include_usage, in the last chunk, which has no choices.")
    prompt_token_ids: list[int] | None = _if_any("With return_token_ids, in the first chunk.")


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error, and the event that ends a stream which fails."""

    error: Error


class ModelCard(BaseModel):
    """A model that requests can name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlxvlm"
    status: str = Field(default="loaded", description="loaded, loading or unloaded.")


class ModelList(BaseModel):
    """All models that requests can name."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
