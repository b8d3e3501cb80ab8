"""Whatever fails, hangs, times out or goes away: the others get their tokens, memory and threads come back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.request import Request
from mlxvlm.engine.rows import Alone
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import InternalError, MlxvlmError
from mlxvlm.messages import Message, TextPart
from tests.engine.test_engine import ids_of
from tests.fakes import (
    VOCAB,
    FakeModel,
    FakeProcessor,
    Gate,
    answer,
    ask,
    eventually,
    fake_engine,
    is_empty,
    look_at,
    looked,
)

BAD = 32  # a token, picture or prompt length that breaks the model
pytestmark = pytest.mark.usefixtures("nothing_is_left")


def returns_to(engine: Engine, floor: int) -> bool:
    return eventually(lambda: is_empty(engine) and mx.get_active_memory() <= floor)


def floor_of(engine: Engine) -> int:
    engine.generate(ask([1], 2))
    assert eventually(lambda: is_empty(engine))
    return mx.get_active_memory()


class Fragile(FakeModel):
    """Fails for the picture BAD, for a prompt of BAD tokens, and in any step where a row's last token is BAD."""

    def __call__(self, inputs: Any, cache: Any) -> mx.array:
        length = inputs.embeds.shape[1]
        if length == BAD - 1 or (length == 1 and bool((inputs.embeds[:, 0, 0] == BAD).any())):
            raise InternalError("the device failed")  # an error that is passed on as it is
        return super().__call__(inputs, cache)

    def encode_images(self, images: Any) -> list[mx.array]:
        if any(int(image.pixels[0]) == BAD for image in images):
            raise MemoryError("the tower failed")
        return super().encode_images(images)


SOUND = [ids for ids in ([token] * 3 for token in range(1, 50)) if BAD not in answer(ids, 40)]
BREAKING = next([token] for token in range(1, 50) if BAD in answer([token], 40)[3:20])


@pytest.mark.parametrize(
    "bad",
    [look_at(BAD, [2], 9), ask([1] * BAD), ask(BREAKING, 40), Request([Message("user", (TextPart("crash"),))])],
    ids=["vision", "prefill", "decode", "processor"],
)
def test_who_fails_ends_alone(bad: Request) -> None:
    kept: list[BaseException] = []
    with fake_engine(Fragile(), prefill_chunk_while_decoding=64) as engine:
        floor = floor_of(engine)
        others = [engine.submit(ask(ids, 40)) for ids in SOUND[:3]]
        seeing = engine.submit(look_at(7, [2], 4))
        for _ in range(3):
            with pytest.raises(InternalError, match=r"failed|a defect") as caught:
                engine.generate(bad)
            kept.append(caught.value)
        assert ids_of(seeing.result()) == looked(7, [2], 4)
        for ids, stream in zip(SOUND, others, strict=False):
            assert ids_of(stream.result()) == answer(ids, 40)
        # Also while the errors are kept, and with them the frames that they came through.
        assert returns_to(engine, floor)
    assert len(kept) == 3


def test_a_step_that_fails_for_nobody_in_particular_is_run_again() -> None:
    failures = [True]

    def explode(x: mx.array) -> None:
        if x.shape[0] == 3 and failures:
            failures.pop()
            raise RuntimeError("the device failed")

    with fake_engine(FakeModel(on_call=explode)) as engine:
        settings_of = [{"temperature": 3.0, "seed": 5}, {"frequency_penalty": 2.0}, {}]
        requests = [ask(ids, 300, **more) for ids, more in zip(SOUND, settings_of, strict=False)]
        alone = [ids_of(engine.generate(request)) for request in requests]
        streams = [engine.submit(request) for request in requests]
        assert [ids_of(stream.result()) for stream in streams] == alone
    assert not failures


def test_text_that_can_not_be_decoded_ends_its_row_alone() -> None:
    with fake_engine() as engine:
        decode = engine.processor.tokenizer.decode

        def fail(ids: Sequence[int]) -> str:
            if BAD in ids:
                raise ValueError("no such token")
            return decode(ids)

        engine.processor.tokenizer.decode = fail
        others = [engine.submit(ask(ids, 40)) for ids in SOUND[:3]]
        with pytest.raises(InternalError, match="no such token"):
            engine.generate(ask(BREAKING, 40))
        for ids, stream in zip(SOUND, others, strict=False):
            assert ids_of(stream.result()) == answer(ids, 40)


