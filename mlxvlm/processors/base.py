"""The wall between what a user sends and what a model reads. Knows no family, no MLX."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mlxvlm.errors import ContextLengthError, InputError
from mlxvlm.messages import ImageOptions, ImagePart, Message, Part, Role, TextPart, ToolCall
from mlxvlm.processors.chat_template import ChatTemplate
from mlxvlm.processors.tokenizer import Tokenizer

ROLES = get_args(Role)
_CHARS_PER_TOKEN = 8  # more than languages have: longer texts are counted piece by piece first
_PIECE_CHARS = 1 << 16
_SLACK = 4  # of the pieces' tokens: cuts add some, a normalizer may make less of the whole
AS_THE_CHECKPOINT = ImageOptions()


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One picture, ready for a vision tower.

    pixels: float32; each family's file states the shape.
    layout: the family's own grid, e.g. (rows, columns) of tiles.
    span: [start, end) of its placeholders in Prompt.token_ids.
    digest: sha256 over the picture's bytes, or those cut for the tower, and every setting that shapes the pixels.
    """

    pixels: NDArray[np.float32] = field(repr=False)
    layout: tuple[int, ...]
    span: tuple[int, int]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every placeholder expanded, so len(token_ids) is the number of KV positions."""

    token_ids: tuple[int, ...]
    images: tuple[PreparedImage, ...] = ()


class Processor(Protocol):
    """Messages to Prompt. Called from several threads at once: keeps no state of a request."""

    tokenizer: Tokenizer
    template: ChatTemplate
    image_token_id: int

    def __call__(
        self,
        messages: Sequence[Message],
        template: Mapping[str, Any] | None = None,
        options: ImageOptions = AS_THE_CHECKPOINT,
    ) -> Prompt: ...


def check_length(text: str, tokenizer: Tokenizer, max_context: int) -> None:
    """Raises ContextLengthError for a text that can't fit: to read it whole would take 130 bytes a character."""
    if len(text) <= max(_PIECE_CHARS, _CHARS_PER_TOKEN * max_context):
        return
    left = _SLACK * max_context
    for start in range(0, len(text), _PIECE_CHARS):
        left -= len(tokenizer.encode(text[start : start + _PIECE_CHARS], add_special_tokens=False))
        if left < 0:
            raise ContextLengthError(
                f"the prompt has {len(text):,} characters, which the model's context of {max_context} tokens can't "
                "hold: shorten it"
            )


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError for an empty conversation, a turn that says nothing, and what is no Message."""
    if isinstance(messages, (str, Mapping, Message)):
        kind = type(messages).__name__
        raise InputError(f"messages are a list of mlxvlm.Message, not a {kind}: give [mlxvlm.user('...')]")
    if not messages:
        raise InputError("there are no messages to answer")
    for index, message in enumerate(messages):
        _check_message(message, f"message {index + 1}")
        if message.images or message.text.strip() or message.tool_calls:
            continue
        # A model may answer with nothing, and a tool may return nothing: history must stay usable.
        if message.role not in ("assistant", "tool"):
            raise InputError(f"message {index + 1} ({message.role}) is empty: give it text or an image")


def _check_message(message: Any, name: str) -> None:
    """Types are checked by hand: what is typed into a notebook meets no type checker."""
    if not isinstance(message, Message):
        kind = type(message).__name__
        raise InputError(f"{name} is a {kind}, not a mlxvlm.Message: give mlxvlm.user('...'), or Message(role, parts)")
    if message.role not in ROLES:
        raise InputError(f"{name} has the role {message.role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(message.parts, (tuple, list)):
        kind = type(message.parts).__name__
        raise InputError(
            f"{name} has a {kind} for its parts: give mlxvlm.user('...'), or Message({message.role!r}, "
            "(TextPart('...'),))"
        )
    for part in message.parts:
        if not isinstance(part, ImagePart) and not (isinstance(part, TextPart) and isinstance(part.text, str)):
            kind = "TextPart without text" if isinstance(part, TextPart) else type(part).__name__
            raise InputError(f"{name} has a {kind} among its parts: they are TextPart('...') or ImagePart(source)")


def typed_markers(message: Message, marker: str) -> int:
    """How many markers a user typed; within each part, as one that only two parts spell has no place of its own."""
    return sum(part.text.count(marker) for part in message.parts if isinstance(part, TextPart))


def check_typed(messages: Sequence[Message], marker: str) -> None:
    """Raises InputError naming the turn that holds markers, but not one for each of its images."""
    for index, message in enumerate(messages):
        typed, images = typed_markers(message, marker), len(message.images)
        if typed not in (0, images):
            raise InputError(
                f"message {index + 1} ({message.role}) has {typed} image marker(s) {marker!r} in its text and {images} "
                "image(s): type one for each image, or none"
            )


def place_images(message: Message, marker: str) -> tuple[Part, ...]:
    """The parts of a turn with hand-typed image markers taken as the places of its pictures.

    Where the text holds exactly as many markers as the turn has pictures, the markers win and the pictures' own
    places are given up; else the parts stay as they are.
    """
    if not message.images or typed_markers(message, marker) != len(message.images):
        return message.parts
    images = iter(message.images)
    placed: list[Part] = []
    for part in message.parts:
        if isinstance(part, ImagePart):
            continue
        for index, piece in enumerate(part.text.split(marker)):
            if index:
                placed.append(next(images))
            if piece:
                placed.append(TextPart(piece))
    return tuple(placed)


def turn_of_parts(message: Message, parts: Sequence[Part]) -> dict[str, Any]:
    """A turn as most templates want it. Content is always a list: some drop plain strings silently."""
    content = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in parts
    ]
    return {"role": message.role, "content": content or [{"type": "text", "text": ""}], **_calls_of(message)}


def turn_of_text(message: Message, parts: Sequence[Part], marker: str) -> dict[str, Any]:
    """A turn whose content is one string, with `marker` in a picture's place."""
    content = "".join(marker if isinstance(part, ImagePart) else part.text for part in parts)
    return {"role": message.role, "content": content, **_calls_of(message)}


