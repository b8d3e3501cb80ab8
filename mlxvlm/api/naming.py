"""Errors about a chat request's fields, told in the words of the request that it was made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mlxvlm.errors import RequestError


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """names: a chat request's field -> the other request's."""
    try:
        yield
    except RequestError as error:
        pattern = re.compile(rf"\b({'|'.join(names)})\b")

        def told(text: str) -> str:
            return pattern.sub(lambda match: names[match[0]], text)

        param = None if error.param is None else told(error.param)
        raise RequestError(told(str(error)), param, error.code or "invalid_value") from None
