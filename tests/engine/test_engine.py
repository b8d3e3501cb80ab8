"""The engine over a model whose answers can be worked out on paper."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine import kv_cache
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.errors import ContextLengthError, EngineClosedError, InputError, InternalError, UsageError, WeightsError
from mlxvlm.messages import ImagePart, Message, TextPart
from mlxvlm.models.base import KVSpec
from tests.fakes import (
    IMAGE_TOKENS,
    VOCAB,
    FakeModel,
    FakeProcessor,
    Gate,
    answer,
    ask,
    eventually,
    fake_engine,
    next_token,
)

PROMPTS = st.lists(st.integers(1, VOCAB - 2), min_size=1, max_size=25)
QUESTIONS = st.lists(st.tuples(PROMPTS, st.integers(1, 25)), min_size=1, max_size=6)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_STEP", 4)
    monkeypatch.setattr(kv_cache, "_SHORT", 8)


def ids_of(completion: Completion) -> list[int]:
    return list(completion.token_ids)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("max_rows", [1, 3])
def test_concurrent_answers_equal_the_paper(chunk: int, max_rows: int) -> None:
    with fake_engine(prefill_chunk=chunk, prefill_chunk_while_decoding=chunk, max_rows=max_rows) as engine:

        @settings(max_examples=25, deadline=None)
        @given(QUESTIONS)
        def check(questions: list[tuple[list[int], int]]) -> None:
            streams = [engine.submit(ask(ids, count)) for ids, count in questions]
            for (ids, count), stream in zip(questions, streams, strict=True):
                assert ids_of(stream.result()) == answer(ids, count)

        check()


@pytest.mark.usefixtures("small_steps")
@settings(max_examples=25, deadline=None)
@given(QUESTIONS, st.lists(st.integers(0, 5), min_size=6, max_size=6), st.data())
def test_cancelled_rows_end_early_and_leave_the_others_alone(
    questions: list[tuple[list[int], int]], waits: list[int], data: st.DataObject
) -> None:
    cancelled = data.draw(st.sets(st.integers(0, len(questions) - 1)))
    with fake_engine() as engine:
        streams = [engine.submit(ask(ids, count)) for ids, count in questions]
        for index in cancelled:
            for _, _delta in zip(range(waits[index]), streams[index], strict=False):
                pass
            streams[index].cancel()
        for index, ((ids, count), stream) in enumerate(zip(questions, streams, strict=True)):
            deltas = list(stream)
            if index in cancelled:
                if deltas:
                    assert deltas[-1].finish_reason in ("cancelled", "length")
            else:
                assert [token for delta in deltas for token in delta.token_ids] == answer(ids, count)
        assert engine.generate(ask([1, 2], 5)).token_ids == tuple(answer([1, 2], 5))


@pytest.mark.parametrize("spec", [KVSpec(1, 4, window=4), KVSpec(1, 4, chunk=5)])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_windows_and_chunks_hold_across_prefill_chunks(spec: KVSpec, chunk: int) -> None:
    """The fake's total is mean * all positions, so it shows which of them were seen."""
    ids = [5, 9, 2, 7, 1, 3, 8, 4, 6]
    with fake_engine(FakeModel(spec), prefill_chunk=chunk) as engine:
        given_ids = ids_of(engine.generate(ask(ids, 4)))
    seen = list(ids)
    for token in given_ids:
        last = len(seen) - 1
        first = max(0, last - 3) if spec.window else last // 5 * 5
        visible = seen[first:]
        assert token == (round(sum(visible) / len(visible) * len(seen)) + 1) % (VOCAB - 1)
        seen.append(token)


def test_pictures_reach_their_places() -> None:
    message = Message("user", (TextPart("5"), ImagePart(7), TextPart("3"), ImagePart(9), TextPart("2")))
    with fake_engine() as engine:
        completion = engine.generate(Request([message], SamplingParams(max_tokens=3)))
    seen = [5, *[7] * IMAGE_TOKENS, 0, 3, *[9] * IMAGE_TOKENS, 0, 2]
    assert ids_of(completion) == answer(seen, 3)
    assert completion.usage.image_tokens == 2 * IMAGE_TOKENS
    assert completion.usage.prompt_tokens == len(seen)


def test_no_picture_no_vision() -> None:
    model = FakeModel()
    with fake_engine(model) as engine:
        engine.generate(ask([1]))
    assert model.encoded == []


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens(count: int) -> None:
    with fake_engine() as engine:
        completion = engine.generate(ask([4, 2], count))
    assert completion.finish_reason == "length"
    assert completion.usage.completion_tokens == count == len(completion.token_ids)


