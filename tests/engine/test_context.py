"""Conversations that are too long, and answers that outgrow the context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine import admission, context, scheduler
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.errors import ContextLengthError, InputError, InternalError, UsageError
from mlxvlm.messages import ImagePart, Message, TextPart, ToolCall, assistant, system, user
from mlxvlm.processors.base import PreparedImage, Prompt
from tests.engine.test_admission import Wide
from tests.fakes import (
    FakeModel,
    FakeProcessor,
    FakeTokenizer,
    answer,
    ask,
    eventually,
    fake_engine,
    is_empty,
    next_token,
)

KEPT = 4  # without a system turn


def dropped(ids: Sequence[int], keep: int = KEPT) -> list[int]:
    """The slow twin of a shift of text."""
    keep = min(keep, (len(ids) - 1) // 2)
    return [*ids[:keep], *ids[keep + max((len(ids) - keep) // 2, 1) :]]


def endless(ids: Sequence[int], count: int, room: int, keep: int = KEPT) -> list[int]:
    """An answer that shifts, on paper."""
    held, given = list(ids), []
    for _ in range(count):
        if len(held) == room:
            held = dropped(held, keep)
        given.append(next_token(held))
        held.append(given[-1])
    return given


def tokens(completion: Completion) -> list[int]:
    return list(completion.token_ids)


PICTURES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), max_size=4)


@settings(max_examples=300, deadline=None)
@given(pictures=PICTURES, tail=st.integers(1, 20), answered=st.integers(1, 40), keep=st.integers(0, 30))
def test_what_a_shift_leaves(pictures: list[tuple[int, int]], tail: int, answered: int, keep: int) -> None:
    """All but one run of tokens, whole pictures, the end, and little enough to go on for a while."""
    images, length = [], 0
    for text, size in pictures:
        span = (length + text, length + text + size)
        images.append(PreparedImage(np.zeros(1, np.float32), (1,), span, b""))
        length = span[1]
    prompt = Prompt(tuple(range(length + tail)), tuple(images))
    ids = tuple(range(length + tail + answered))
    left = context.shifted(prompt, ids[length + tail :], keep)
    gaps = [one + 1 for one, other in pairwise((-1, *left.token_ids)) if other != one + 1]
    assert len(gaps) == 1
    start, end = gaps[0], gaps[0] + len(ids) - len(left.token_ids)
    assert left.token_ids == ids[:start] + ids[end:]
    assert start <= keep
    assert left.token_ids[-1] == ids[-1]
    rest = len(ids) - start
    assert end - start >= max(rest // 4, 1)
    whole = [image.span for image in images if image.span[1] <= start or image.span[0] >= end]
    assert [left.token_ids[slice(*image.span)] for image in left.images] == [ids[slice(*span)] for span in whole]
    assert all(
        end <= span[0] or span[1] <= start or start <= span[0] <= span[1] <= end for span in (i.span for i in images)
    )
    if not images:
        assert list(left.token_ids) == dropped(ids, keep)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 19), st.integers(1, 90)), min_size=1, max_size=5),
    chunk=st.sampled_from([3, 100]),
    kept=st.sampled_from([0, 1 << 20]),
    room=st.integers(20, 30),
)
def test_answers_that_outgrow_the_context(rows: list[tuple[int, int]], chunk: int, kept: int, room: int) -> None:
    settings = {"context_shift": True, "max_context": room, "max_rows": 3, "prefix_cache_bytes": kept}
    with fake_engine(**settings, prefill_chunk_while_decoding=chunk, prefix_block_tokens=3) as engine:
        asked = [([number] * length, count) for number, (length, count) in enumerate(rows, 1)]
        streams = [engine.submit(ask(ids, count)) for ids, count in asked]
        for (ids, count), stream in zip(asked, streams, strict=True):
            done = stream.result()
            assert tokens(done) == endless(ids, count, room)
            assert done.finish_reason == "length"
            assert done.text == FakeTokenizer().decode(done.token_ids)
            usage = done.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), count)
            assert 0 <= usage.cached_tokens < len(ids)
        stats = engine.stats().prefix_cache
        assert stats.hits + stats.misses == len(rows)
        assert eventually(lambda: is_empty(engine))


def test_without_it_the_context_is_the_end() -> None:
    with fake_engine(max_context=20) as engine:
        done = engine.generate(ask([1, 2], 90))
    assert (tokens(done), done.finish_reason) == (answer([1, 2], 18), "length")


@pytest.mark.parametrize("room", [2, 3, 4, 5])
def test_tiny_contexts(room: int) -> None:
    with fake_engine(max_context=room, context_shift=True) as engine:
        assert tokens(engine.generate(ask([7], 20))) == endless([7], 20, room)
        with pytest.raises(ContextLengthError, match=f"has {room} tokens"):
            engine.generate(ask([1] * room, 3))


def test_only_of_a_prompt_with_images_less_are_asked() -> None:
    with fake_engine(max_context=20) as engine:
        with pytest.raises(ContextLengthError, match=r"context is 20: shorten it$"):
            engine.generate(ask([1] * 20, 3))
        with pytest.raises(ContextLengthError, match=r"images\), but .*: shorten it or send fewer images$"):
            engine.generate(Request(conversation([("user", 18, 1)]), SamplingParams(max_tokens=3)))


def test_an_answer_without_a_limit_goes_on_until_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (admission, scheduler):
        monkeypatch.setattr(module, "ANSWER_STEP", 8)
    with fake_engine(max_context=50, context_shift=True) as engine:
        stream, found = engine.submit(ask([3, 1], None)), []
        for delta in stream:
            found += delta.token_ids
            if len(found) == 300:
                stream.cancel()
        assert found == endless([3, 1], len(found), 50)
        assert len(found) >= 300
        assert eventually(lambda: is_empty(engine))


def test_stops_and_penalties_go_on() -> None:
    """A stop string over the seam; counts of tokens that are gone."""
    whole = endless([1, 2], 60, 19)
    seam = "".join(FakeTokenizer().decode(whole[15:20]))
    with fake_engine(max_context=19, context_shift=True) as engine:
        done = engine.generate(ask([1, 2], 60, stop=(seam,)))
        assert (tokens(done), done.finish_reason) == (whole[:20], "stop")
        assert done.text == FakeTokenizer().decode(whole[:15])
        found = tokens(engine.generate(ask([1, 2], 90, frequency_penalty=1.9)))
        drawn = [tokens(engine.generate(ask([1, 2], 90, temperature=3.0, seed=5))) for _ in range(2)]
    held, counts, expected = [1, 2], np.zeros(61), []
    for _ in range(90):
        held = dropped(held) if len(held) == 19 else held
        logits = -1.9 * counts
        logits[next_token(held)] += 5
        expected.append(int(logits.argmax()))
        counts[expected[-1]] += 1
        held.append(expected[-1])
    assert found == expected
    assert expected != endless([1, 2], 90, 19)  # the penalty decides
    assert drawn[0] == drawn[1]
    # A row that began anew would draw the noise of its first steps again.
    assert len({tuple(drawn[0][start : start + 8]) for start in range(0, 80, 8)}) == 10


@pytest.mark.parametrize("fails", [True, False])
def test_a_shift_that_fails_or_is_cancelled_ends_alone(fails: bool) -> None:
    """Prompts come in one by one; a shift is the only forward pass of many tokens."""
    streams: list[Any] = []

    def on_call(x: mx.array) -> None:
        if x.shape[1] > 5 and fails:
            raise ZeroDivisionError("a defect")
        if x.shape[1] > 5:
            streams[0].cancel()

    with fake_engine(FakeModel(on_call=on_call), max_context=20, context_shift=True) as engine:
        other = engine.submit(ask([5], 15))
        streams.append(engine.submit(ask([1, 2], 90)))
        if fails:
            with pytest.raises(InternalError, match="a defect"):
                streams[0].result()
        else:
            done = streams[0].result()
            assert done.finish_reason == "cancelled"
            assert tokens(done) == endless([1, 2], len(done.token_ids), 20)
        assert tokens(other.result()) == answer([5], 15)
        assert eventually(lambda: is_empty(engine))


@pytest.mark.parametrize(("count", "kv_bits"), [(3000, None), (None, 8)])
def test_shifts_stay_within_what_is_reserved(count: int | None, kv_bits: int | None) -> None:
    reserved: list[int] = []
    model = Wide(2, lambda x: reserved.append(engine.stats().reserved_bytes))
    with fake_engine(model, max_context=700, max_rows=3, context_shift=True, kv_bits=kv_bits) as engine:
        engine.generate(ask([1], 2))
        floor = mx.get_active_memory()
        reserved.clear()
        mx.reset_peak_memory()
        streams = [engine.submit(ask([number] * length, count)) for number, length in ((1, 3), (2, 600), (3, 30))]
        for number, (stream, length) in enumerate(zip(streams, (3, 600, 30), strict=True), 1):
            found: list[int] = []
            for delta in stream:
                found += delta.token_ids
                if len(found) == 900:
                    stream.cancel()
            assert found[:900] == endless([number] * length, 900, 700)
        assert mx.get_peak_memory() - floor <= max(reserved)
        if count is not None:  # no row has reserved more, or less, than at its beginning
            assert len(set(reserved)) <= 2 * len(streams) + 1


@pytest.mark.parametrize("count", [3000, None])
def test_the_prompts_of_shifts_are_reserved_for(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be longer than the request's own."""
    monkeypatch.setattr(admission, "ANSWER_STEP", 64)
    reserved: list[int] = []
    model = FakeModel(on_call=lambda x: reserved.append(engine.stats().reserved_bytes))
    with fake_engine(model, max_context=900, context_shift=True) as engine:
        stream = engine.submit(ask([1] * 20, count))
        next(iter(stream))
        stream.cancel()
        rows = engine._admission
        need = rows.need(Prompt((1,) * 20), 880 if count else 64, 900)
        assert need.held > rows.need(Prompt((1,) * 20), 1).held + 800 * 4
        assert reserved[0] == rows.bytes_of([need])


