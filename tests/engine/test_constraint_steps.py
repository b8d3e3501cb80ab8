"""Constrained rows among others, and the order in which the device and the host work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine import dry
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.engine.request import Completion
from tests.engine.random_model import (
    END,
    MODEL,
    STOP,
    VOCAB,
    RandomModel,
    ask,
    random_engine,
)
from tests.engine.test_constraints import REGEXES, SENTENCES, lark


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with random_engine(MODEL) as engine:
        yield engine


ROW = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 2.0]), "seed": st.integers(0, 99), "max_tokens": st.integers(1, 20)},
    optional={
        "grammar": st.sampled_from([Grammar("regex", pattern) for pattern in REGEXES]) | st.builds(lark, SENTENCES),
        "dry_multiplier": st.sampled_from([0.8, 5.0]),
        "repetition_penalty": st.just(1.3),
        "frequency_penalty": st.just(1.5),
        "top_k": st.sampled_from([1, 5]),
        "top_p": st.just(0.7),
        "typical_p": st.just(0.6),
        "xtc_probability": st.just(0.5),
        "top_logprobs": st.sampled_from([0, 2]),
        "stop": st.just(("b",)),
    },
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ROW, st.lists(st.integers(0, 200), min_size=1, max_size=5)), min_size=2, max_size=5))
def test_rows_of_all_kinds_together_answer_as_alone(
    engine: Engine, rows: list[tuple[dict[str, Any], list[int]]]
) -> None:
    def outcome(completion: Completion) -> tuple[Any, ...]:
        return completion.text, completion.token_ids, completion.logprobs, completion.finish_reason

    alone = [outcome(engine.generate(ask(ids, **sampling))) for sampling, ids in rows]
    streams = [engine.submit(ask(ids, **sampling)) for sampling, ids in rows]
    assert [outcome(stream.result()) for stream in streams] == alone


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    completion = engine.generate(ask([5], grammar=lark(["abc"]), top_logprobs=2))
    logits = np.array(MODEL.table[5], np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    first = completion.logprobs[0]
    assert first.logprob == pytest.approx(expected[first.token_id], abs=1e-4)
    assert [token for token, _ in first.top] == np.argsort(-expected)[:2].tolist()


def test_stop_strings_and_max_tokens_come_first(engine: Engine) -> None:
    grammar = Grammar("regex", "a{9}-b")
    cut = engine.generate(ask([1], grammar=grammar, max_tokens=2))
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 2)
    stopped = engine.generate(ask([1], grammar=grammar, stop=("-",)))
    assert (stopped.finish_reason, stopped.text) == ("stop", "a" * 9)


def test_every_end_token_will_do() -> None:
    with random_engine(MODEL, (END, STOP, VOCAB - 1)) as engine:
        ends = {engine.generate(ask([n], grammar=Grammar("regex", "a"))).token_ids[-1] for n in range(30)}
    assert ends == {END, STOP}


class Order:
    """What happens on the engine thread, in order: F forward pass of one token, D delivery, S sampling."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events = ""
        deliver, choose = engine._decoding._deliver, engine._runner.choose

        def delivered(step: Any) -> None:
            self.events += "D"
            deliver(step)

        def chosen(*args: Any) -> Any:
            self.events += "S"
            return choose(*args)

        monkeypatch.setattr(engine._decoding, "_deliver", delivered)
        monkeypatch.setattr(engine._runner, "choose", chosen)

    def __call__(self, x: mx.array) -> None:
        if x.shape[1] == 1:
            self.events += "F"


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [({}, "FS" + "FSD" * 4 + "D"), ({"grammar": Grammar("regex", "a{9}")}, "FS" + "FDS" * 4 + "D")],
)
def test_the_next_forward_pass_starts_before_tokens_are_read(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], expected: str
) -> None:
    """Without a constraint sampling does not wait either."""
    model = RandomModel()
    with random_engine(model) as engine:
        order = Order(engine, monkeypatch)
        model.on_call = order
        engine.generate(ask([1], max_tokens=5, logit_bias={END: -100.0}, **sampling))
    assert order.events == expected


@pytest.mark.parametrize("prompt", [[7], [7, 8, 9, 7, 8]])
def test_dry_sees_prompt_and_answer(prompt: list[int]) -> None:
    """A model that always wants the same, and its answer on paper."""
    model = RandomModel()
    model.table = mx.array(np.repeat(np.array(model.table[:1]), 97, axis=0))
    sampling = {"dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_sequence_breakers": ()}
    seen, logits = list(prompt), np.array(model.table[0])
    for _ in range(30):
        costs = dry.penalties(np.array(seen), SamplingParams(**sampling), lambda token: False)
        edited = logits.copy()
        for token, cost in costs.items():
            edited[token] -= cost
        seen.append(int(edited.argmax()))
    with random_engine(model, ()) as engine:
        found = engine.generate(ask(prompt, max_tokens=30, **sampling)).token_ids
    assert list(found) == seen[len(prompt) :]
    assert len(set(found)) > 3
