"""Timeouts, cancelling, draining and closing, in every phase of a request."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from functools import partial
from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.draft_model import Draft
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import EngineClosedError, InputError, OverloadedError, UsageError
from mlxvlm.messages import ImagePart, Message, TextPart, user
from tests.engine.conftest import our_threads
from tests.engine.test_engine import ids_of
from tests.fakes import (
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
from tests.golden import GOLDENS, Case

pytestmark = pytest.mark.usefixtures("nothing_is_left")
FAMILIES = ("idefics3_split", "llama4_norms", "llava_next_tiles", "mllama_tiles", "qwen2_vl_tied")
PHASES = ("preparing", "waiting", "vision", "prefill", "decode")


class Slow(FakeProcessor):
    """Stays in a prompt that says "wait" until told."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def __call__(self, messages: Any, *rest: Any) -> Any:
        if messages[0].text == "wait":
            self.gate(mx.array(0))
            raise InputError("never prepared")
        return super().__call__(messages, *rest)


class Stage:
    """An engine that stays in one phase of a request until `leave` is called."""

    def __init__(self, phase: str) -> None:
        self.gate = Gate()
        model = FakeModel(on_call=self._on_call)
        encode = model.encode_images
        model.encode_images = lambda images: self._gated("vision") or encode(images)  # type: ignore[method-assign]
        self._phase = phase
        self.engine = fake_engine(model, max_rows=1, num_workers=1)
        self.engine.processor = Slow()
        if phase == "preparing":
            self.gate = self.engine.processor.gate

    def _gated(self, phase: str) -> None:
        if phase == self._phase:
            self.gate(mx.array(0))

    def _on_call(self, x: mx.array) -> None:
        self._gated("decode" if x.shape[1] == 1 else "prefill")
        if self._phase == "waiting":
            self.gate(x)

    def submit(self, timeout_s: float | None = None) -> Stream:
        """A request that is in the phase when this returns."""
        if self._phase == "waiting":
            self.engine.submit(ask([1, 2], 2))
            assert self.gate.entered.wait(30)
        parts = (TextPart("wait"),) if self._phase == "preparing" else (ImagePart(7), TextPart("12"))
        stream = self.engine.submit(
            Request([Message("user", parts)], SamplingParams(max_tokens=9), timeout_s=timeout_s)
        )
        assert self.gate.entered.wait(30)
        if self._phase == "waiting":
            assert eventually(lambda: not self.engine._commands.empty())
        return stream


@pytest.mark.parametrize("phase", PHASES)
def test_timeouts(phase: str) -> None:
    stage = Stage(phase)
    with stage.engine as engine:
        timeout_s = 0.2
        stream = stage.submit(timeout_s)
        if phase == "preparing":
            completion = stream.result()  # while its processor still works
            stage.gate.opened.set()
        else:
            time.sleep(timeout_s)
            stage.gate.opened.set()
            completion = stream.result()
        assert completion.finish_reason == "timeout"
        assert ids_of(completion) == looked(7, [1, 2], 9)[: len(completion.token_ids)]
        assert len(completion.token_ids) <= 2
        assert ids_of(engine.generate(ask([3, 4], 5))) == answer([3, 4], 5)
        assert eventually(lambda: is_empty(engine))


def test_a_timeout_wakes_an_idle_engine_for_its_own_request_only() -> None:
    processor = Slow()
    with fake_engine(timeout_s=0.05, num_workers=1) as engine:
        engine.processor = processor
        wait = Request([Message("user", (TextPart("wait"),))])
        behind = engine.submit(ask([1], 5))
        streams = [engine.submit(wait), engine.submit(wait)]
        patient = engine.submit(Request(ask([2]).messages, SamplingParams(max_tokens=4), timeout_s=100.0))
        assert [stream.result().finish_reason for stream in streams] == ["timeout", "timeout"]
        processor.gate.opened.set()
        assert ids_of(patient.result()) == answer([2], 4)
        behind.result()


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf"), "3"])
def test_a_timeout_that_means_nothing_is_refused(timeout_s: Any) -> None:
    with fake_engine() as engine:
        with pytest.raises(UsageError, match="timeout_s"):
            engine.submit(Request(ask([1]).messages, timeout_s=timeout_s))
        assert engine.generate(Request(ask([1]).messages, SamplingParams(max_tokens=1), timeout_s=1e300)).token_ids


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("drain_s", [None, 0.01])
def test_closing(phase: str, drain_s: float | None) -> None:
    stage = Stage(phase)
    stream = stage.submit()
    closers = [threading.Thread(target=stage.engine.close, args=(drain_s, "it is late")) for _ in range(2)]
    for closer in closers:
        closer.start()
    assert eventually(stage.engine._closing.is_set)
    time.sleep(0.02)
    assert all(closer.is_alive() for closer in closers)  # neither returns while something runs
    stage.gate.opened.set()
    for closer in closers:
        closer.join(30)
    assert not our_threads()
    with pytest.raises(EngineClosedError, match="it is late"):
        stream.result()
    with pytest.raises(EngineClosedError, match="it is late"):
        stage.engine.submit(ask([1]))
    assert stage.engine._commands.empty()
    assert stage.engine.stats().running == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_closed_engine_keeps_no_model(name: str) -> None:
    """Even where it is itself kept, and no garbage is collected; its numbers can still be read."""
    case = Case(GOLDENS / name)
    source, floor = case.open(), mx.get_active_memory()
    build = partial(source.build, LoadOptions("float32"))
    config = EngineConfig(source.max_context, frozenset(), speculation="on")
    engine = Engine(build, source.processor, config, draft=Draft(build, source.processor, source.max_context))
    picture = user("What?", [GOLDENS / "images" / "wide.png"])
    engine.generate(Request([picture], SamplingParams(max_tokens=5), case.template))
    assert mx.get_active_memory() > floor
    engine.close()
    assert mx.get_active_memory() <= floor
    assert engine.stats().model_bytes > 0