def test_what_is_kept_after_a_shift_is_what_was_run() -> None:
    settings = {"prefix_cache_bytes": 1 << 20, "prefix_block_tokens": 1, "max_context": 19, "context_shift": True}
    with fake_engine(**settings) as engine:
        found = tokens(engine.generate(ask([1, 2], 22)))
        left = dropped([1, 2, *found[:17]])
        for tail in (found[17:], found):
            prompt = [*left, *tail[:5], 3]
            again = engine.generate(ask(prompt, 1))
            assert tokens(again) == answer(prompt, 1)
            assert (again.usage.cached_tokens > len(left)) == (tail == found[17:])


def test_a_system_turn_is_kept() -> None:
    """With what the template writes in front of the next turn; the fake's writes nothing."""
    messages = [system("012345678"), user("99")]
    with fake_engine(max_context=30, context_shift=True) as engine:
        found = tokens(engine.generate(Request(messages, SamplingParams(max_tokens=80))))
        assert found == endless([*range(9), 9, 9], 80, 30, keep=9)
        prompt = FakeProcessor()(messages)
        again = Request(messages, SamplingParams(max_tokens=80), prompt=prompt)
        assert tokens(engine.generate(again)) == found


def test_a_template_that_refuses_the_system_turn_alone() -> None:
    class Stubborn(FakeProcessor):
        def __call__(self, messages: Any, *args: Any) -> Prompt:
            if len(messages) < 3:
                raise InputError("three turns at least")
            return super().__call__(messages, *args)

    request = Request([system("0123456"), user("1"), assistant("2"), user("3")])
    assert context.kept_beginning(Stubborn(), request, Prompt((1, 2))) == KEPT


