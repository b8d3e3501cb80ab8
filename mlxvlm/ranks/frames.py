"""Messages as bytes: four bytes of length, then JSON; an empty frame is a sign of life. Knows no socket.

What comes from elsewhere is bounded, and never unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 16 << 20  # of a message: a prompt's ids are some hundred kilobytes
BEAT = b"\0\0\0\0"
_LENGTH = struct.Struct("!I")


class BadFrameError(ValueError):
    """Bytes that are no message."""


def encode(message: Any) -> bytes:
    """Raises ValueError for what is too long, or no JSON."""
    data = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > MAX_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is longer than {MAX_BYTES}")
    return _LENGTH.pack(len(data)) + data


class Decoder:
    """Takes bytes in pieces as they come, gives messages."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()

    @property
    def missing(self) -> int:
        """Bytes that the next message certainly still has; who takes no more leaves what follows it."""
        have = len(self._buffer)
        if have < _LENGTH.size:
            return _LENGTH.size - have
        size: int = _LENGTH.unpack_from(self._buffer)[0]
        return _LENGTH.size + size - have

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are whole now. Raises BadFrameError."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > self.max_bytes:
                raise BadFrameError(f"a message of {size} bytes, where {self.max_bytes} are allowed")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            text = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            if size:
                yield _parsed(text)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFrameError(f"no JSON: {error}") from error
