"""What a user sends, in order. Knows nothing of templates, tokens or pixels.

A picture's source is anything a door accepts: a path, a URL, a data: URL, base64 text, bytes, a Pillow image or an
array [height, width, channels] of uint8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture, not yet fetched or decoded."""

    source: Any = field(repr=False)


Part: TypeAlias = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a request asks of its pictures; None: as the checkpoint is set.

    min_pixels, max_pixels: bounds of a resized picture's area, for models that take pictures of any size (Qwen2-VL).
    """

    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made; `arguments` is JSON text, as in OpenAI's format."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks, and its text and pictures in order."""

    role: Role
    parts: tuple[Part, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @property
    def text(self) -> str:
        """All text of the turn, joined without separators."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


def user(text: str = "", images: Iterable[Any] = ()) -> Message:
    """A user's turn with its pictures before the text, where all five families expect them."""
    parts: list[Part] = [ImagePart(source) for source in images]
    if text:
        parts.append(TextPart(text))
    return Message("user", tuple(parts))


def system(text: str) -> Message:
    """A system turn."""
    return Message("system", (TextPart(text),))


def assistant(text: str) -> Message:
    """What the model said earlier."""
    return Message("assistant", (TextPart(text),))
