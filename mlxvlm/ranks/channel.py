"""One connection of the control plane: messages both ways, signs of life, and its loss. Knows threads, not ranks.

Its two threads run while the others are inside MLX, which lets go of Python's lock while it computes.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlxvlm.ranks.frames import BEAT, BadFrameError, Decoder

_READ_BYTES = 1 << 16
_MAX_UNSENT_BYTES = 64 << 20  # what a rank that does not read leaves with the others
_BEATS = 5  # in the time after which silence is a loss
_LONGEST_REST_S = 1.0


class Channel:
    """Over a connected socket, which it owns. Neither `send` nor a slow peer ever blocks the caller."""

    def __init__(self, connection: socket.socket, timeout_s: float, name: str) -> None:
        """timeout_s: of silence, after which the peer counts as lost."""
        self._socket, self._timeout_s = connection, timeout_s
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unsent = bytearray()
        self._changed = threading.Condition()
        self._is_closed = False
        self._reader = threading.Thread(target=self._read, name=f"mlxvlm-hears-{name}", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"mlxvlm-tells-{name}", daemon=True)

    def start(self, on_message: Callable[[Any], None], on_end: Callable[[str], None]) -> None:
        """Both are called from the reading thread: for each message, then once with why no more will come, also
        after close()."""
        self._on_message, self._on_end = on_message, on_end
        self._reader.start()
        self._writer.start()

    def send(self, data: bytes) -> None:
        """A frame, in order; lost where the peer is."""
        with self._changed:
            if not self._unsent:  # straight on: a thread in between would cost a switch each time
                data = data[self._sent(data) :]
            self._unsent += data
            if self._unsent:
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Waits until all is sent, no longer than that."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unsent or self._is_closed, timeout_s)

    def finish(self, timeout_s: float) -> None:
        """Waits for the peer to close the connection, no longer than that."""
        self._reader.join(timeout_s)

    def close(self) -> None:
        """Ends both threads; callable from any, once or more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in (self._reader, self._writer):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        self._socket.close()

    def _sent(self, data: bytes | bytearray) -> int:
        """How many bytes the socket took."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # it is gone, as the reading thread finds out

    def _write(self) -> None:
        rest_s = min(self._timeout_s / _BEATS, _LONGEST_REST_S)
        ready = select.poll()
        ready.register(self._socket, select.POLLOUT)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent or self._is_closed, rest_s)
                if self._is_closed:
                    return
                self._unsent += b"" if self._unsent else BEAT
            ready.poll(rest_s * 1000)
            with self._changed:
                del self._unsent[: self._sent(self._unsent)]
                if not self._unsent:
                    self._changed.notify_all()

    def _read(self) -> None:
        self._on_end(self._heard())

    def _heard(self) -> str:
        """Passes messages on until no more come; why that is."""
        decoder, ready = Decoder(), select.poll()
        ready.register(self._socket, select.POLLIN)
        while True:
            is_late = not ready.poll(self._timeout_s * 1000)
            try:
                data = self._socket.recv(_READ_BYTES)  # also when late: after a pause of this process all is there
            except BlockingIOError:
                if is_late:
                    return f"nothing was heard of it for {self._timeout_s:g} s"
                continue
            except ConnectionError:
                data = b""
            except OSError as error:
                return f"the connection broke: {error.strerror or error}"
            if not data:
                return "the connection was closed"
            if len(self._unsent) > _MAX_UNSENT_BYTES:
                return "it does not read what it is told"
            try:
                for message in decoder.feed(data):
                    self._on_message(message)
            except BadFrameError as error:
                return f"it sent {error}"
