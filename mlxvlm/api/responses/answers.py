"""The bodies and events of the Responses API. Source: the types of the `openai` package."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel

from mlxvlm.api import answers
from mlxvlm.api.answers import TokenLogprob
from mlxvlm.api.responses.items import InputText
from mlxvlm.api.responses.request import TextConfig, Tool, ToolChoice

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]
Status: TypeAlias = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class UrlCitation(answers.UrlCitation):
    """A source of the web, and the characters [start_index, end_index) of the text that name it."""

    type: Literal["url_citation"] = "url_citation"


class OutputText(BaseModel):
    """A text of the answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[UrlCitation] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(BaseModel):
    """What the model said."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem: TypeAlias = OutputMessage | OutputCall


class InputTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int
    image_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Of the answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Counts as OpenAI's, and the speeds of chat completions."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    avg_tok_per_sec: float
    avg_prompt_tok_per_sec: float
    avg_compl_tok_per_sec: float
    total_time_sec: float
    total_prompt_time_sec: float
    total_completion_time_sec: float
    time_to_first_token_sec: float


class ResponseError(BaseModel):
    """Why there is no answer."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why there is no more of an answer."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ReasoningShown(BaseModel):
    """As it was asked for."""

    effort: str | None = None
    summary: None = None


class Response(BaseModel):
    """An answer, and what was asked."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningShown
    store: bool
    temperature: float | None
    text: TextConfig
    tool_choice: ToolChoice
    tools: list[Tool]
    top_logprobs: int | None
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    metadata: dict[str, str]


class ResponseEvent(BaseModel):
    """response.created, .in_progress, .completed, .incomplete and .failed: the response as it is then."""

    type: str
    sequence_number: int
    response: Response


class ItemEvent(BaseModel):
    """response.output_item.added and .done."""

    type: str
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(BaseModel):
    """response.content_part.added and .done."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText


class TextDelta(BaseModel):
    """A piece of text."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(BaseModel):
    """A whole text."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[TokenLogprob]


class AnnotationAdded(BaseModel):
    """A place of a text that rests on a source."""

    type: Literal["response.output_text.annotation.added"] = "response.output_text.annotation.added"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    annotation_index: int
    annotation: UrlCitation


class ArgumentsDelta(BaseModel):
    """A piece of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(BaseModel):
    """A call's whole arguments."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


Event: TypeAlias = (
    ResponseEvent | ItemEvent | PartEvent | TextDelta | TextDone | AnnotationAdded | ArgumentsDelta | ArgumentsDone
)


class ShownImage(BaseModel):
    """A picture of an input. image_url: None where it is longer than an address."""

    type: Literal["input_image"] = "input_image"
    image_url: str | None
    detail: str = "auto"
    file_id: None = None


class InputMessage(BaseModel):
    """A message of an input."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    status: Literal["completed"] = "completed"
    content: list[InputText | ShownImage]


class CallOutput(BaseModel):
    """A function's output."""

    id: str
    type: Literal["function_call_output"] = "function_call_output"
    call_id: str
    status: Literal["completed"] = "completed"
    output: str | list[InputText | ShownImage]


InputItem: TypeAlias = InputMessage | CallOutput | OutputMessage | OutputCall


class ItemList(BaseModel):
    """What a response was asked, a page of it."""

    object: Literal["list"] = "list"
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A response that is no more."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
