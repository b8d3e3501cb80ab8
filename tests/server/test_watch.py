"""Waits and their limit, by a clock that is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.server.watch import Watch


class Clock:
    """A loop's timers."""

    def __init__(self) -> None:
        self.now, self.timers = 0.0, list[tuple[float, Callable[[], None]]]()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Any:
        timer = (when, call)
        self.timers.append(timer)

        class Handle:
            cancel = staticmethod(lambda: self.timers.remove(timer))

        return Handle

    def call_later(self, seconds: float, call: Callable[[], None]) -> Any:
        return self.call_at(self.now + seconds, call)

    def pass_to(self, end: float) -> None:
        while due := [timer for timer in self.timers if timer[0] <= end]:
            timer = min(due, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = timer[0]
            timer[1]()
        self.now = end


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_late_is_told_of_each_limit_that_a_wait_passes(spans: list[tuple[int, int]]) -> None:
    """spans: of rest, then of waiting; the limit is 8."""
    clock, told, expected = Clock(), list[float](), list[float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "get_running_loop", lambda: clock)
        with Watch(8, lambda: told.append(clock.now)) as watch:
            for rest, waiting in spans:
                clock.pass_to(clock.now + rest)
                expected += [clock.now + limit for limit in range(8, waiting + 1, 8)]

                async def wait(end: float = clock.now + waiting) -> None:
                    clock.pass_to(end)

                with pytest.raises(StopIteration):
                    watch.wait(wait()).send(None)
                assert len(clock.timers) == 1
    assert told == expected
    assert not clock.timers
