"""What a request to the Responses API may hold as input: messages, calls and their results. Knows their shape only.

Source: https://platform.openai.com/docs/api-reference/responses, and the types of the `openai` package.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, Tag

from mlxvlm.api.base import Returned, by, one_of, text_or
from mlxvlm.api.messages import MAX_NAME_CHARS, MAX_PARTS

_PICTURE = "a picture is {'type': 'input_image', 'image_url': ...}"
_PARTS_INSTEAD = {
    "text": "it belongs to chat completions; here a text is {'type': 'input_text', 'text': ...}",
    "image_url": f"it belongs to chat completions; here {_PICTURE}",
    "output_text": "it belongs into messages of the assistant; here a text is {'type': 'input_text', 'text': ...}",
    "input_file": f"send its text, or pictures of its pages: {_PICTURE}",
    "input_audio": "these models hear nothing",
}
_ANSWERS_INSTEAD = {
    "input_text": "it belongs into messages of the user; here a text is {'type': 'output_text', 'text': ...}",
    "input_image": "pictures belong into messages of the user",
}
_ITEMS_INSTEAD = {
    "item_reference": "send the item itself, or previous_response_id",
    "compaction": "send the items themselves",
}

_Id: TypeAlias = Annotated[str, Field(max_length=MAX_NAME_CHARS, description="Of an earlier answer; ignored.")]
_Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class InputText(Returned):
    """A piece of text."""

    type: Literal["input_text"]
    text: str


class InputImage(Returned):
    """A picture, at its place among the texts."""

    type: Literal["input_image"]
    image_url: str = Field(min_length=1, description="http(s) URL, data: URL, base64 text, file:// URL or local path.")
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description="Ignored.")


class OutputText(Returned):
    """What the model said earlier."""

    type: Literal["output_text"]
    text: str
    annotations: list[object] | None = Field(None, max_length=MAX_PARTS, fail_fast=True)
    logprobs: list[object] | None = None


class Refusal(Returned):
    """What the model refused with earlier."""

    type: Literal["refusal"]
    refusal: str


InputPart: TypeAlias = Annotated[
    Annotated[InputText, Tag("<input_text>")] | Annotated[InputImage, Tag("<input_image>")],
    by("type"),
    one_of("type", "input_text", "input_image", remedies=_PARTS_INSTEAD),
]
OutputPart: TypeAlias = Annotated[
    Annotated[OutputText, Tag("<output_text>")] | Annotated[Refusal, Tag("<refusal>")],
    by("type"),
    one_of("type", "output_text", "refusal", remedies=_ANSWERS_INSTEAD),
]
_Inputs: TypeAlias = Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]
_Outputs: TypeAlias = Annotated[list[OutputPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class _Message(Returned):
    type: Literal["message"] = "message"
    id: _Id | None = None
    status: _Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class AskedMessage(_Message):
    """What the user says and shows."""

    role: Literal["user"]
    content: Annotated[Annotated[str, Tag("<text>")] | Annotated[_Inputs, Tag("<parts>")], text_or("parts")]


class InstructingMessage(_Message):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Annotated[Annotated[str, Tag("<text>")] | Annotated[_Inputs, Tag("<parts>")], text_or("parts")]


class AnswerMessage(_Message):
    """What the model said earlier."""

    role: Literal["assistant"]
    content: Annotated[Annotated[str, Tag("<text>")] | Annotated[_Outputs, Tag("<parts>")], text_or("parts")]


Message: TypeAlias = Annotated[
    Annotated[AskedMessage, Tag("<user>")]
    | Annotated[InstructingMessage, Tag("<system>")]
    | Annotated[InstructingMessage, Tag("<developer>")]
    | Annotated[AnswerMessage, Tag("<assistant>")],
    by("role"),
    one_of("role", "user", "system", "developer", "assistant"),
]


class FunctionCall(Returned):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=MAX_NAME_CHARS)
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    arguments: str
    id: _Id | None = None
    status: _Status | None = None


class FunctionCallOutput(Returned):
    """What a function returned: text, or texts and pictures."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=MAX_NAME_CHARS, description="The call_id of the call that this answers.")
    output: Annotated[Annotated[str, Tag("<text>")] | Annotated[_Inputs, Tag("<parts>")], text_or("parts")]
    id: _Id | None = None
    status: _Status | None = None


class Reasoning(Returned):
    """Of another server's earlier answer; ignored."""

    type: Literal["reasoning"]
    id: _Id | None = None
    summary: list[object] | None = Field(None, max_length=MAX_PARTS, fail_fast=True)
    content: list[object] | None = Field(None, max_length=MAX_PARTS, fail_fast=True)
    encrypted_content: str | None = None
    status: _Status | None = None


Item: TypeAlias = Annotated[
    Annotated[Message, Tag("<message>")]
    | Annotated[FunctionCall, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[Reasoning, Tag("<reasoning>")],
    by("type", "message"),
    one_of(
        *("type", "message", "function_call", "function_call_output", "reasoning"),
        remedies=_ITEMS_INSTEAD,
        default="message",
    ),
]
