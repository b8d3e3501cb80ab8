"""A time limit of waits that are many and short. Knows asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Watch:
    """Calls `late` whenever a wait has taken `seconds`, and again as often as it takes them.

    A timer is set once in `seconds`, not once for each wait, which would cost more than most waits do.
    """

    def __init__(self, seconds: float, late: Callable[[], None]) -> None:
        self._seconds, self._late = seconds, late
        self._since: float | None = None  # the wait under way

    def __enter__(self) -> Watch:
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()

    async def wait(self, what: Awaitable[object]) -> None:
        self._since = self._loop.time()
        try:
            await what
        finally:
            self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        if self._since is not None and self._since + self._seconds <= now:
            self._since = now
            self._late()
        since = now if self._since is None else self._since
        self._timer = self._loop.call_at(since + self._seconds, self._look)
