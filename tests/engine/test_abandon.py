"""An engine that is given up: every request ends at once, also while its thread does not come back from MLX."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.rows import Alone
from mlxvlm.errors import EngineClosedError, MlxvlmError, RanksError
from tests.fakes import FakeModel, FakeProcessor, Gate, ask, eventually, fake_engine

LOSS = RanksError("rank 1 of 2 was lost")


@contextmanager
def stuck_engine(**settings: Any) -> Iterator[tuple[Engine, Gate]]:
    stuck = Gate()
    with fake_engine(FakeModel(on_call=stuck), **settings) as engine:
        try:
            yield engine, stuck
        finally:
            stuck.opened.set()


class Doubtful(Alone):
    """Ranks that note what the engine tells them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.on_loss: Callable[[MlxvlmError], None] = lambda error: None

    def watch(self, on_loss: Callable[[MlxvlmError], None]) -> None:
        self.on_loss = on_loss

    def doubt(self, failure: MlxvlmError) -> None:
        self.calls.append(str(failure))

    def pulse(self, is_idle: bool) -> None:
        if not self.calls or self.calls[-1] != is_idle:
            self.calls.append(is_idle)

    def close(self) -> None:
        self.calls.append("closed")


def ranked(ranks: Doubtful, on_call: Callable[[mx.array], None] | None = None) -> Engine:
    config = EngineConfig(4096, frozenset(), speculation="off", prefix_cache_bytes=0, feature_cache_bytes=0)
    return Engine(lambda progress: FakeModel(on_call=on_call), FakeProcessor(), config, ranks=ranks)


def test_all_requests_end_while_the_thread_is_stuck() -> None:
    with stuck_engine(max_rows=2) as (engine, stuck):
        streams = [engine.submit(ask([1, 2, 3])) for _ in range(4)]  # two run, two wait
        assert stuck.entered.wait(60)
        engine.abandon(LOSS)
        for stream in streams:
            with pytest.raises(RanksError, match="rank 1 of 2 was lost"):
                stream.result()
        with pytest.raises(EngineClosedError, match="rank 1 of 2 was lost"):
            engine.submit(ask([1]))
        assert stuck.entered.is_set()
        assert not stuck.opened.is_set()


def test_a_coroutine_that_waits_is_told() -> None:
    with stuck_engine() as (engine, stuck):
        stream = engine.submit(ask([1, 2, 3]))

        async def read() -> None:
            await stream.prepared()
            await asyncio.to_thread(stuck.entered.wait, 60)
            asyncio.get_running_loop().call_later(
                0.05, lambda: threading.Thread(target=engine.abandon, args=(LOSS,)).start()
            )
            async for _ in stream:
                raise AssertionError("there is nothing to read")

        with pytest.raises(RanksError, match="rank 1 of 2 was lost"):
            asyncio.run(read())


def test_what_has_ended_stays_as_it_is() -> None:
    with fake_engine() as engine:
        stream = engine.submit(ask([1, 2, 3], 5))
        assert eventually(lambda: not engine._open)
        engine.abandon(LOSS)
        assert len(stream.result().token_ids) == 5


def test_an_engine_that_is_not_stuck_closes_as_ever() -> None:
    engine = fake_engine()
    stream = engine.submit(ask([1, 2, 3], 4000))
    next(iter(stream))
    engine.abandon(LOSS)
    engine.abandon(RanksError("another"))
    engine.close()
    with pytest.raises(RanksError, match="rank 1 of 2 was lost"):
        stream.result()
    assert not engine._thread.is_alive()


def test_loading_that_is_stuck_is_told() -> None:
    ranks, may_go = Doubtful(), threading.Event()

    def build(progress: Any) -> FakeModel:
        threading.Thread(target=lose).start()
        assert may_go.wait(60)
        return FakeModel()

    def lose() -> None:
        ranks.on_loss(LOSS)
        may_go.set()  # the constructor waits for its thread, or for the end of the process

    config = EngineConfig(4096, frozenset())
    with pytest.raises(RanksError, match="rank 1 of 2 was lost"):
        Engine(build, FakeProcessor(), config, ranks=ranks)
    assert ranks.calls[-1] == "closed"


def test_ranks_hear_of_errors_that_nobody_expected() -> None:
    def fail(x: mx.array) -> None:
        raise RuntimeError("[ring] a peer was lost")

    ranks = Doubtful()
    with ranked(ranks, fail) as engine:
        stream = engine.submit(ask([1, 2, 3]))
        with pytest.raises(MlxvlmError, match="a peer was lost"):
            stream.result()
    assert "RuntimeError: [ring] a peer was lost" in ranks.calls


def test_ranks_hear_when_the_engine_is_busy_and_when_it_rests() -> None:
    ranks = Doubtful()
    with ranked(ranks) as engine:
        assert eventually(lambda: ranks.calls == [True])
        engine.generate(ask([1, 2, 3]))
        assert eventually(lambda: ranks.calls[-1] is True)
    assert ranks.calls[:3] == [True, False, True]
    assert ranks.calls[-1] == "closed"


def test_a_loss_reaches_the_requests() -> None:
    ranks, stuck = Doubtful(), Gate()
    with ranked(ranks, stuck) as engine:
        stream = engine.submit(ask([1, 2, 3]))
        assert stuck.entered.wait(60)
        assert ranks.calls[-1] is False  # the very first tick is busy already
        ranks.on_loss(LOSS)
        with pytest.raises(RanksError, match="rank 1 of 2 was lost"):
            stream.result()
        stuck.opened.set()
