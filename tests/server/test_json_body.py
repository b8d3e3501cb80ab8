"""Bodies that are too much, too slow, too deep, or no JSON; and that all else is what json.loads reads."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from mlxvlm.errors import BodyError, BodyTimeoutError, BodyTooLargeError, OverloadedError
from mlxvlm.server import json_body
from mlxvlm.server.json_body import Bodies, BodyLimits, parse_json, read_json
from tests.server.asgi import scope_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
LIMITS = BodyLimits(max_bytes=100, timeout_s=0.05)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_reads_what_json_reads(value: Any, ascii_only: bool, indent: int | None) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert parse_json(data) == json.loads(data)


PIECES = st.sampled_from([*'{}[]":,\\ 01-.eE', "null", "true", "\\u12", "\\ud800", "é", '"a"', "NaN", "\n", '\\"'])


@given(st.lists(PIECES | st.characters(), max_size=30).map("".join) | st.text())
def test_never_takes_more_than_json_does(text: str) -> None:
    data = text.encode(errors="surrogatepass")
    try:
        value = parse_json(data)
    except BodyError:
        return
    assert value == json.loads(data)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@given(st.binary(max_size=60))
def test_bytes(data: bytes) -> None:
    try:
        value = parse_json(data)
    except BodyError:
        return
    assert value == json.loads(data.decode())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"{", "is not JSON"),
        (b"[1,]", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b'{"a": "\x00"}', "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'"\xff"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),  # a surrogate as bytes
        (b"NaN", "NaN"),
        (b'{"a": [Infinity]}', "Infinity"),
        (b"-Infinity", "-Infinity"),
        (b"1e999", "too large"),
        (b"-1e999", "too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"x": {"\\u0061": 1, "a": 1}}', "the key 'a' twice"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDC00": 1}', "surrogate"),
        (b'["\\ud83d\\ude00", "\\ude00\\ud83d"]', "surrogate"),
        (b"1" * 41, "41 digits"),
        (b"1" * 1_000_000, "1000000 digits"),
        (b"[" * 65 + b"]" * 65, "more than 64 deep"),
        (b"[" * 10_000 + b"]" * 10_000, "more than 64 deep"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "more than 64 deep"),
        (b"[" * 1_000_000, "more than 64 deep"),
        (b'"\\"[' + b"[" * 100, "is not JSON"),
    ],
)
def test_refusals(body: bytes, words: str) -> None:
    with pytest.raises(BodyError, match=words):
        parse_json(body)


def test_what_only_looks_deep_or_odd() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(b'["' + b"[" * 100 + b'"]') == ["[" * 100]
    assert parse_json(b'["\\"' + b"{" * 100 + b'\\\\"]') == ['"' + "{" * 100 + "\\"]
    assert parse_json(b'"NaN \\ud83d\\ude00 \\\\ud800"') == "NaN \U0001f600 \\ud800"
    assert parse_json(b"[" + b"[]," * 99 + b"[]]") == [[]] * 100
    assert parse_json(b"1" * 40) == int("1" * 40)
    assert math.isclose(parse_json(b"1e308"), 1e308)


def test_too_many_values() -> None:
    limits = BodyLimits(max_tokens=10)
    assert parse_json(b"[" + b"1," * 7 + b"1]", limits) == [1] * 8
    with pytest.raises(BodyError, match="too many values"):
        parse_json(b"[" + b"1," * 9 + b"1]", limits)
    with pytest.raises(BodyError, match="too many values"):
        parse_json(b'""' * 11, limits)


def test_escapes_without_end() -> None:
    # Each is a case for a pattern that would try again from every quote or backslash.
    for text in ('"' + '\\"' * 200_000, '"' + "\\" * 400_001, '\\"' * 200_000):
        with pytest.raises(BodyError):
            parse_json(text.encode())


def read(
    pieces: Iterable[bytes], limits: BodyLimits = LIMITS, length: int | None = None, hang: bool = False, **more: Any
) -> Any:
    waiting = list(pieces)

    async def receive() -> dict[str, Any]:
        if not waiting:
            assert hang, "more was read than was needed"
            await asyncio.sleep(60)
        piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting) or hang}

    headers = {} if length is None else {"Content-Length": str(length)}
    return asyncio.run(read_json(Request(scope_of("POST", "/", headers), receive), limits, **more))


def test_reading() -> None:
    assert read([b'{"a"', b": 1}"]) == {"a": 1}
    assert read([b'"' + b"x" * 98 + b'"'], length=100) == "x" * 98


def test_too_large_by_its_own_word() -> None:
    with pytest.raises(BodyTooLargeError):
        read([], length=101)  # nothing is read
    with pytest.raises(BodyTooLargeError):
        read([], length=10**30)


def test_too_large_without_a_word() -> None:
    with pytest.raises(BodyTooLargeError, match="MiB"):
        read([b"x" * 60, b"x" * 41, b"never read"])
    with pytest.raises(BodyTooLargeError):
        read([b"x" * 60, b"x" * 41], length=7)


def test_slow_bodies() -> None:
    with pytest.raises(BodyTimeoutError, match=r"0\.05 s"):
        read([b"["], hang=True)


def test_many_bodies_at_once() -> None:
    bodies = Bodies(max_bytes=150)
    limits = BodyLimits(max_bytes=100)

    async def both() -> list[Any]:
        go = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if bodies.held_bytes >= 90:
                go.set()
                await asyncio.sleep(0.05)
                return {"type": "http.request", "body": b"]", "more_body": False}
            return {"type": "http.request", "body": b"[" + b" " * 89, "more_body": True}

        async def second() -> Any:
            await go.wait()

            async def whole() -> dict[str, Any]:
                return {"type": "http.request", "body": b"[]" + b" " * 70, "more_body": False}

            return await read_json(Request(scope_of("POST", "/", {}), whole), limits, bodies)

        first = read_json(Request(scope_of("POST", "/", {}), receive), limits, bodies)
        return await asyncio.gather(first, second(), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first == []
    assert isinstance(second, OverloadedError)
    assert bodies.held_bytes == 0
    assert read([b"[" + b" " * 98 + b"]"], limits, bodies=bodies) == []


def test_large_bodies_are_parsed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def spy(data: bytes, limits: BodyLimits) -> Any:
        threads.append(threading.current_thread().name)
        return parse_json(data, limits)

    monkeypatch.setattr(json_body, "parse_json", spy)
    limits = BodyLimits()
    assert read([b"[]"], limits) == []
    assert len(read([b'"' + b"x" * 70_000 + b'"'], limits)) == 70_000
    assert threads[0] == "MainThread"
    assert threads[1] != "MainThread"
