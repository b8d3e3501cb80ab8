"""Errors of requests' work, as values. Knows exceptions, not requests."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from mlxvlm.errors import InternalError, MlxvlmError


def failure_of(work: Callable[[], None]) -> MlxvlmError | None:
    """Runs some work of requests; the one place where an unexpected error is caught."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - the top of the engine thread; a panic of Rust's is no Exception
        text = traceback.format_exc()
        _drop_frames(error)
        if isinstance(error, MlxvlmError):
            return error
        failure = InternalError(f"{type(error).__name__}: {error}")
        failure.add_note(text)
        return failure
    return None


def _drop_frames(error: BaseException | None) -> None:
    """Whoever keeps an error must not keep the arrays of the frames that it went through, nor of their callers'."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
