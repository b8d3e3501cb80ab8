"""Messages -> Prompt, the way that all families go. Knows the order of steps; a family's file knows its pictures."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxvlm.errors import ContextLengthError, InputError
from mlxvlm.messages import ImageOptions, ImagePart, Message, Part
from mlxvlm.processors.base import (
    AS_THE_CHECKPOINT,
    PreparedImage,
    Prompt,
    check_length,
    check_markers,
    check_messages,
    check_typed,
    expand_placeholders,
    place_images,
    placeholder_spans,
    turn_of_parts,
    turn_of_text,
)
from mlxvlm.processors.files import ProcessorFiles, context_length
from mlxvlm.processors.images import load_image
from mlxvlm.processors.transforms import Frames, Normalizer

Settings = TypeVar("Settings")
Pixels = NDArray[np.float32]  # of one picture; each family's file states the shape
Layout = tuple[int, ...]


class FamilyProcessor(ABC, Generic[Settings]):
    """A Processor over what a family says of its pictures. Thread-safe: holds settings only.

    marker: stands for one picture in a text; templates write it, and users may type it.
    settings: whatever of the checkpoint's image processor shapes the pixels; its repr goes into digests.
    """

    def __init__(
        self,
        files: ProcessorFiles,
        marker: str,
        settings: Settings,
        normalize: Normalizer,
        default_template: str | None = None,
    ) -> None:
        self.tokenizer = files.tokenizer
        self.template = files.template(default_template)
        self.marker = marker
        self.settings = settings
        self.normalize = normalize
        self.max_context = context_length(files.config)
        self.image_token_id = self.find_image_token(files)
        self.image_token = str(self.tokenizer.backend.id_to_token(self.image_token_id))
        self._repeated = self.image_token_id if self.tokenizer.stands_alone(self.image_token_id) else None

    @abstractmethod
    def find_image_token(self, files: ProcessorFiles) -> int:
        """The id that features are written over. Raises ModelError where tokenizer and config disagree."""

    @abstractmethod
    def to_frames(self, image: Image.Image, settings: Settings) -> tuple[Frames, Layout]:
        """An RGB picture resized and cut as the vision tower takes it, in bytes."""

    def to_pixels(self, frames: Frames, settings: Settings) -> Pixels:
        """The bytes as the vision tower's numbers."""
        return self.normalize(frames)

    @abstractmethod
    def num_placeholders(self, pixels: Pixels, layout: Layout) -> int:
        """How many features a picture has in the prompt."""

    def expansion(self, pixels: Pixels, layout: Layout) -> str:
        """The text that takes the marker's place, with num_placeholders image tokens in it."""
        return self.marker * self.num_placeholders(pixels, layout)

    @property
    def written_marker(self) -> str:
        """What a template writes for a picture: the marker, and what else always stands around it."""
        return self.marker

    def adapted(self, options: ImageOptions) -> Settings:
        """The settings as a request wants them. Raises InputError for what a family doesn't have."""
        if options != AS_THE_CHECKPOINT:
            raise InputError("this model's pictures have sizes of their own: min_pixels and max_pixels can't be set")
        return self.settings

    def place(self, message: Message) -> Sequence[Part]:
        """The parts of a turn, with markers that the user typed taken as the places of its pictures."""
        return place_images(message, self.marker)

    def turn(self, message: Message, parts: Sequence[Part]) -> dict[str, Any]:
        """A turn as the template wants it."""
        if self.template.takes_strings:
            return turn_of_text(message, parts, self.written_marker)
        return turn_of_parts(message, parts)

    def render(self, turns: Sequence[tuple[Message, Sequence[Part]]], variables: Mapping[str, Any] | None) -> str:
        """The prompt's text, with a marker for each picture."""
        return self.template.render([self.turn(message, parts) for message, parts in turns], variables)

    def __call__(
        self,
        messages: Sequence[Message],
        template: Mapping[str, Any] | None = None,
        options: ImageOptions = AS_THE_CHECKPOINT,
    ) -> Prompt:
        """Raises InputError, ImageError, TemplateError or ContextLengthError."""
        check_messages(messages)
        check_typed(messages, self.marker)
        turns = [(message, self.place(message)) for message in messages]
        rendered = self.render(turns, template)
        check_length(rendered, self.tokenizer, self.max_context)
        sources = [part.source for _, parts in turns for part in parts if isinstance(part, ImagePart)]
        check_markers(rendered, self.marker, len(sources))
        images = self._prepare_all(sources, options)
        expansions = [self.expansion(pixels, layout) for pixels, layout, _ in images]
        expanded = expand_placeholders(rendered, self.marker, expansions)
        token_ids = self.tokenizer.encode_prompt(expanded, self._repeated)
        counts = [self.num_placeholders(pixels, layout) for pixels, layout, _ in images]
        spans = placeholder_spans(token_ids, self.image_token_id, counts, self.image_token)
        prepared = [
            PreparedImage(pixels, layout, span, digest)
            for (pixels, layout, digest), span in zip(images, spans, strict=True)
        ]
        return Prompt(tuple(token_ids), tuple(prepared))

    def prepare_image(
        self, image: Image.Image, options: ImageOptions = AS_THE_CHECKPOINT
    ) -> tuple[Pixels, Layout, bytes]:
        """RGB -> pixels, layout, digest."""
        settings = self.adapted(options)
        frames, layout = self.to_frames(image, settings)
        key = repr((settings, self.normalize.key, image.size, layout)).encode()
        digest = hashlib.sha256(key)
        # The picture, or what becomes of it: both tell it from others, and the larger is hashed in vain.
        is_small = 3 * image.width * image.height < frames.nbytes
        digest.update(image.tobytes() if is_small else frames.data)
        return self.to_pixels(frames, settings), layout, digest.digest()

    def _prepare_all(self, sources: Sequence[Any], options: ImageOptions) -> list[tuple[Pixels, Layout, bytes]]:
        """Stops at the picture that no longer fits, so that a hopeless request costs no more than one that fits."""
        images = []
        filled = 0
        for source in sources:
            if isinstance(source, PreparedImage):  # of an earlier prompt with the same picture
                images.append((source.pixels, source.layout, source.digest))
            else:
                images.append(self.prepare_image(load_image(source), options))
            filled += self.num_placeholders(*images[-1][:2])
            if filled >= self.max_context:
                raise ContextLengthError(
                    f"{len(images)} of {len(sources)} image(s) alone take {filled} tokens, but the model's context is "
                    f"{self.max_context}: send fewer or smaller images"
                )
        return images
