"""Models without pictures: messages -> Prompt. A picture is refused, not dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxvlm.errors import InputError
from mlxvlm.messages import ImageOptions, Message
from mlxvlm.processors.base import AS_THE_CHECKPOINT, Prompt, check_length, check_messages, turn_of_parts, turn_of_text
from mlxvlm.processors.files import ProcessorFiles, context_length


class TextProcessor:
    """Messages to Prompt. Thread-safe: holds settings only."""

    image_token_id = -1  # no token's

    def __init__(self, files: ProcessorFiles) -> None:
        self.tokenizer = files.tokenizer
        self.template = files.template()
        self.max_context = context_length(files.config)

    def __call__(
        self,
        messages: Sequence[Message],
        template: Mapping[str, Any] | None = None,
        options: ImageOptions = AS_THE_CHECKPOINT,
    ) -> Prompt:
        """Raises InputError, TemplateError or ContextLengthError."""
        check_messages(messages)
        if options != AS_THE_CHECKPOINT or any(message.images for message in messages):
            raise InputError("this model reads text only: leave the image out, or give a model with a vision tower")
        rendered = self.template.render([self._turn(message) for message in messages], template)
        check_length(rendered, self.tokenizer, self.max_context)
        return Prompt(tuple(self.tokenizer.encode_prompt(rendered)))

    def _turn(self, message: Message) -> dict[str, Any]:
        if self.template.takes_strings:
            return turn_of_text(message, message.parts, "")
        return turn_of_parts(message, message.parts)


def build(files: ProcessorFiles) -> TextProcessor:
    """The entry that families.py points to."""
    return TextProcessor(files)
