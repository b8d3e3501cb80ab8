"""The way out of the engine thread. Knows threads and event loops, not tokens."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

from mlxvlm.engine.request import Completion, Delta
from mlxvlm.errors import InternalError


class Stream:
    """The Deltas of one answer: iterate in a thread or async-iterate in a coroutine, once; cancel() at any time.

    An error of the request is raised where the next Delta would have come. A loop in a thread that may be left early
    belongs into `with stream:`, which cancels at its end; a coroutine that leaves `async for` cancels by itself.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        # Not a Condition: a reader's wake-up takes its time from the thread that decodes, and this one is done in C.
        self._items: queue.SimpleQueue[Delta | BaseException] = queue.SimpleQueue()
        # Set before it looks whether there is anything, and looked at after something is put: nothing is missed.
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._ended = False
        self.prompt_token_ids: tuple[int, ...] | None = None  # known when the prompt is made

    def cancel(self) -> None:
        """Ends the answer at the next step; what was produced still comes, with finish_reason "cancelled"."""
        self._on_cancel()

    def begin(self, prompt_token_ids: tuple[int, ...]) -> None:
        """Called by the engine when the prompt is made."""
        self.prompt_token_ids = prompt_token_ids
        self._wake()

    def put(self, item: Delta | BaseException) -> None:
        """Called by the engine; never blocks."""
        self._items.put(item)
        self._wake()

    async def prepared(self) -> None:
        """Waits until the prompt is made, or the answer has ended before; to be awaited before iterating."""
        async with self._woken() as event:
            while self.prompt_token_ids is None and self._items.empty():
                await event.wait()
                event.clear()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            loop, event = waiter
            # A loop that is closed, or is being closed, has no listener any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)

    def __iter__(self) -> Iterator[Delta]:
        while not self._ended:
            yield self._read(self._items.get())

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async with self._woken() as event:
                while not self._ended:
                    while self._items.empty():
                        await event.wait()
                        event.clear()
                    yield self._read(self._items.get())
        finally:
            if not self._ended:
                self.cancel()

    @asynccontextmanager
    async def _woken(self) -> AsyncIterator[asyncio.Event]:
        """An event of this loop that is set by whatever comes."""
        event = asyncio.Event()
        self._waiter = (asyncio.get_running_loop(), event)
        try:
            yield event
        finally:
            self._waiter = None

    def _read(self, item: Delta | BaseException) -> Delta:
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._ended:
            self.cancel()

    def result(self) -> Completion:
        """Waits for the whole answer."""
        return collect(list(self))


def collect(deltas: list[Delta]) -> Completion:
    """A Completion from all Deltas of a stream."""
    last = deltas[-1] if deltas else None
    if last is None or last.finish_reason is None or last.usage is None:
        raise InternalError("the stream ended without a finish reason")
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
    )
