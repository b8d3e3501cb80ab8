"""Errors told in the words of the request that they are about: which field it is, by that request's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from mlxvlm.api.sampling import SamplingFields
from mlxvlm.errors import (
    ContextLengthError,
    ImageError,
    InputError,
    MemoryBudgetError,
    MlxvlmError,
    RequestError,
    TemplateError,
    UsageError,
)

# How the engine speaks of what binds an answer (engine/constraints.py, engine/params.py), and of single fields.
_FORM = re.compile(r"the (JSON schema|regular expression|Lark grammar|grammar)\b")
_FIELD = re.compile(rf"\b({'|'.join(SamplingFields.model_fields)})\b")
_OF_PROMPTS = (ContextLengthError, MemoryBudgetError, ImageError, TemplateError)


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """names: a chat request's field -> the other request's."""
    try:
        yield
    except RequestError as error:
        if not names:
            raise
        pattern = re.compile(rf"\b({'|'.join(names)})\b")

        def told(text: str) -> str:
            return pattern.sub(lambda match: names[match[0]], text)

        param = None if error.param is None else told(error.param)
        raise RequestError(told(str(error)), param, error.code or "invalid_value") from None


@dataclass(frozen=True, slots=True)
class Blame:
    """The fields that errors are about which know no request: the engine's, the processors'.

    prompt: what the prompt is made of. form: what binds the answer.
    """

    prompt: str
    form: str = "grammar"

    def lay(self, error: MlxvlmError) -> None:
        """Sets the error's param where it has none and a field is to blame."""
        if error.param is not None or not isinstance(error, InputError | UsageError):
            return
        text = str(error)
        if isinstance(error, _OF_PROMPTS):
            error.param = self.prompt
        elif _FORM.match(text):
            error.param = self.form
        elif found := _FIELD.search(text):
            error.param = found[0]
        elif isinstance(error, InputError):
            error.param = self.prompt

    @contextmanager
    def laid(self) -> Iterator[None]:
        """On what goes wrong inside of the block."""
        try:
            yield
        except MlxvlmError as error:
            self.lay(error)
            raise