def test_an_answer_ends_where_the_context_does() -> None:
    with fake_engine(max_context=12) as engine:
        completion = engine.generate(ask([1, 2, 3], None))
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == 9
        with pytest.raises(ContextLengthError, match="12 tokens, but the model's context is 12"):
            engine.generate(ask([1] * 12))
        assert len(engine.generate(ask([1] * 11)).token_ids) == 1


def test_stop_tokens() -> None:
    ids = [3, 1]
    expected = answer(ids, 10)
    with fake_engine(eos_token_ids=frozenset({expected[3]})) as engine:
        completion = engine.generate(ask(ids))
        assert completion.finish_reason == "stop"
        assert ids_of(completion) == expected[:4]
        assert completion.text == engine.processor.tokenizer.decode(expected[:3])
        assert ids_of(engine.generate(ask(ids, ignore_eos=True))) == expected
        assert ids_of(engine.generate(ask(ids, stop_token_ids=frozenset({expected[1]})))) == expected[:2]


def test_nothing_comes_after_the_end() -> None:
    """A row that stops has one more step on its way, whose token nobody may see."""
    ids = [3, 1]
    with fake_engine(eos_token_ids=frozenset({answer(ids, 3)[2]})) as engine:
        other = engine.submit(ask([9], 40))
        stream = engine.submit(ask(ids))
        assert list(stream)[-1].finish_reason == "stop"
        other.result()
        engine.generate(ask([2], 2))  # the step on its way has been read by now
        assert stream._items.empty()


@pytest.mark.parametrize("max_rows", [1, 2, 8])
def test_rows_at_once_are_limited(max_rows: int) -> None:
    rows: list[int] = []
    with fake_engine(FakeModel(on_call=lambda x: rows.append(x.shape[0])), max_rows=max_rows) as engine:
        streams = [engine.submit(ask([number, 1], 30)) for number in range(1, 6)]
        for stream in streams:
            stream.result()
    assert max(rows) <= max_rows
    assert max_rows == 1 or max(rows) > 1


def test_no_step_is_run_for_a_token_that_is_not_wanted() -> None:
    lengths: list[int] = []
    with fake_engine(FakeModel(on_call=lambda x: lengths.append(x.shape[1]))) as engine:
        engine.generate(ask([1, 2, 3], 4))
    assert lengths == [2, 1, 1, 1, 1]


def test_engines_that_come_and_go_let_the_process_end() -> None:
    code = "from tests.fakes import *\nfor _ in range(12):\n    with fake_engine() as e: e.generate(ask([1]))"
    root = Path(__file__).parent.parent.parent
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_an_engine_left_open_lets_the_process_end() -> None:
    code = "from tests.fakes import ask, fake_engine\ne = fake_engine(); s = e.submit(ask([1], 4000)); next(iter(s))"
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False, timeout=60).returncode == 0


def test_stop_strings_over_several_tokens() -> None:
    ids = [3, 1]
    with fake_engine() as engine:
        whole = engine.generate(ask(ids, 20)).text
        completion = engine.generate(ask(ids, 20, stop=(whole[5:8],)))
    assert completion.text == whole[: whole.index(whole[5:8])]
    assert completion.finish_reason == "stop"


def test_a_held_back_start_of_a_stop_string_comes_at_the_end() -> None:
    with fake_engine() as engine:
        whole = engine.generate(ask([3, 1], 5)).text
        assert engine.generate(ask([3, 1], 5, stop=(whole[-1] + "\0",))).text == whole


@pytest.mark.parametrize(("text", "error"), [("refuse", InputError), ("crash", InternalError)])
def test_a_prompt_that_fails_ends_its_own_request(text: str, error: type[Exception]) -> None:
    with fake_engine() as engine:
        other = engine.submit(ask([1, 2], 50))
        with pytest.raises(error):
            engine.generate(Request([Message("user", (TextPart(text),))]))
        assert ids_of(other.result()) == answer([1, 2], 50)


def test_an_empty_prompt_is_refused() -> None:
    with fake_engine() as engine, pytest.raises(InputError, match="empty"):
        engine.generate(ask([]))


def test_nan_ends_its_own_row_only() -> None:
    model = FakeModel()
    model.nan_token = answer([7], 3)[2]
    others = [[token] for token in range(1, 50) if model.nan_token not in answer([token], 8)][:2]
    with fake_engine(model) as engine:
        streams = [engine.submit(ask(ids, 8)) for ids in ([7], *others)]
        with pytest.raises(InternalError, match="NaN"):
            streams[0].result()
        for ids, stream in zip(others, streams[1:], strict=True):
            assert ids_of(stream.result()) == answer(ids, 8)


