"""The engine's streams of one HTTP request, merged. Knows asyncio and the engine, no HTTP and no shapes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeAlias, cast

from mlxvlm.engine.request import Delta, Request
from mlxvlm.errors import AnswerTimeoutError, MlxvlmError
from mlxvlm.server.watch import Watch


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server waits, and for how much.

    A reader that is too slow makes its own answer wait here, in memory: about a kilobyte a Delta, four with all
    logprobs. One that is max_unread behind, or takes nothing for send_timeout_s, is cut off.
    """

    keep_alive_s: float = 10.0  # of silence, before a comment is sent
    max_unread: int = 8192  # Deltas of all choices
    send_timeout_s: float = 300.0


class Deltas(Protocol):
    """An engine's Stream, or one like it."""

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None: ...

    async def prepared(self) -> None: ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None: ...


class Submitter(Protocol):
    """The engine, or what stands before it."""

    def submit(self, request: Request) -> Deltas: ...


Arrived: TypeAlias = list[tuple[int, Delta]]


Counted: TypeAlias = Callable[[Deltas], AsyncGenerator[Delta, None]]


_TOO_LATE = (
    "the request's time was over before there was a token of an answer: give it more with timeout, the server with "
    "--request-timeout, or ask when less runs"
)


def _deltas(stream: Deltas) -> AsyncGenerator[Delta, None]:
    return cast("AsyncGenerator[Delta, None]", aiter(stream))


class Answering:
    """All choices of one request at once, from `async with` to its end; what still runs then is cancelled.

    Raises what submitting raises, TimeoutError at the end of the block when the reader was cut off. Where the request's
    own time ends before any token, that is an AnswerTimeoutError; later it only ends the answer.
    """

    def __init__(
        self,
        engine: Submitter,
        requests: Sequence[Request],
        patience: Patience,
        counted: Counted | None = None,
        blame: Callable[[MlxvlmError], None] = lambda error: None,
    ) -> None:
        """counted: stands between a stream and its reader. blame: told of an error before it is raised."""
        self._engine, self._requests, self._patience, self._blame = engine, requests, patience, blame
        self._counted: Counted = counted or _deltas
        self._streams: list[Deltas] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._arrived: deque[tuple[int, Delta | MlxvlmError]] = deque()
        self._something = asyncio.Event()
        self._is_silent = False
        self._watch = Watch(patience.keep_alive_s, self._tell_silence)
        self._unprepared = self._unfinished = len(requests)
        self._has_tokens = False
        self._scope = asyncio.timeout(None)

    async def __aenter__(self) -> Answering:
        try:
            for request in self._requests:
                self._streams.append(self._engine.submit(request))
        except MlxvlmError as error:
            self._cancel()
            self._blame(error)
            raise
        await self._scope.__aenter__()
        self._watch.__enter__()
        self._pumps = [asyncio.create_task(self._pump(index, each)) for index, each in enumerate(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()
        self._watch.__exit__()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self._scope.__aexit__(kind, error, trace)

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def prepared(self) -> bool:
        """Waits until all prompts are made, at most keep_alive_s; whether they are. Raises the first choice's error.

        Until then nothing need be sent, so that errors of the input can have a status of their own.
        """
        while self._unprepared and not self._failed():
            if not await self._wait():
                return False
        failure = self._failed()
        if failure is not None:
            raise failure
        return True

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of the requests' prompts, when they are prepared."""
        return [stream.prompt_token_ids or () for stream in self._streams]

    async def __aiter__(self) -> AsyncIterator[Arrived]:
        """All that has come, in order; an empty list after keep_alive_s of silence. Raises a choice's error."""
        while self._unfinished:
            if not self._arrived and not await self._wait():
                yield []
            arrived: Arrived = []
            while self._arrived:
                index, item = self._arrived.popleft()
                if isinstance(item, MlxvlmError):
                    if arrived:
                        self._arrived.appendleft((index, item))
                        break
                    raise item
                self._unfinished -= item.finish_reason is not None
                arrived.append((index, item))
            if arrived:
                yield arrived

    def _failed(self) -> MlxvlmError | None:
        return next((item for _, item in self._arrived if isinstance(item, MlxvlmError)), None)

    async def _wait(self) -> bool:
        """Whether something came within keep_alive_s."""
        await self._watch.wait(self._something.wait())
        self._something.clear()
        is_silent, self._is_silent = self._is_silent, False
        return not is_silent

    def _tell_silence(self) -> None:
        self._is_silent = True
        self._something.set()

    async def _pump(self, index: int, stream: Deltas) -> None:
        try:
            await stream.prepared()
            has_prompt = stream.prompt_token_ids is not None
            if has_prompt:
                self._tell_prepared()
            async with aclosing(self._counted(stream)) as deltas:
                async for delta in deltas:
                    self._put(index, self._checked(delta))
            if not has_prompt:  # it ended before: why comes first
                self._tell_prepared()
        except MlxvlmError as error:
            self._blame(error)
            self._put(index, error)

    def _tell_prepared(self) -> None:
        self._unprepared -= 1
        self._something.set()

    def _checked(self, delta: Delta) -> Delta:
        self._has_tokens = self._has_tokens or bool(delta.token_ids)
        if delta.finish_reason == "timeout" and not self._has_tokens:
            raise AnswerTimeoutError(_TOO_LATE)
        return delta

    def _put(self, index: int, item: Delta | MlxvlmError) -> None:
        self._arrived.append((index, item))
        self._something.set()
        if len(self._arrived) > self._patience.max_unread:
            self._cancel()
            self._arrived.clear()
            self._scope.reschedule(asyncio.get_running_loop().time())
