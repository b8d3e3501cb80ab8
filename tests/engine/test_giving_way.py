"""What is kept between requests gives way to what requests reserve, and grows only into what is left."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine.engine import Engine
from mlxvlm.engine.feature_cache import FeatureCache
from mlxvlm.engine.prefix_cache import Link
from mlxvlm.errors import MemoryBudgetError
from mlxvlm.processors.base import Prompt
from tests.engine.test_admission import Wide
from tests.engine.test_engine import ids_of
from tests.fakes import FakeModel, answer, ask, eventually, fake_engine, is_empty, look_at

CACHES: dict[str, Any] = {"prefix_cache_bytes": 1 << 30, "feature_cache_bytes": 1 << 30, "prefix_block_tokens": 16}
QUESTIONS = st.tuples(st.integers(1, 3), st.integers(1, 900), st.integers(1, 40), st.none() | st.integers(0, 30))


@settings(max_examples=25, deadline=None)
@given(
    questions=st.lists(QUESTIONS, min_size=2, max_size=8),
    budget=st.integers(500_000, 6_000_000),
    chunk=st.integers(8, 24),
    max_rows=st.integers(1, 4),
)
def test_caches_and_rows_together_stay_within_the_budget(
    questions: list[tuple[int, int, int, int | None]], budget: int, chunk: int, max_rows: int
) -> None:
    """Prompts that share beginnings, a budget for few of them: who waits, who is refused, what MLX allocates."""
    limits = {"prefill_chunk": chunk, "prefill_chunk_while_decoding": chunk, "max_rows": max_rows}
    budget += mx.get_active_memory()

    over: list[int] = []

    def look(x: mx.array | None = None) -> None:
        stats = engine.stats()
        held = max(stats.reserved_bytes, engine._runner.batch.nbytes)
        over.append(stats.model_bytes + held + stats.prefix_cache.nbytes - budget)

    with fake_engine(Wide(1, look), max_memory_bytes=budget, **CACHES, **limits) as engine:
        prefixes = engine._runner.prefixes
        store = prefixes.store

        def watched(*args: Any) -> None:
            store(*args)
            look()

        prefixes.store = watched  # type: ignore[method-assign]
        streams = [engine.submit(ask([number] * length, count)) for number, length, count, _ in questions]
        for stream, (number, length, count, leave) in zip(streams, questions, strict=True):
            need = engine._admission.need(Prompt((number,) * length), count)
            if engine._admission.bytes_of([need]) > budget - engine.stats().model_bytes:
                with pytest.raises(MemoryBudgetError):
                    stream.result()
            elif leave is None:
                assert ids_of(stream.result()) == answer([number] * length, count)
            else:
                for _ in zip(range(leave), stream, strict=False):
                    pass
                stream.cancel()
        assert eventually(lambda: is_empty(engine))
        assert max(over, default=0) <= 0
        stats = engine.stats()
        # The rest of a row has any size, for which MLX may take a freed buffer of up to two pages more.
        slack = 2 * 4096 * len(questions)
        assert mx.get_active_memory() <= stats.model_bytes + stats.prefix_cache.nbytes + slack


def test_a_row_is_kept_beside_what_it_still_has() -> None:
    """Cancelled in the middle: its keys and values are there until their blocks are copied."""
    calls = itertools.count(1)
    sums: list[int] = []

    def leave(x: mx.array) -> None:
        if next(calls) == 900:
            stream.cancel()

    with fake_engine(Wide(4, leave), prefill_chunk=8, **CACHES) as engine:
        rows, runner = engine._admission, engine._runner
        rows.budget = rows.base + rows.bytes_of([rows.need(Prompt((1,) * 10), 1000)])
        store = runner.prefixes.store

        def watched(*args: Any) -> None:
            store(*args)
            sums.append(runner.batch.nbytes + runner.prefixes.nbytes)

        runner.prefixes.store = watched  # type: ignore[method-assign]
        stream = engine.submit(ask([1] * 10, 1000))
        assert stream.result().finish_reason == "cancelled"
        assert eventually(lambda: is_empty(engine))
        assert max(sums) <= rows.budget - rows.base


def test_what_is_kept_gives_way_to_a_request() -> None:
    """Blocks first, of those the longest unused; then features. Nobody is refused or waits because of them."""
    seen: list[tuple[int, int, list[int]]] = []

    def look(x: mx.array) -> None:
        stats, prefixes = engine.stats(), engine._runner.prefixes
        held = [prefixes.count(keys_of(engine, [number] * 200)) for number in (1, 2, 3)]
        seen.append((stats.prefix_cache.nbytes, stats.feature_cache.nbytes, held))

    with fake_engine(FakeModel(on_call=look), **CACHES) as engine:
        engine.generate(look_at(7, [2], 2))
        for number in (1, 2, 3, 1):
            engine.generate(ask([number] * 200, 2))
        rows, (blocks, features, held) = engine._admission, seen[-1]
        assert held == [12, 12, 12]
        need = rows.bytes_of([rows.need(Prompt((5,) * 600), 20)])
        for left, expected in ((features + blocks // 2, features), (features, features), (features - 1, 0)):
            rows.budget = rows.base + need + left
            del seen[:]
            assert ids_of(engine.generate(ask([5] * 600, 20))) == answer([5] * 600, 20)
            of_blocks, of_features, held = seen[0]
            assert of_blocks + of_features <= left
            assert of_features == expected
            if left > features:
                assert held[0] == 12 > held[1]
                assert of_blocks > blocks // 3

    cache, kept = FeatureCache(1000), mx.ones(4)
    cache.put(b"1", kept, 15)
    assert not cache.nbytes
    cache.put(b"1", kept, 16)
    cache.put(b"2", kept, 31)
    assert (cache.get(b"1"), cache.nbytes) == (None, 16)


def test_features_take_only_what_is_left() -> None:
    puts: list[float] = []
    with fake_engine(**CACHES) as engine:
        runner = engine._runner
        runner.prefixes.nbytes += 7
        runner.spare = lambda: 100
        runner.features.put = lambda *args: puts.append(args[2])  # type: ignore
        engine.generate(look_at(7, [2], 2))
        runner.prefixes.nbytes -= 7
    assert puts == [93]


def keys_of(engine: Engine, ids: list[int]) -> list[Link]:
    keys: list[Link] = []
    engine._runner.prefixes.extend(keys, ids, ())
    return keys