class PanicException(BaseException):
    """What comes out of a Rust library that panics: no Exception."""


@pytest.mark.parametrize("where", ["encode", "decode"])
def test_a_panic_ends_its_request_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(what: Any) -> Any:
        if BAD in (what if where == "decode" else [ord(c) - ord("0") for c in what]):
            raise PanicException("index out of bounds")
        return tokenizer_does(what)

    with fake_engine() as engine:
        tokenizer_does = getattr(engine.processor.tokenizer, where)
        monkeypatch.setattr(engine.processor.tokenizer, where, panic)
        other = engine.submit(ask(SOUND[0], 40))
        with pytest.raises(InternalError, match="PanicException: index out of bounds"):
            engine.generate(ask(BREAKING if where == "decode" else [BAD], 40))
        assert ids_of(other.result()) == answer(SOUND[0], 40)


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), SystemExit(3)])
def test_a_panic_while_loading_is_raised_where_the_engine_is_made(error: BaseException) -> None:
    def build(progress: Any) -> Any:
        raise error

    with pytest.raises(type(error)):
        Engine(build, FakeProcessor(), EngineConfig(100, frozenset()))


def test_a_row_without_keys_and_values_ends() -> None:
    gate = Gate()
    gate.opened.set()
    with fake_engine(FakeModel(on_call=lambda x: x.shape[1] == 1 or gate(x))) as engine:
        lost = engine.submit(ask([1], 4000))
        next(iter(lost))
        gate.opened.clear()
        other = engine.submit(ask([1, 2, 3], 5))
        assert gate.entered.wait(30)
        engine._runner.batch.groups.clear()
        gate.opened.set()
        with pytest.raises(InternalError, match="lost its keys and values"):
            lost.result()
        assert ids_of(other.result()) == answer([1, 2, 3], 5)


def test_a_defect_of_the_tick_ends_what_is_open_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_engine() as engine:
        streams = [engine.submit(ask([number], 4000)) for number in (1, 2)]
        for stream in streams:
            next(iter(stream))
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler, "grow", lambda: 1 / 0)
            for stream in streams:
                with pytest.raises(InternalError, match="ZeroDivisionError"):
                    stream.result()
            assert eventually(lambda: engine._decoding.pending is None)  # and the thread sleeps
        assert ids_of(engine.generate(ask([3], 5))) == answer([3], 5)


def test_a_consumer_that_never_reads_holds_up_nobody() -> None:
    with fake_engine() as engine:
        floor = floor_of(engine)
        unread = [engine.submit(ask([number], 50)) for number in range(1, 6)]
        assert ids_of(engine.generate(ask([7], 60))) == answer([7], 60)
        assert returns_to(engine, floor)
        assert [stream._items.qsize() for stream in unread] == [50] * 5
        assert ids_of(unread[2].result()) == answer([3], 50)


def test_a_thousand_cancels_at_random_moments() -> None:
    chance = random.Random(7)
    with fake_engine(max_rows=6, num_workers=3, prefill_chunk=7, prefill_chunk_while_decoding=3) as engine:
        floor = floor_of(engine)
        outstanding: list[Stream] = []
        staying: list[tuple[list[int], Stream]] = []
        for number in range(1000):
            ids = [chance.randrange(1, VOCAB - 2) for _ in range(chance.randrange(1, 30))]
            if number % 25 == 0:
                staying.append((ids, engine.submit(ask(ids, 12))))
            request = ask(ids, 60) if chance.random() < 0.7 else look_at(chance.randrange(60), ids, 60)
            outstanding.append(engine.submit(request))
            while len(outstanding) > 20 or (outstanding and chance.random() < 0.3):
                stream = outstanding.pop(chance.randrange(len(outstanding)))
                if chance.random() < 0.1:
                    next(iter(stream))
                stream.cancel()
                stream.cancel()
        for stream in outstanding:
            stream.cancel()
        for ids, stream in staying:
            assert ids_of(stream.result()) == answer(ids, 12)
        assert returns_to(engine, floor)