# Truncation.


def conversation(turns: Sequence[tuple[str, int, int]]) -> list[Message]:
    """Turns of (role, letters, pictures); a tool's result follows its call."""
    found = []
    for number, (role, letters, pictures) in enumerate(turns):
        parts = (*(ImagePart(number + n) for n in range(pictures)), TextPart(chr(ord("1") + number % 50) * letters))
        calls = (ToolCall("1", "f", "{}"),) if role == "call" else ()
        found.append(Message("assistant" if role == "call" else role, parts, calls))  # type: ignore[arg-type]
        if calls:
            found.append(Message("tool", (TextPart("8"),), tool_call_id="1"))
    return found


def cut(messages: Sequence[Message], limit: int) -> Prompt:
    """The slow twin: one exchange after the other."""
    starts = [index for index, message in enumerate(messages) if message.role == "user"]
    first = [message for message in messages[: starts[0]] if message.role == "system"]
    for start in sorted({len(first), *starts}):
        prompt = FakeProcessor()([*first, *messages[start:]])
        if len(prompt.token_ids) <= limit:
            break
    return prompt


TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "call"]), st.integers(1, 30), st.integers(0, 2)), max_size=9
)


@settings(max_examples=150, deadline=None)
@given(turns=TURNS, has_system=st.booleans(), asked=st.sampled_from([None, 3, 1000]))
def test_the_oldest_exchanges_go(turns: list[tuple[str, int, int]], has_system: bool, asked: int | None) -> None:
    messages = [*([system("000")] if has_system else []), *conversation([*turns, ("user", 5, 1)])]
    processor, config = FakeProcessor(), EngineConfig(60, frozenset())
    request = Request(messages, truncate=True)
    found = context.make_prompt(processor, config, request, asked)
    expected = cut(messages, 60 - min(asked or 256, 15))
    assert found.token_ids == expected.token_ids
    assert [image.digest for image in found.images] == [image.digest for image in expected.images]
    assert [image.span for image in found.images] == [image.span for image in expected.images]
    assert processor.opened <= sum(len(message.images) for message in messages)


