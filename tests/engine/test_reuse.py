"""What the engine takes from its prefix cache and its feature cache: equal answers, less work."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine import device
from mlxvlm.engine.engine import Engine, EngineConfig
from mlxvlm.engine.feature_cache import FeatureCache
from mlxvlm.engine.kv_cache import KVGroup
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.prefix_cache import PrefixCache
from mlxvlm.engine.request import Request
from mlxvlm.engine.rows import Rows
from mlxvlm.engine.runner import ModelRunner
from mlxvlm.engine.sequence import Phase
from mlxvlm.engine.sequence import Sequence as EngineSequence
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import InternalError
from mlxvlm.messages import ImagePart, Message, TextPart
from mlxvlm.models.base import KVSpec
from mlxvlm.processors.base import Prompt
from tests.fakes import IMAGE_TOKENS, FakeModel, FakeProcessor, answer, ask, eventually, fake_engine

PLENTY = 1 << 20


def pictures(*parts: int | str, count: int = 6) -> Request:
    """Numbers are pictures, letters text."""
    content = tuple(TextPart(part) if isinstance(part, str) else ImagePart(part) for part in parts)
    return Request([Message("user", content)], SamplingParams(max_tokens=count))


def on_paper(request: Request) -> list[int]:
    prompt = FakeProcessor()(request.messages)
    ids = list(prompt.token_ids)
    for each in prompt.images:
        ids[each.span[0] : each.span[1]] = [int(each.pixels[0])] * IMAGE_TOKENS
    assert request.sampling is not None
    return answer(ids, request.sampling.max_tokens or 0)


def caching_engine(model: FakeModel | None = None, block: int = 2, **config: Any) -> Engine:
    plenty = {"prefix_cache_bytes": PLENTY, "feature_cache_bytes": PLENTY}
    return fake_engine(model, **{"prefix_block_tokens": block, **plenty, **config})


def test_the_next_turn_starts_where_the_last_answer_ended() -> None:
    with caching_engine() as engine:
        ids = [1, 2, 3, 4, 5]
        first = engine.generate(ask(ids, 9))
        assert first.usage.cached_tokens == 0
        longer = [*ids, *first.token_ids, 7, 8]
        second = engine.generate(ask(longer, 4))
        assert list(second.token_ids) == answer(longer, 4)
        # The last answered token was never fed, and the one before was not read yet when its row left.
        assert second.usage.cached_tokens == 12
        assert engine.generate(ask([2, *longer[1:]], 4)).usage.cached_tokens == 0
        assert engine.stats().prefix_cache.hits == 1
        assert engine.stats().prefix_cache.misses == 2


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_the_same_prompt_again_leaves_one_token(length: int) -> None:
    forwards: list[int] = []
    ids = [3] * length
    with caching_engine(FakeModel(on_call=lambda x: forwards.append(x.shape[1]))) as engine:
        engine.generate(ask([*ids, 1, 1], 1))
        forwards.clear()
        again = engine.generate(ask(ids, 3))
        assert list(again.token_ids) == answer(ids, 3)
        assert again.usage.cached_tokens == length - 1
        assert forwards[-3:] == [1, 1, 1]
        assert sum(forwards[:-3]) == length - 1 - again.usage.cached_tokens


def test_a_stopped_row_keeps_what_it_was_fed() -> None:
    """With a step under way its last token is fed already."""
    with caching_engine(block=1) as engine:
        whole = answer([4, 2], 6)
        stopped = engine.generate(ask([4, 2], 20, stop_token_ids=[whole[3]]))
        assert list(stopped.token_ids) == whole[:4]
        assert engine.generate(ask([4, 2, *whole, 1], 2)).usage.cached_tokens == 6


def test_a_cancelled_row_keeps_what_it_was_fed() -> None:
    with caching_engine(block=1) as engine:
        stream = engine.submit(ask([4, 2, 6], 1000))
        for _, _delta in zip(range(5), stream, strict=False):
            pass
        stream.cancel()
        assert eventually(lambda: not engine._open)
        again = engine.generate(ask([4, 2, 6, *answer([4, 2, 6], 5), 1], 2))
        assert again.usage.cached_tokens >= 7
        assert list(again.token_ids) == answer([4, 2, 6, *answer([4, 2, 6], 5), 1], 2)


def test_a_failed_row_keeps_its_prompt_only() -> None:
    model = FakeModel()
    with caching_engine(model, block=1) as engine:
        whole = answer([4, 2], 6)
        model.nan_token = whole[2]
        with pytest.raises(InternalError, match="NaN"):
            engine.generate(ask([4, 2], 20))
        model.nan_token = None
        assert engine.generate(ask([4, 2, *whole], 1)).usage.cached_tokens == 1


def test_a_store_that_fails_ends_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with caching_engine(block=1) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(KVGroup, "copy", lambda *args: 1 / 0)
            with pytest.raises(InternalError, match="ZeroDivision"):
                engine.generate(ask([1, 2, 3], 4))
        assert eventually(lambda: not engine._open)
        assert not engine._runner.batch.groups
        assert list(engine.generate(ask([1, 2, 3], 4)).token_ids) == answer([1, 2, 3], 4)


def test_what_fails_while_a_row_is_kept_is_the_error_of_the_step_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy waits for that step, and a device tells an error once."""
    with caching_engine(block=1) as engine:
        streams = [engine.submit(ask(ids, 2000)) for ids in ([4, 2, 6], [5, 1])]
        for stream in streams:
            for _, _delta in zip(range(3), stream, strict=False):
                pass
        first, copy = min(engine._open), KVGroup.copy
        monkeypatch.setattr(KVGroup, "copy", lambda group, owner, *cut: copy(group, owner // (owner != first), *cut))
        streams[0].cancel()
        with pytest.raises(InternalError, match="ZeroDivision"):
            streams[1].result()
        assert eventually(lambda: not engine._open and not engine._runner.batch.groups)


def test_features_are_no_pieces_of_something_larger() -> None:
    class Splitting(FakeModel):
        def encode_images(self, images: Any) -> list[mx.array]:
            pieces = super().encode_images(images)
            whole = mx.concatenate([mx.pad(piece, ((0, 10_000), (0, 0))) for piece in pieces])
            return [piece[:IMAGE_TOKENS] for piece in mx.split(whole, len(pieces))]

    gc.collect()
    floor = mx.get_active_memory()
    with caching_engine(Splitting()) as engine:
        request = pictures("5", 7, "3", 9, "1")
        assert list(engine.generate(request).token_ids) == on_paper(request)
        assert engine.stats().feature_cache.entries == 2
        assert eventually(lambda: mx.get_active_memory() - floor < 20_000)


def test_one_ids_other_picture() -> None:
    with caching_engine(block=1) as engine:
        for number in (7, 9, 7):
            request = pictures("55", number, "31")
            assert list(engine.generate(request).token_ids) == on_paper(request)


@pytest.mark.parametrize("first_answer", [1, 9], ids=["a-rest", "a-whole-block"])
def test_a_second_question_runs_only_its_own_tokens(first_answer: int) -> None:
    forwards: list[int] = []
    model = FakeModel(on_call=lambda x: forwards.append(x.shape[1]))
    with caching_engine(model, block=10, feature_cache_bytes=0) as engine:
        engine.generate(pictures("55", 7, "3111", count=first_answer))
        forwards.clear()
        second = pictures("55", 7, "3222", count=2)
        done = engine.generate(second)
        assert list(done.token_ids) == on_paper(second)
        assert done.usage.cached_tokens == done.usage.prompt_tokens - 3
        assert forwards == [2, 1, 1]
        assert model.encoded == [7]


def test_what_follows_another_picture_is_not_shared() -> None:
    with caching_engine(block=64) as engine:
        engine.generate(pictures("55", 7, "31", 8, "2"))
        for request, cached in ((pictures("55", 7, "31", 9, "2"), 8), (pictures("55", 9, "31", 8, "2"), 2)):
            done = engine.generate(request)
            assert list(done.token_ids) == on_paper(request)
            assert done.usage.cached_tokens == cached


def test_pictures_inside_the_prefix_are_not_encoded() -> None:
    model = FakeModel()
    with caching_engine(model, block=1, feature_cache_bytes=0) as engine:
        for request in (pictures("5", 7, "31"), pictures("5", 7, "32"), pictures("5", 7, "31", 9, "2")):
            assert list(engine.generate(request).token_ids) == on_paper(request)
        assert model.encoded == [7, 9]


def test_a_picture_cut_by_the_prefix_is_encoded_again() -> None:
    """There is room for one block of four tokens, which ends inside it: what is left of it needs its features."""
    model = FakeModel()
    with caching_engine(model, block=4, feature_cache_bytes=0, prefix_cache_bytes=4 * 32) as engine:
        for request in (pictures("55", 7, "31"), pictures("55", 7, "32")):
            done = engine.generate(request)
            assert list(done.token_ids) == on_paper(request)
        assert done.usage.cached_tokens == 4
        assert model.encoded == [7, 7]


@pytest.mark.parametrize("kept", [0, PLENTY])
def test_a_picture_is_encoded_once(kept: int) -> None:
    """Twice in one request, and in several that wait at once."""
    model = FakeModel()
    with caching_engine(model, prefix_cache_bytes=0, feature_cache_bytes=kept) as engine:
        request = pictures("5", 7, "3", 9, "1", 7, "2")
        assert list(engine.generate(request).token_ids) == on_paper(request)
        assert model.encoded == [7, 9]
        streams = [engine.submit(pictures(text, 7, "2", count=30)) for text in ("1", "2", "3")]
        for text, stream in zip(("1", "2", "3"), streams, strict=True):
            assert list(stream.result().token_ids) == on_paper(pictures(text, 7, "2", count=30))
        assert model.encoded == ([7, 9] if kept else [7, 9, 7, 7, 7])
        stats = engine.stats()
        assert stats.encoded_images == len(model.encoded)
        assert stats.feature_cache.misses == 3 + 3 * (not kept)
        assert stats.feature_cache.entries == (2 if kept else 0)


def test_requests_at_once_share_a_prompt() -> None:
    with caching_engine(prefill_chunk=3, prefill_chunk_while_decoding=3) as engine:
        ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
        streams = [engine.submit(ask([*ids, last], 20)) for last in range(3)]
        answers = [stream.result() for stream in streams]
        assert [list(each.token_ids) for each in answers] == [answer([*ids, last], 20) for last in range(3)]
        assert [each.usage.cached_tokens for each in answers] == [0, 8, 8]


def test_prompts_that_are_read_in_turns_share_the_work() -> None:
    forwards: list[int] = []
    model = FakeModel(on_call=lambda x: forwards.append(x.shape[1]))
    runner = ModelRunner(Rows(model, model.kv_specs), PrefixCache(PLENTY, 2), FeatureCache(0))
    ids = tuple(range(1, 22))
    sequences = [EngineSequence(SamplingParams(), Stream(lambda: None)) for _ in range(2)]
    for sequence in sequences:
        sequence.begin(Prompt(ids), FakeProcessor(), 5, frozenset())
        runner.recall(sequence)
    while any(sequence.phase is Phase.PREFILL for sequence in sequences):
        for sequence in sequences:
            if sequence.phase is Phase.PREFILL:
                runner.prefill(sequence, 4)
    assert sum(forwards) == len(ids) - 1
    assert sum(sequence.cached_tokens for sequence in sequences) == len(ids) - 1
    first, second = (runner.batch.group_of(sequence.id) for sequence in sequences)
    assert first is second is not None
    assert mx.array_equal(first.arrays[0][0, :, :20], first.arrays[0][1, :, :20])


PARTS = st.lists(
    st.one_of(st.sampled_from(["1", "2", "12", "21121", "1212121"]), st.integers(1, 2)), min_size=1, max_size=5
)


@settings(max_examples=30, deadline=None)
@given(
    questions=st.lists(st.tuples(PARTS, st.integers(1, 12), st.none() | st.integers(0, 5)), min_size=2, max_size=8),
    block=st.integers(1, 5),
    chunk=st.integers(1, 7),
    blocks=st.integers(0, 12),
    features=st.integers(0, 100),
)
def test_any_schedule_equals_the_paper(
    questions: list[tuple[list[int | str], int, int | None]], block: int, chunk: int, blocks: int, features: int
) -> None:
    """Prompts of few letters, so that they share much; caches of few bytes; rows that leave early."""
    chunks = {"prefill_chunk": chunk, "prefill_chunk_while_decoding": chunk, "max_rows": 3}
    limits = {"prefix_cache_bytes": blocks * block * 32, "feature_cache_bytes": features}
    with caching_engine(block=block, **chunks, **limits) as engine:
        requests = [pictures(*parts, "3", count=count) for parts, count, _ in questions]
        streams = [engine.submit(request) for request in requests]
        for stream, (_, _, leave) in zip(streams, questions, strict=True):
            if leave is not None:
                for _ in zip(range(leave), stream, strict=False):
                    pass
                stream.cancel()
        for request, stream, (_, _, leave) in zip(requests, streams, questions, strict=True):
            if leave is None:
                assert list(stream.result().token_ids) == on_paper(request)
        again = engine.submit(requests[0]).result()
        assert list(again.token_ids) == on_paper(requests[0])
        stats = engine.stats()
        assert stats.prefix_cache.nbytes <= min(stats.prefix_cache.entries * block * 32, limits["prefix_cache_bytes"])
        assert stats.feature_cache.nbytes <= features


@pytest.mark.parametrize("spec", [KVSpec(1, 4, window=4), KVSpec(1, 4, chunk=5)])
def test_windows_and_chunks(spec: KVSpec) -> None:
    ids = [5, 9, 2, 7, 1, 3, 8, 4, 6]
    with fake_engine(FakeModel(spec), prefix_cache_bytes=0) as cold, caching_engine(FakeModel(spec), block=1) as warm:
        for length in (5, 7, 9, 9):
            question = ask(ids[:length], 8)
            assert warm.generate(question).token_ids == cold.generate(question).token_ids


def test_caches_go_with_their_engine() -> None:
    gc.collect()
    mx.clear_cache()
    floor = mx.get_active_memory()
    with caching_engine(block=8, prefix_cache_bytes=1 << 24) as engine:
        engine.generate(ask([1] * 4000, 4))
        assert mx.get_active_memory() - floor >= engine.stats().prefix_cache.nbytes > 100_000
    assert mx.get_active_memory() - floor < 10_000
    assert engine.stats().prefix_cache.entries == 0


def test_the_defaults_share_what_the_model_leaves_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.cache_budget(1 << 40) == 256 << 20, "the CPU backend is for trials"
    assert device.cache_budget(1 << 20) == 1 << 18
    monkeypatch.setattr(device, "is_gpu", lambda: True)
    assert device.cache_budget(1 << 33) == 1 << 31
    assert device.cache_budget(-1) == 0


def test_an_engine_has_caches_unless_told() -> None:
    usual: dict[str, Any] = {"prefix_cache_bytes": None, "feature_cache_bytes": None}
    for settings_, expected in (({}, (True, True)), ({"prefix_cache_bytes": 0}, (False, True))):
        with fake_engine(**(usual | settings_)) as engine:
            runner = engine._runner
            assert (runner.prefixes.max_bytes > 0, runner.features.max_bytes > 0) == expected
            limits = runner.prefixes.max_bytes + runner.features.max_bytes
            assert limits <= device.cache_budget(1 << 40)
    assert EngineConfig(8, frozenset()).prefix_block_tokens == 64