def test_engines_do_not_meet() -> None:
    with fake_engine() as one:
        floor = floor_of(one)
        long = one.submit(ask([1, 2], 300))
        with fake_engine(Fragile()) as other:
            with pytest.raises(InternalError):
                other.generate(ask([1] * BAD))
            assert ids_of(other.generate(ask([2], 9))) == answer([2], 9)
        assert ids_of(long.result()) == answer([1, 2], 300)
        assert returns_to(one, floor)


def test_an_engine_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with fake_engine(Fragile()) as engine:
        for request in (ask([1] * BAD), ask(BREAKING, 40), look_at(BAD, [2], 3)):
            with pytest.raises(InternalError):
                engine.generate(request)
    assert capfd.readouterr() == ("", "")


class Event:
    """Something that happens to one request at one of its deltas."""

    def __init__(self, kind: str, ids: list[int], count: int, after: int) -> None:
        self.kind, self.count, self.after = kind, count, after
        self.ids = [1] * BAD if kind == "prefill" else ids

    def request(self) -> Request:
        if self.kind == "crash":
            return Request([Message("user", (TextPart("crash"),))])
        if self.kind == "tower":
            return look_at(BAD, self.ids, self.count)
        if self.kind == "picture":
            return look_at(self.ids[0], self.ids, self.count)
        return ask(self.ids, None if self.kind == "cancel" else self.count)

    def expected(self) -> list[int]:
        if self.kind == "picture":
            return looked(self.ids[0], self.ids, self.count)
        return answer(self.ids, 100 if self.kind == "cancel" else self.count)


KINDS = st.sampled_from(["plain", "plain", "picture", "cancel", "crash", "tower", "prefill", "unread"])
EVENTS = st.builds(
    Event, KINDS, st.lists(st.integers(1, 29), min_size=1, max_size=20), st.integers(1, 20), st.integers(0, 9)
)


@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(EVENTS, min_size=1, max_size=12),
    max_rows=st.integers(1, 5),
    chunk=st.integers(1, 20),
    budget=st.integers(40, 400),
    kept=st.sampled_from([0, 2000, 1 << 20]),
)
def test_any_schedule_with_any_faults(events: list[Event], max_rows: int, chunk: int, budget: int, kept: int) -> None:
    floor = mx.get_active_memory()
    limits = {"max_rows": max_rows, "prefill_chunk": chunk, "prefill_chunk_while_decoding": chunk}
    limits |= {"prefix_cache_bytes": kept, "feature_cache_bytes": kept, "prefix_block_tokens": 3}
    with fake_engine(Fragile(), max_memory_bytes=floor + budget * 1000, **limits) as engine:
        streams = [engine.submit(event.request()) for event in events]
        for event, stream in zip(events, streams, strict=True):
            if event.kind != "unread":
                check(event, stream)
        assert eventually(lambda: is_empty(engine))


def check(event: Event, stream: Stream) -> None:
    found: list[int] = []
    try:
        for number, delta in enumerate(stream):
            found += delta.token_ids
            if event.kind == "cancel" and number >= event.after:
                stream.cancel()
    except MlxvlmError as error:
        message = str(error)
        is_fault = event.kind in ("crash", "tower", "prefill") or BAD in event.expected()
    else:
        assert found == event.expected()[: len(found)]
        assert len(found) == event.count or event.kind == "cancel"
        return
    assert is_fault or "memory budget" in message


class Doubting(Alone):
    """Ranks that note what they are told of."""

    def __init__(self) -> None:
        self.doubted: list[str] = []

    def doubt(self, failure: MlxvlmError) -> None:
        self.doubted.append(str(failure))


class Hiccup(FakeModel):
    """A device that fails once, when the batch is at its third step."""

    steps = 0

    def logits(self, hidden: mx.array) -> mx.array:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("out of memory")
        return super().logits(hidden)


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_other_ranks_are_told_of_a_failure_that_goes_away(speculation: str) -> None:
    ids = [1, 2, 1, 2, 1, 2]
    with fake_engine(speculation="off") as engine:
        expected = ids_of(engine.generate(ask(ids, 12)))
    ranks = Doubting()
    config = EngineConfig(4096, frozenset(), prefix_cache_bytes=0, feature_cache_bytes=0, speculation=speculation)
    with Engine(lambda progress: Hiccup(), FakeProcessor(), config, ranks=ranks) as engine:
        assert ids_of(engine.generate(ask(ids, 12))) == expected
    assert ranks.doubted == ["RuntimeError: out of memory"]
