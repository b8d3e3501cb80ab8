"""The control plane: what rank 0 tells the others, what they report, and what happens when one is lost. No tensors.

A rank is lost when its connection ends before its work does, when it says that it failed, or when nothing is heard of
it for the time-out. Then all ranks end, each with one line on stderr and exit status 1.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from mlxvlm.errors import RanksError
from mlxvlm.ranks.channel import Channel
from mlxvlm.ranks.endings import end_process
from mlxvlm.ranks.frames import encode
from mlxvlm.ranks.place import TIMEOUT_S, Place

GRACE_S = 2.0  # for answers to say why they end, before the process does
_LAST_WORDS_S = 2.0
_LOOK_S = 0.2  # between looks at whether to go on waiting
_END = None  # the message after which rank 0 says no more
_DONE = "done"  # the answer to it: no other rank waits for this one's part of a sum
_SHOWN_CHARS = 1000  # of a rank's own words


class Link:
    """Rank 0's connections to all others. Callable from any thread."""

    def __init__(
        self,
        place: Place,
        connections: Sequence[socket.socket],
        timeout_s: float = TIMEOUT_S,
        end: Callable[[str], Any] = end_process,
    ) -> None:
        """connections: to ranks 1, 2 ... in order, which it owns. end: called after a loss, when all has been told."""
        self.on_loss: Callable[[str], None] = lambda text: None
        self.lost: str | None = None  # why, once it is
        self._place, self._timeout_s, self._end = place, timeout_s, end
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_told = threading.Event()  # on_loss has been called
        self._done: set[int] = set()  # those that will compute no more
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._sending = threading.Lock()  # never waited for: who has it sends what others put into the outbox
        self._reports: list[list[dict[str, Any]]] = [[] for _ in connections]
        self._channels = [Channel(each, timeout_s, f"rank-{index}") for index, each in enumerate(connections, 1)]
        for index, channel in enumerate(self._channels):
            channel.start(partial(self._hear, index), partial(self._miss, index))

    def tell(self, message: list[Any]) -> None:
        """To all, in order; at once, whoever is slow. Raises ValueError for what is too long, or no JSON."""
        self._send(message)

    def reports(self, check: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """Waits until each rank said ready(), or once more since the last time. Raises RanksError, and as `check`."""
        with self._changed:
            while not self._changed.wait_for(lambda: self.lost is not None or all(self._reports), _LOOK_S):
                check()
            if self.lost is not None:
                raise RanksError(self.lost)
            return [said.pop(0) for said in self._reports]

    def fail(self, text: str, wait_s: float = 0.0) -> str:
        """This rank can't go on: all end. Why that is: another's loss, if that is known or comes to be in wait_s.

        Returns when on_loss has been called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None, wait_s)
        self._lose(f"{self._place.name()} failed: {text}")
        self._is_told.wait(_LAST_WORDS_S)
        return str(self.lost)

    def close(self, failure: str | None = None) -> None:
        """Lets the others end well, or tells them why they can't; waits for them, no longer than for silent ones."""
        with self._changed:
            is_first, self._is_closing = not self._is_closing, True
            is_lost = self.lost is not None
        if is_first and not is_lost:
            self._send(_END if failure is None else {"lost": f"{self._place.name()} failed: {failure}"})
            with self._changed:
                self._changed.wait_for(lambda: len(self._done) == len(self._channels), self._timeout_s)
        for channel in self._channels:
            channel.close()

    def _send(self, message: Any) -> None:
        """In the same order to all; also from a finalizer, which may run in the midst of this very method."""
        self._outbox.put(encode(message))
        while not self._outbox.empty() and self._sending.acquire(blocking=False):
            try:
                with suppress(queue.Empty):
                    while True:
                        data = self._outbox.get_nowait()
                        for channel in self._channels:
                            channel.send(data)
            finally:
                self._sending.release()

    def _hear(self, index: int, message: Any) -> None:
        if isinstance(message, dict) and isinstance(report := message.get("ready"), dict):
            with self._changed:
                self._reports[index].append(report)
                self._changed.notify_all()
        elif message == _DONE:
            self._is_done(index)
        else:
            text = message.get("failed") if isinstance(message, dict) else message
            self._lose(f"{self._place.name(index + 1)} failed: {str(text)[:_SHOWN_CHARS]}")

    def _miss(self, index: int, why: str) -> None:
        self._is_done(index)
        self._lose(f"{self._place.name(index + 1)} was lost: {why}")

    def _is_done(self, index: int) -> None:
        with self._changed:
            self._done.add(index)
            self._changed.notify_all()

    def _lose(self, text: str) -> None:
        with self._changed:
            if self.lost is not None or self._is_closing:
                return
            self.lost = text
            self._changed.notify_all()
        self._send({"lost": text})
        threading.Thread(target=self._give_up, name="mlxvlm-ranks-end", daemon=True).start()

    def _give_up(self) -> None:
        assert self.lost is not None
        self.on_loss(self.lost)
        self._is_told.set()
        time.sleep(GRACE_S)
        self._end(self.lost)


class Wire:
    """Another rank's connection to rank 0. The process ends by itself when rank 0, or another, is lost."""

    def __init__(
        self,
        place: Place,
        connection: socket.socket,
        timeout_s: float = TIMEOUT_S,
        end: Callable[[str], Any] = end_process,
    ) -> None:
        """end: called once with why there is no going on, also while the main thread is inside MLX."""
        self._place, self._timeout_s, self._end = place, timeout_s, end
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_over = False
        self.is_ended = False  # rank 0 has said that this was all, though there may be messages before that
        self._channel = Channel(connection, timeout_s, "rank-0")
        self._channel.start(self._hear, self._miss)

    def ready(self, report: dict[str, Any]) -> None:
        """What rank 0 waits for in reports()."""
        self._channel.send(encode({"ready": report}))

    def failed(self, text: str) -> None:
        """Tells rank 0, which ends all ranks; to be followed by the end of this one."""
        self._is_over = True
        self._channel.send(encode({"failed": text[:_SHOWN_CHARS]}))
        self._channel.flush(_LAST_WORDS_S)

    def __iter__(self) -> Iterator[list[Any]]:
        """What rank 0 tells, until it says that it was all."""
        while (message := self._messages.get()) is not _END:
            yield message

    def close(self) -> None:
        """After the last message, when all is computed; returns when rank 0 heard that of all, and lets them go."""
        self._is_over = True
        self._channel.send(encode(_DONE))
        self._channel.finish(self._timeout_s)
        self._channel.close()

    def _hear(self, message: Any) -> None:
        if isinstance(message, dict):
            self._lose(str(message.get("lost"))[:_SHOWN_CHARS])
            return
        self.is_ended = message is _END
        self._messages.put(message)

    def _miss(self, why: str) -> None:
        """Also after its last message: rank 0 waits for this one's end."""
        self._lose(f"{self._place.name(0)} was lost: {why}")

    def _lose(self, text: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._end(text)