def test_a_closed_engine_goes_away_with_what_was_never_prepared() -> None:
    processor, engine = Slow(), fake_engine(num_workers=1)
    engine.processor = processor
    engine.submit(Request([Message("user", (TextPart("wait"),))]))
    assert processor.gate.entered.wait(30)
    engine.submit(ask([5])).cancel()
    engine.submit(ask([6]))
    still_open = engine._open
    assert eventually(lambda: len(still_open) == 2)
    threading.Thread(
        target=lambda closing: eventually(closing.is_set) and processor.gate.opened.set(), args=(engine._closing,)
    ).start()
    engine.close()
    kept = weakref.ref(engine)
    del engine
    assert eventually(lambda: kept() is None)


def test_a_stream_keeps_nothing_of_what_has_ended() -> None:
    gate = Gate()
    with fake_engine(FakeModel(on_call=gate)) as engine:
        stream = engine.submit(look_at(7, [2], 4))
        kept = weakref.ref(next(iter(engine._open.values())))
        gate.opened.set()
        assert ids_of(stream.result()) == looked(7, [2], 4)
        assert eventually(lambda: kept() is None)
        stream.cancel()


def test_a_prompt_that_took_long_keeps_nothing_either() -> None:
    processor = Slow()
    with fake_engine() as engine:
        engine.processor = processor
        stream = engine.submit(Request([Message("user", (TextPart("wait"),))]))
        kept = weakref.ref(next(iter(engine._open.values())))
        processor.gate.opened.set()
        with pytest.raises(InputError):
            stream.result()
        assert eventually(lambda: kept() is None)


@pytest.mark.parametrize("phase", PHASES)
def test_cancelling(phase: str) -> None:
    stage = Stage(phase)
    with stage.engine as engine:
        stream = stage.submit()
        stream.cancel()
        if phase == "preparing":
            assert stream.result().finish_reason == "cancelled"
        stage.gate.opened.set()
        assert phase == "preparing" or stream.result().finish_reason == "cancelled"
        assert eventually(lambda: is_empty(engine))


def test_what_is_cancelled_before_it_is_prepared_never_is() -> None:
    seen: list[str] = []

    class Recorder(Slow):
        def __call__(self, messages: Any, *rest: Any) -> Any:
            seen.append(messages[0].text)
            return super().__call__(messages, *rest)

    processor = Recorder()
    with fake_engine(num_workers=1) as engine:
        engine.processor = processor
        first = engine.submit(Request([Message("user", (TextPart("wait"),))]))
        assert processor.gate.entered.wait(30)
        second = engine.submit(ask([5]))
        second.cancel()
        assert second.result().finish_reason == "cancelled"
        processor.gate.opened.set()
        with pytest.raises(InputError):
            first.result()
    assert seen == ["wait"]


def test_draining_lets_all_finish() -> None:
    engine = fake_engine(max_rows=2)
    streams = [engine.submit(ask([number, 3], 30)) for number in range(1, 8)]
    engine.close(drain_s=60)
    for number, stream in enumerate(streams, 1):
        assert ids_of(stream.result()) == answer([number, 3], 30)


def test_nothing_comes_in_while_draining() -> None:
    gate = Gate()
    engine = fake_engine(FakeModel(on_call=gate))
    stream = engine.submit(ask([1, 2], 5))
    assert gate.entered.wait(30)
    closer = threading.Thread(target=engine.close, args=(60,))
    closer.start()
    assert eventually(lambda: engine._refusing)
    with pytest.raises(EngineClosedError):
        engine.submit(ask([1]))
    gate.opened.set()
    closer.join(30)
    assert ids_of(stream.result()) == answer([1, 2], 5)


def test_coroutines_get_refusals_too() -> None:
    gate = Gate()

    async def main() -> None:
        with fake_engine(FakeModel(on_call=gate), max_rows=1, max_queue=1) as engine:
            running = engine.submit(ask([1, 2], 5))
            assert await asyncio.to_thread(gate.entered.wait, 30)
            engine.submit(ask([3]))
            with pytest.raises(OverloadedError):
                engine.submit(ask([4]))
            gate.opened.set()
            assert [token async for delta in running for token in delta.token_ids] == answer([1, 2], 5)

    asyncio.run(main())