def test_a_prefill_that_fails_ends_its_own_request() -> None:
    def explode(x: mx.array) -> None:
        if x.shape[1] == 6:  # only the bad prompt's prefill is that long
            raise RuntimeError("the device failed")

    with fake_engine(FakeModel(on_call=explode)) as engine:
        good = engine.submit(ask([1, 2], 30))
        with pytest.raises(InternalError, match="the device failed"):
            engine.generate(ask([1] * 7))
        assert ids_of(good.result()) == answer([1, 2], 30)


def test_a_decode_step_that_fails_does_not_end_the_engine() -> None:
    failures = [True]

    def explode(x: mx.array) -> None:
        if x.shape[1] == 1 and failures:
            raise RuntimeError("the device failed")

    with fake_engine(FakeModel(on_call=explode)) as engine:
        with pytest.raises(InternalError, match="the device failed"):
            engine.generate(ask([1, 2]))
        failures.clear()
        assert ids_of(engine.generate(ask([1, 2]))) == answer([1, 2], 10)


def test_bad_parameters_are_refused_before_anything_runs() -> None:
    with fake_engine() as engine:
        with pytest.raises(UsageError):
            engine.submit(ask([1], 5, logit_bias={VOCAB: 1.0}))
        with pytest.raises(UsageError):
            engine.submit(ask([1], 5, temperature=-1.0))


def test_many_threads_submit_at_once() -> None:
    results: dict[int, list[int]] = {}
    with fake_engine(max_rows=5) as engine:

        def work(number: int) -> None:
            results[number] = ids_of(engine.generate(ask([number, 2, number], 12)))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: answer([number, 2, number], 12) for number in range(1, 21)}


def test_closing_ends_what_runs_and_what_waits() -> None:
    gate = Gate()
    engine = fake_engine(FakeModel(on_call=gate), max_rows=1)
    streams = [engine.submit(ask([1, 2, number], 50)) for number in range(3)]
    assert gate.entered.wait(30)
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.opened.set()
    closer.join(30)
    assert not closer.is_alive()
    for stream in streams:
        with pytest.raises(EngineClosedError):
            list(stream)
    with pytest.raises(EngineClosedError):
        engine.submit(ask([1]))
    engine.close()  # a second time does nothing


def test_what_loading_raises_comes_out_of_the_constructor() -> None:
    def build(progress: Any) -> FakeModel:
        progress(1, 2)
        raise WeightsError("torn")

    seen: list[tuple[int, int]] = []
    config = EngineConfig(max_context=10, eos_token_ids=frozenset())
    with pytest.raises(WeightsError, match="torn"):
        Engine(build, FakeProcessor(), config, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2)]
    assert not any(thread.name == "mlxvlm-engine" for thread in threading.enumerate())


def test_ctrl_c_while_loading_ends_the_thread() -> None:
    def build(progress: Any) -> FakeModel:
        for done in range(10**6):
            progress(done, 10**6)
            if done == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)
        raise AssertionError("loading went on")

    config = EngineConfig(max_context=10, eos_token_ids=frozenset())
    with pytest.raises(KeyboardInterrupt):
        Engine(build, FakeProcessor(), config)
    assert not any(thread.name == "mlxvlm-engine" for thread in threading.enumerate())


def test_ctrl_c_while_the_thread_starts_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "mlxvlm-engine":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fake_engine()
    assert not any(thread.name == "mlxvlm-engine" for thread in threading.enumerate())


def test_a_thread_that_can_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        fake_engine()


def test_usage_adds_up() -> None:
    with fake_engine() as engine:
        usage = engine.generate(ask([1, 2, 3], 5)).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.image_tokens) == (3, 5, 0)
    assert 0 <= usage.prepare_s <= usage.time_to_first_token_s <= usage.total_s
    assert usage.prompt_s + usage.completion_s <= usage.total_s + 1e-9
    assert usage.completion_tokens_per_s == pytest.approx(4 / usage.completion_s)


def test_a_prompt_made_by_the_caller_is_taken_as_it_is() -> None:
    prompt = FakeProcessor()([Message("user", (TextPart("53"),))])
    with fake_engine() as engine:
        completion = engine.generate(Request(sampling=SamplingParams(max_tokens=2), prompt=prompt))
    assert ids_of(completion) == answer([5, 3], 2)


def test_the_paper() -> None:
    assert next_token([1, 2]) == 4
    assert answer([1, 2], 3) == [4, 8, 16]


def test_sequences_leave_nothing_behind() -> None:
    with fake_engine() as engine:
        for number in range(5):
            engine.generate(ask([number + 1], 3))
        engine.submit(ask([3], 1000)).cancel()
        engine.generate(ask([1], 3))
        assert eventually(lambda: not engine._open)
        assert not engine._runner.batch.groups