def _calls_of(message: Message) -> dict[str, Any]:
    """What a turn has beside its content, as transformers' callers write it: arguments are an object, not text.

    Only where there is something: templates ask whether a turn has the key.
    """
    extra: dict[str, Any] = {}
    if message.tool_calls:
        extra["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments_of(call)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        extra["tool_call_id"] = message.tool_call_id
    return extra


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """Raises InputError unless the arguments are a JSON object; nothing at all stands for an empty one."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, TypeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(f"the arguments of the call of {call.name!r} are no JSON object")
    return arguments


def check_markers(rendered: str, marker: str, num_images: int) -> None:
    """Raises InputError unless a rendered chat holds exactly one marker for each image."""
    found = rendered.count(marker)
    if found > num_images:
        raise InputError(
            f"the chat template wrote {found} image marker(s) {marker!r} for {num_images} image(s): "
            "give another with --chat-template FILE"
        )
    if found < num_images:
        raise InputError(
            f"the chat template gave {found} of {num_images} image(s) a place ({marker!r}): put images into user "
            "messages, or give a template that takes them with --chat-template FILE"
        )


def expand_placeholders(rendered: str, marker: str, expansions: Sequence[str]) -> str:
    """Replaces the i-th marker by the i-th expansion, in one pass: expansions may hold the marker again."""
    pieces = iter(expansions)
    return re.sub(re.escape(marker), lambda _: next(pieces), rendered)


def placeholder_spans(
    token_ids: Sequence[int], image_token_id: int, counts: Sequence[int], token: str
) -> list[tuple[int, int]]:
    """[start, end) of each image when the i-th image owns the next counts[i] placeholders.

    Raises InputError when the prompt holds another number of them; `token` is how a text spells one.
    """
    positions = [index for index, token in enumerate(token_ids) if token == image_token_id]
    if len(positions) != sum(counts):
        raise InputError(
            f"the prompt has {len(positions)} image tokens where its images fill {sum(counts)}: "
            f"the text itself holds {token!r}, the model's image token, remove it"
        )
    spans = []
    first = 0
    for count in counts:
        spans.append((positions[first], positions[first + count - 1] + 1))
        first += count
    return spans
