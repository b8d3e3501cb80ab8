"""Sampling against formulas in NumPy, and rows in a batch against rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.sampler import RowSampler, _kept, edit, read, sample
from mlxvlm.errors import UsageError

V = 17
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, V, 10**9]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(-(2**70), 2**70),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=2),
    top_logprobs=st.sampled_from([None, 0, 4]),
)


def logits_of(seed: int, rows: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32))


def run(logits: mx.array, rows: Sequence[RowSampler], steps: int) -> list[list[Any]]:
    results = []
    for step in range(steps):
        results.append(read(sample(mx.roll(logits, step, axis=-1), rows), rows))
    return [list(row) for row in zip(*results, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 99))
def test_a_row_does_not_depend_on_the_others(params: list[SamplingParams], seed: int) -> None:
    logits = logits_of(seed, len(params))
    prompts = [(i, i + 3) for i in range(len(params))]
    together = run(logits, [RowSampler(p, ids) for p, ids in zip(params, prompts, strict=True)], 3)
    for i, (p, ids) in enumerate(zip(params, prompts, strict=True)):
        assert run(logits[i : i + 1], [RowSampler(p, ids)], 3)[0] == together[i]


def kept_slowly(logits: np.ndarray, params: SamplingParams) -> set[int]:
    order = sorted(range(V), key=lambda token: (-logits[token], token))
    order = order[: params.top_k or V]
    weights = np.exp(logits[order] - logits[order].max())
    weights /= weights.sum()
    kept, total = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if (total < params.top_p or params.top_p >= 1.0) and weight >= params.min_p * weights[0]:
            kept.add(token)
        total += weight
    return kept | {order[0]}


@settings(max_examples=100, deadline=None)
@given(PARAMS, st.integers(0, 999))
def test_filters(params: SamplingParams, seed: int) -> None:
    logits = logits_of(seed, 1)
    kept = np.flatnonzero(np.array(_kept(logits, [RowSampler(params, ())])[0]))
    assert set(kept.tolist()) == kept_slowly(np.array(logits[0], dtype=np.float64), params)


def test_frequencies_follow_the_distribution() -> None:
    logits = mx.array([[2.0, 1.0, 0.0, -1.0, -2.0]])
    params = SamplingParams(temperature=0.8, top_k=4)
    rows = [RowSampler(SamplingParams(temperature=0.8, top_k=4, seed=seed), ()) for seed in range(4000)]
    tokens = np.array(sample(mx.repeat(logits, len(rows), axis=0), rows).tokens)
    weights = np.exp(np.array(logits[0, :4]) / params.temperature)
    assert np.abs(np.bincount(tokens, minlength=5)[:4] / len(rows) - weights / weights.sum()).max() < 0.025
    assert not (tokens == 4).any()


def test_steps_of_one_seed_differ_and_repeat() -> None:
    flat = mx.zeros((1, 1000))
    draws = [
        [read(sample(flat, [row]), [row])[0][0] for _ in range(20)]
        for row in (RowSampler(SamplingParams(temperature=1.0, seed=seed), ()) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(set(draws[0])) > 10


def test_without_a_seed_rows_differ() -> None:
    rows = [RowSampler(SamplingParams(temperature=1.0), ()) for _ in range(8)]
    assert len(set(np.array(sample(mx.zeros((8, 1000)), rows).tokens).tolist())) > 1


def test_penalties_count_generated_tokens_and_repetition_also_the_prompt() -> None:
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    row = RowSampler(params, (3, 4, 10**6))  # an id beyond the vocabulary is no index
    logits = logits_of(0, 1)
    generated: list[int] = []
    for _ in range(6):
        expected = np.array(logits[0])
        for token in {3, 4, *generated}:
            expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
        for token in generated:
            expected[token] -= 0.25
        for token in set(generated):
            expected[token] -= 0.5
        assert np.abs(np.array(edit(logits, [row])[0]) - expected).max() < 1e-5
        generated.append(read(sample(logits, [row]), [row])[0][0])
        assert generated[-1] == expected.argmax()
    assert len(set(generated)) > 1


def test_logit_bias_moves_the_choice() -> None:
    row = RowSampler(SamplingParams(logit_bias={11: 100.0}), ())
    assert read(sample(logits_of(0, 1), [row]), [row])[0][0] == 11


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_models_own(temperature: float) -> None:
    logits = logits_of(3, 1)
    params = SamplingParams(temperature=temperature, seed=1, logit_bias={2: 5.0}, top_logprobs=3)
    row = RowSampler(params, ())
    ((token, is_bad, logprob),) = read(sample(logits, [row]), [row])
    raw = np.array(logits[0], dtype=np.float64)
    expected = raw - np.log(np.exp(raw).sum())
    assert logprob is not None
    assert not is_bad
    assert logprob.token_id == token
    assert logprob.logprob == pytest.approx(expected[token], abs=1e-5)
    best = np.argsort(-expected)[:3]
    assert [token for token, _ in logprob.top] == best.tolist()
    assert [value for _, value in logprob.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_nan_is_reported_for_its_row_only() -> None:
    logits = mx.array([[0.0, 1.0], [0.0, float("nan")]])
    rows = [RowSampler(SamplingParams(), ()) for _ in range(2)]
    results = read(sample(logits, rows), rows)
    assert results[0][:2] == (1, False)
    assert results[1][1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.1),
        ("min_p", -1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("seed", 1.0),
        ("repetition_penalty", 0),
        ("frequency_penalty", float("inf")),
        ("top_logprobs", 21),
        ("stop", ("",)),
        ("stop", "picture"),
        ("stop", ("x",) * 65),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {V: 0.0}),
        ("logit_bias", {50_000_000: 1.0}),
        ("logit_bias", {"1": 0.0}),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name.split("_")[0]):
        SamplingParams(**{name: value}).check(V)


@given(PARAMS)
def test_parameters_in_range_pass(params: SamplingParams) -> None:
    params.check(V)
