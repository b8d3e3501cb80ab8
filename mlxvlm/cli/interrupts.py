"""Ctrl-C as an event instead of an exception. Knows signals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_interrupt(action: Callable[[], None], times: int = 1) -> Iterator[list[int]]:
    """Runs an action in place of the first Ctrl-Cs, so that no exception tears a piece of an answer apart.

    Yields the list of those that came. After `times` of them Ctrl-C is what it was before.
    """
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) >= times:
            signal.signal(signal.SIGINT, previous)
        action()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)
