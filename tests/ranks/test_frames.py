"""Messages come out as they went in, however the bytes are cut; whatever else comes is refused, and small."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.ranks.frames import BEAT, MAX_BYTES, BadFrameError, Decoder, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    messages=st.lists(JSON, max_size=6), beats=st.lists(st.integers(0, 6), max_size=4), cuts=st.lists(st.integers(1, 9))
)
def test_in_pieces_as_in_one(messages: list[Any], beats: list[int], cuts: list[int]) -> None:
    frames = [encode(message) for message in messages]
    for place in beats:
        frames.insert(place, BEAT)
    data, decoder, found = b"".join(frames), Decoder(), []
    for size in [*cuts, len(data)]:
        found += decoder.feed(data[:size])
        data = data[size:]
    assert found == messages


@given(first=JSON, second=JSON)
def test_whoever_takes_what_is_missing_takes_one_message(first: Any, second: Any) -> None:
    data, decoder = encode(first) + encode(second), Decoder()
    found: list[Any] = []
    while not found:
        size = decoder.missing
        assert size > 0
        found += decoder.feed(data[:size])
        data = data[size:]
    assert found == [first]
    assert data == encode(second)


@given(data=st.binary(max_size=200))
def test_garbage_is_a_message_or_refused(data: bytes) -> None:
    decoder = Decoder(64)
    try:
        list(decoder.feed(data))
    except BadFrameError:
        return
    assert len(decoder._buffer) < 4 + 64  # it waits for no more than it would take


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000 + b"e", b'{"a":'])
def test_no_json(text: bytes) -> None:
    with pytest.raises(BadFrameError, match="no JSON"):
        list(Decoder().feed(struct.pack("!I", len(text)) + text))


def test_what_is_too_long_is_refused_before_it_comes() -> None:
    with pytest.raises(BadFrameError, match="where 16777216 are allowed"):
        list(Decoder().feed(struct.pack("!I", MAX_BYTES + 1)))
    with pytest.raises(ValueError, match="longer than"):
        encode("x" * MAX_BYTES)
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(float("nan"))
