"""The messages of a chat request. Knows their shape, not what becomes of them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, Tag

from mlxvlm.api.base import Body, by, one_of, text_or

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOL_CALLS = 128
MAX_NAME_CHARS = 256

_PICTURE = "a picture is {'type': 'image_url', 'image_url': {'url': ...}}"
_PARTS_INSTEAD = {
    "input_text": "it belongs to the Responses API; here a text is {'type': 'text', 'text': ...}",
    "input_image": f"it belongs to the Responses API; here {_PICTURE}",
    "image": _PICTURE,
    "input_audio": "these models hear nothing",
    "audio_url": "these models hear nothing",
    "video_url": "send a few pictures of the video as image_url",
    "input_video": "send a few pictures of the video as image_url",
    "file": "send its text, or pictures of its pages as image_url",
}
_ROLES_INSTEAD = {"function": "answer a tool call with the role 'tool'"}


class TextContent(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(Body):
    """Where a picture is."""

    url: str = Field(min_length=1, description="http(s) URL, data: URL, base64 text, file:// URL or local path.")
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description="Ignored, see IGNORED_FIELDS.")


class ImageContent(Body):
    """A picture, at its place among the texts."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[Annotated[str, Field(min_length=1)], Tag("<text>")] | Annotated[ImageURL, Tag("<object>")],
        text_or("object"),
    ] = Field(description="An object with the url, or the url itself.")

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class RefusalContent(Body):
    """What an assistant refused with, earlier in the chat."""

    type: Literal["refusal"]
    refusal: str


UserPart: TypeAlias = Annotated[
    Annotated[TextContent, Tag("<text>")] | Annotated[ImageContent, Tag("<image_url>")],
    by("type"),
    one_of("type", "text", "image_url", remedies=_PARTS_INSTEAD),
]
AssistantPart: TypeAlias = Annotated[
    Annotated[TextContent, Tag("<text>")] | Annotated[RefusalContent, Tag("<refusal>")],
    by("type"),
    one_of("type", "text", "refusal", remedies={"image_url": "pictures belong into user messages", **_PARTS_INSTEAD}),
]
TextOnlyPart: TypeAlias = Annotated[
    TextContent,
    one_of("type", "text", remedies={"image_url": "pictures belong into user messages", **_PARTS_INSTEAD}),
]

_Texts: TypeAlias = Annotated[list[TextOnlyPart], Field(max_length=MAX_PARTS, fail_fast=True)]
TextOnly: TypeAlias = Annotated[Annotated[str, Tag("<text>")] | Annotated[_Texts, Tag("<parts>")], text_or("parts")]
_Name: TypeAlias = Annotated[str, Field(max_length=MAX_NAME_CHARS, description="Ignored, see IGNORED_FIELDS.")]


class SystemMessage(Body):
    """Instructions."""

    role: Literal["system"]
    content: TextOnly
    name: _Name | None = None


class DeveloperMessage(Body):
    """Instructions, by the name that OpenAI gives them now."""

    role: Literal["developer"]
    content: TextOnly
    name: _Name | None = None


class UserMessage(Body):
    """What the user says and shows, in order."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[Annotated[list[UserPart], Field(max_length=MAX_PARTS, fail_fast=True)], Tag("<parts>")],
        text_or("parts"),
    ]
    name: _Name | None = None


class FunctionCall(Body):
    """The function and its arguments as JSON text."""

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    arguments: str


class AssistantToolCall(Body):
    """A call that the assistant made earlier."""

    id: str = Field(max_length=MAX_NAME_CHARS)
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, ge=0, description="As in streamed answers; ignored.")


class AssistantMessage(Body):
    """What the model said earlier: content, tool calls or a refusal."""

    role: Literal["assistant"]
    content: (
        Annotated[
            Annotated[str, Tag("<text>")]
            | Annotated[Annotated[list[AssistantPart], Field(max_length=MAX_PARTS, fail_fast=True)], Tag("<parts>")],
            text_or("parts"),
        ]
        | None
    ) = None
    tool_calls: list[AssistantToolCall] | None = Field(None, max_length=MAX_TOOL_CALLS, fail_fast=True)
    refusal: str | None = None
    name: _Name | None = None
    annotations: list[object] | None = Field(
        None, max_length=MAX_PARTS, fail_fast=True, description="Of an earlier answer; ignored."
    )
    reasoning_content: str | None = Field(None, description="Of another server's earlier answer; ignored.")


class ToolMessage(Body):
    """What a tool returned."""

    role: Literal["tool"]
    content: TextOnly
    tool_call_id: str = Field(max_length=MAX_NAME_CHARS, description="The id of the call that this answers.")
    name: _Name | None = None


ChatMessage: TypeAlias = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[DeveloperMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by("role"),
    one_of("role", "system", "developer", "user", "assistant", "tool", remedies=_ROLES_INSTEAD),
]
