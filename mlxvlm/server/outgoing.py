"""An answer on its way out, whole or as events, whatever its shape. Knows no endpoint."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel
from starlette.types import Send

from mlxvlm.engine.request import Delta, Usage
from mlxvlm.errors import MlxvlmError
from mlxvlm.server.answering import Answering, Arrived
from mlxvlm.server.replies import error_body, log_failure, send_at_once
from mlxvlm.server.sse import DONE, KEEP_ALIVE, frame, send_events

_log = logging.getLogger(__name__)


class Assembler(Protocol):
    """Makes bodies of Deltas."""

    def begin(self, prompts: Sequence[tuple[int, ...]]) -> Iterable[BaseModel]:
        """The first events. prompts: the token ids of each choice's."""
        ...

    def feed(self, index: int, delta: Delta) -> Iterable[BaseModel]: ...

    def end(self) -> Iterable[BaseModel]:
        """The last events."""
        ...

    def whole(self, prompts: Sequence[tuple[int, ...]], deltas: Iterable[tuple[int, Delta]]) -> BaseModel:
        """Everything at once."""
        ...

    @property
    def usage(self) -> Usage:
        """Of all choices; at their end."""
        ...


@dataclass(frozen=True, slots=True)
class Framing:
    """How an API writes its events. silence: what is sent while there are none; done: after the last."""

    frame: Callable[[BaseModel], bytes] = frame
    failed: Callable[[Exception], Iterable[BaseModel]] = lambda error: [error_body(error)]
    silence: bytes = KEEP_ALIVE
    done: bytes = DONE

    def frames(self, events: Iterable[BaseModel]) -> bytes:
        return b"".join(map(self.frame, events))


CHAT = Framing()


@dataclass(frozen=True, slots=True)
class Reply:
    """One request's answer. note: told of its usage, when all of it is made and before the last of it is sent."""

    assembler: Assembler
    answering: Answering
    note: Callable[[Usage], None]
    framing: Framing = CHAT

    async def send(self, send: Send, send_timeout_s: float, *, stream: bool) -> None:
        """Raises what goes wrong before anything is sent, TimeoutError for a client that takes nothing."""
        is_prepared = await self.answering.prepared()
        if stream:
            await send_events(send, self._events(is_prepared), send_timeout_s)
        else:
            await send_at_once(send, await self.whole())

    async def whole(self) -> BaseModel:
        """Raises what goes wrong."""
        deltas: Arrived = []
        async for arrived in self.answering:
            deltas += arrived
        body = self.assembler.whole(self.answering.prompts, deltas)
        self.note(self.assembler.usage)
        return body

    async def _events(self, is_prepared: bool) -> AsyncGenerator[bytes, None]:
        """An error becomes an event, which ends the stream."""
        framing = self.framing
        try:
            while not is_prepared:
                yield framing.silence
                is_prepared = await self.answering.prepared()
            yield framing.frames(self.assembler.begin(self.answering.prompts))
            async for arrived in self.answering:
                events = b"".join(framing.frames(self.assembler.feed(*item)) for item in arrived)
                if events or not arrived:
                    yield events or framing.silence
            last = framing.frames(self.assembler.end())
            # Before the last write: after it, the client may be gone.
            self.note(self.assembler.usage)
        except Exception as error:  # noqa: BLE001 - the top of an answer whose status is sent: who else could tell?
            if isinstance(error, MlxvlmError):
                log_failure(error)
            else:
                _log.exception("a defect in the middle of an answer")
            last = framing.frames(framing.failed(error))
        yield last + framing.done