def test_an_engine_truncates() -> None:
    messages = conversation([("user", 30, 0), ("call", 4, 0), ("assistant", 1, 0), ("user", 20, 1)])
    with fake_engine(max_context=50) as engine:
        with pytest.raises(ContextLengthError, match="has 60 tokens"):
            engine.generate(Request(messages, SamplingParams(max_tokens=5)))
        done = engine.generate(Request(messages, SamplingParams(max_tokens=5), truncate=True))
        assert done.usage.prompt_tokens == 24
        assert tokens(done) == answer([3] * 3 + [0] + [4] * 20, 5)
        with pytest.raises(ContextLengthError, match="has 70 tokens"):
            engine.generate(Request([user("1"), user("2" * 70)], SamplingParams(max_tokens=5), truncate=True))
        # The last turn alone is not too long, but leaves less than a quarter of the context.
        assert tokens(engine.generate(Request([user("1"), user("2" * 49)], truncate=True))) == answer([2] * 49, 1)


def test_pictures_that_alone_are_too_much_are_dropped_too() -> None:
    class Small(FakeProcessor):
        def __call__(self, messages: Any, *args: Any) -> Prompt:
            if sum(len(message.images) for message in messages) > 1:
                raise ContextLengthError("2 images alone take more than the model's context")
            return super().__call__(messages, *args)

    config, turns = EngineConfig(60, frozenset()), conversation([("user", 1, 1)] * 3)
    found = context.make_prompt(Small(), config, Request(turns, truncate=True), 5)
    assert found.token_ids == FakeProcessor()(turns[-1:]).token_ids
    with pytest.raises(ContextLengthError, match="images alone"):
        context.make_prompt(Small(), config, Request(conversation([("user", 1, 2)]), truncate=True), 5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kv_bits": 3}, "kv_bits must be 8 or 4"),
        ({"kv_group_size": 48}, r"kv_group_size must be one of \(32, 64, 128"),
    ],
)
def test_settings_are_checked(setting: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineConfig(100, frozenset(), **setting)  # type: ignore[arg-type]
