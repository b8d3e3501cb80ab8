"""A request's body -> JSON values, within limits of bytes, time, depth and count. Knows HTTP's body, no schema.

Stricter than json.loads, which takes NaN, doubled keys and lone surrogates: two readers of one text must agree.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from mlxvlm.errors import BodyError, BodyTimeoutError, BodyTooLargeError, OverloadedError

_IN_A_THREAD_BYTES = 64 << 10  # smaller ones take less than a millisecond
# The last alternative only lets other threads run where spaces have no end.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{\]},]|[^"\[{\]},]{65536}', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What a body may be."""

    max_bytes: int = 64 << 20
    timeout_s: float = 60.0  # until its last byte
    max_depth: int = 64  # of lists and objects in each other
    max_tokens: int = 1_000_000  # strings, brackets and commas: a prompt of a million token ids has so many
    max_digits: int = 40  # of a whole number: Python's own time grows with their square

    def __post_init__(self) -> None:
        # json's own recursion must never be what ends a deep text.
        assert self.max_depth <= 200


DEFAULT_LIMITS = BodyLimits()


class Bodies:
    """Bytes of bodies that are being read, of all requests: many at once must not fill the memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held_bytes = max_bytes, 0

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[_Share]:
        share = _Share(self)
        try:
            yield share
        finally:
            self.held_bytes -= share.nbytes


class _Share:
    def __init__(self, bodies: Bodies) -> None:
        self.bodies, self.nbytes = bodies, 0

    def grow(self, nbytes: int) -> None:
        """Raises OverloadedError where all together would be too much."""
        if self.bodies.held_bytes + nbytes > self.bodies.max_bytes:
            raise OverloadedError("too many large requests are being received: try again")
        self.bodies.held_bytes += nbytes
        self.nbytes += nbytes


async def read_json(request: Request, limits: BodyLimits = DEFAULT_LIMITS, bodies: Bodies | None = None) -> Any:
    """The body's value. Raises BodyError and its kinds (413, 408), OverloadedError.

    A client that leaves raises starlette's ClientDisconnect.
    """
    async with (bodies or Bodies(limits.max_bytes)).hold() as share:
        try:
            async with asyncio.timeout(limits.timeout_s):
                data = await _read(request, limits, share)
        except TimeoutError as error:
            raise BodyTimeoutError(f"the body was not complete after {limits.timeout_s:g} s") from error
        if len(data) <= _IN_A_THREAD_BYTES:
            return parse_json(data, limits)
        # Streams of other requests go on meanwhile.
        return await asyncio.to_thread(parse_json, data, limits)


async def _read(request: Request, limits: BodyLimits, share: _Share) -> bytes:
    declared = request.headers.get("content-length", "")
    # Before a byte is read; a length that is no number never gets here.
    if declared.isdecimal() and int(declared[:20]) > limits.max_bytes:
        raise _too_large(limits)
    data = bytearray()
    async for piece in request.stream():
        if len(data) + len(piece) > limits.max_bytes:
            raise _too_large(limits)
        share.grow(len(piece))
        data += piece
    return bytes(data)


def _too_large(limits: BodyLimits) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than the limit of {limits.max_bytes / (1 << 20):g} MiB")


def parse_json(data: bytes, limits: BodyLimits = DEFAULT_LIMITS) -> Any:
    """Strict JSON (RFC 8259 and I-JSON, RFC 7493). Raises BodyError."""
    if not data.strip():
        raise BodyError("the body is empty: send JSON")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BodyError(f"the body is not UTF-8: byte {error.start} is wrong") from error
    _check_shape(text, limits)
    decoder = json.JSONDecoder(
        object_pairs_hook=_object,
        parse_constant=_constant,
        parse_float=_float,
        parse_int=lambda digits: _int(digits, limits),
    )
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise BodyError(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _check_shape(text: str, limits: BodyLimits) -> None:
    """Depth and count, before anything is built: brackets outside of strings."""
    # What most bodies are, pictures among them: too few brackets to be deep, wherever they stand.
    if (
        text.count("[") + text.count("{") <= limits.max_depth
        and 2 * text.count(",") + text.count('"') < limits.max_tokens
    ):
        return
    depth = 0
    for count, match in enumerate(_TOKEN.finditer(text), 1):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            if depth > limits.max_depth:
                raise BodyError(f"the body is nested more than {limits.max_depth} deep")
        elif first in "]}":
            depth -= 1
        if count > limits.max_tokens:
            raise BodyError("the body has too many values")


def _check_surrogates(value: Any) -> None:
    """Half a character can't be written anywhere again."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BodyError("the body has half of a surrogate pair, which is no text") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        double, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise BodyError(f"the body has the key {double[:80]!a} twice in one object")
    return found


def _constant(name: str) -> Any:
    raise BodyError(f"the body has {name}, which is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BodyError(f"the number {text[:40]} is too large")
    return value


def _int(digits: str, limits: BodyLimits) -> int:
    if len(digits) > limits.max_digits:
        raise BodyError(f"a whole number has {len(digits)} digits, more than {limits.max_digits}")
    return int(digits)
