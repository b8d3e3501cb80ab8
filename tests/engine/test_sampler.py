"""Sampling against formulas in NumPy, and rows in a batch against rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

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
    typical_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    xtc_probability=st.sampled_from([0.0, 0.5, 1.0]),
    xtc_threshold=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    dry_multiplier=st.sampled_from([0.0, 0.8, 100.0]),
    dry_allowed_length=st.integers(1, 3),
    seed=st.integers(-(2**70), 2**70),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=2),
    top_logprobs=st.sampled_from([None, 0, 4]),
)


def logits_of(seed: int, rows: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32))


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(ord("0") + token) for token in ids)


def row_of(params: SamplingParams, prompt: Sequence[int] = ()) -> RowSampler:
    """A row whose history is a list of its own, as a Sequence's is."""
    return RowSampler(params, prompt, [], decode)


def run(logits: mx.array, rows: Sequence[RowSampler], steps: int, masks: np.ndarray | None = None) -> list[list[Any]]:
    results = []
    for step in range(steps):
        results.append(read(sample(mx.roll(logits, step, axis=-1), rows, masks), rows))
        for row, (token, _, _) in zip(rows, results[-1], strict=True):
            cast("list[int]", row._history).append(token)
    return [list(row) for row in zip(*results, strict=True)]


def masks_of(seed: int, rows: int) -> np.ndarray:
    """uint32 [B, 1], some token allowed in each row."""
    return np.random.default_rng(seed).integers(1, 1 << V, (rows, 1)).astype(np.uint32)


@settings(max_examples=80, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_a_row_does_not_depend_on_the_others(params: list[SamplingParams], seed: int, masked: bool) -> None:
    logits = logits_of(seed, len(params))
    masks = masks_of(seed, len(params)) if masked else None
    prompts = [(i, i + 3, i, i + 3) for i in range(len(params))]
    together = run(logits, [row_of(p, ids) for p, ids in zip(params, prompts, strict=True)], 4, masks)
    for i, (p, ids) in enumerate(zip(params, prompts, strict=True)):
        own = None if masks is None else masks[i : i + 1]
        assert run(logits[i : i + 1], [row_of(p, ids)], 4, own)[0] == together[i]


def kept_slowly(logits: np.ndarray, params: SamplingParams, excludes_top: bool) -> set[int]:
    """One filter after the other, each over the probabilities of what the one before it left."""

    def probabilities(tokens: list[int]) -> np.ndarray:
        weights = np.exp(logits[tokens] - logits[tokens].max())
        return weights / weights.sum()

    def nucleus(ranked: list[int], probability: Mapping[int, float], mass: float) -> list[int]:
        before = np.cumsum([0.0, *(probability[token] for token in ranked)])
        return [token for i, token in enumerate(ranked) if before[i] < mass or mass >= 1.0 or i == 0]

    kept = sorted(np.flatnonzero(logits > -np.inf).tolist(), key=lambda token: (-logits[token], token))
    kept = kept[: params.top_k or V]
    p = dict(zip(kept, probabilities(kept), strict=True))
    kept = [token for token in nucleus(kept, p, params.top_p) if p[token] >= params.min_p * p[kept[0]]]
    if params.typical_p < 1.0:
        p = dict(zip(kept, probabilities(kept), strict=True))
        entropy = -sum(value * np.log(value) for value in p.values())
        kept = nucleus(sorted(kept, key=lambda token: abs(-np.log(p[token]) - entropy)), p, params.typical_p)
    if excludes_top:
        p = dict(zip(kept, probabilities(kept), strict=True))
        above = sorted((token for token in kept if p[token] >= params.xtc_threshold), key=lambda token: -p[token])
        kept = [token for token in kept if token not in above[:-1]]
    return set(kept)


@settings(max_examples=200, deadline=None)
@given(PARAMS, st.integers(0, 999), st.booleans())
def test_filters(params: SamplingParams, seed: int, masked: bool) -> None:
    logits = logits_of(seed, 1)
    if masked:  # as a grammar leaves them
        logits = mx.where(mx.array(np.random.default_rng(seed).random((1, V)) < 0.5), logits, -mx.inf)
        logits[:, 3] = 0.5
    row = RowSampler(params, ())
    kept = set(np.flatnonzero(np.array(_kept(logits, [row])[0])).tolist())
    possible = set(np.flatnonzero(np.array(logits[0]) > -np.inf).tolist())
    assert kept & possible == kept_slowly(np.array(logits[0], dtype=np.float64), params, row.excludes_top)


def test_xtc_throws_its_dice_as_often_as_it_should() -> None:
    """Of 0.6, 0.3 and 0.1 two are at or above 0.2: the likelier one goes, in every fourth throw."""
    params = [
        SamplingParams(temperature=1.0, xtc_probability=0.25, xtc_threshold=0.2, seed=seed) for seed in range(4000)
    ]
    logits = mx.log(mx.array([[0.6, 0.3, 0.1]]))
    rows = [RowSampler(p, ()) for p in params]
    thrown = [row.excludes_top for row in rows]
    tokens = np.array(sample(mx.repeat(logits, len(rows), axis=0), rows).tokens)
    assert abs(np.mean(thrown) - 0.25) < 0.02
    assert not (tokens[thrown] == 0).any()
    assert abs(np.mean(tokens[thrown] == 1) - 0.75) < 0.04  # the noise is not the dice
    assert abs(np.mean(tokens[~np.array(thrown)] == 0) - 0.6) < 0.03


def test_typical_by_hand() -> None:
    """The entropy of (0.6, 0.3, 0.1) is 0.90 nats: 0.3 (1.20) is nearer to it than 0.6 (0.51) and 0.1 (2.30)."""
    logits = mx.log(mx.array([[0.6, 0.3, 0.1]]))
    for mass, kept in ((0.2, {1}), (0.4, {0, 1}), (0.95, {0, 1, 2})):
        found = np.array(_kept(logits, [RowSampler(SamplingParams(temperature=1.0, typical_p=mass), ())])[0])
        assert set(np.flatnonzero(found).tolist()) == kept


def test_a_row_without_typical_keeps_its_tail_beside_one_with() -> None:
    """Sums of float32 reach 1 before the last of many tokens."""
    rows = [RowSampler(SamplingParams(temperature=1.0, typical_p=p), ()) for p in (1.0, 0.5)]
    logits = mx.array(np.random.default_rng(0).normal(0, 6, (1, 5000)).astype(np.float32))
    kept = np.array(_kept(mx.repeat(logits, 2, axis=0), rows))
    assert kept[0].all()
    assert kept[1].sum() < 100


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_masks_leave_only_their_tokens(temperature: float) -> None:
    """More tokens than a word has bits."""
    logits = mx.array(np.random.default_rng(1).normal(0, 1, (2, 70)).astype(np.float32))
    masks = np.array([[0, 1 << 31 | 1, 1 << 5], [0xFFFFFFFF] * 3], np.uint32)
    seen: tuple[set[int], set[int]] = (set(), set())
    for seed in range(200):
        rows = [
            RowSampler(SamplingParams(temperature=temperature, seed=seed, logit_bias={0: 100.0}), ()),
            row_of(SamplingParams()),
        ]
        for found, (token, _, _) in zip(seen, read(sample(logits, rows, masks), rows), strict=True):
            found.add(token)
    assert seen[0] <= {32, 63, 69}
    assert len(seen[0]) == (3 if temperature else 1)
    assert seen[1] == {int(mx.argmax(logits[1]))}


def test_openais_penalties_by_hand() -> None:
    """mu[j] - c[j] * frequency_penalty - (c[j] > 0) * presence_penalty: OpenAI's guide to parameters."""
    logits = mx.array([[2.0, 1.9, 1.0, 0.0]] * 2)
    rows = [row_of(SamplingParams(frequency_penalty=0.3)), row_of(SamplingParams(presence_penalty=0.95), (0, 1, 2, 3))]
    tokens = run(logits[:, :], rows, 0) or [[], []]
    expected = [
        ([2.0, 1.9, 1.0, 0.0], [2.0, 1.9, 1.0, 0.0]),
        ([1.7, 1.9, 1.0, 0.0], [1.05, 1.9, 1.0, 0.0]),
        ([1.7, 1.6, 1.0, 0.0], [1.05, 0.95, 1.0, 0.0]),
        ([1.4, 1.6, 1.0, 0.0], [1.05, 0.95, 1.0, 0.0]),
        ([1.4, 1.3, 1.0, 0.0], [1.05, 0.95, 1.0, 0.0]),
    ]
    for first, second in expected:
        assert np.allclose(np.array(edit(logits, rows)), [first, second], atol=1e-6)
        for found, (token, _, _) in zip(tokens, read(sample(logits, rows), rows), strict=True):
            found.append(token)
    assert tokens == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]


def test_frequencies_follow_the_distribution() -> None:
    logits = mx.array([[2.0, 1.0, 0.0, -1.0, -2.0]])
    params = SamplingParams(temperature=0.8, top_k=4)
    rows = [RowSampler(SamplingParams(temperature=0.8, top_k=4, seed=seed), ()) for seed in range(4000)]
    tokens = np.array(sample(mx.repeat(logits, len(rows), axis=0), rows).tokens)
    weights = np.exp(np.array(logits[0, :4]) / params.temperature)
    assert np.abs(np.bincount(tokens, minlength=5)[:4] / len(rows) - weights / weights.sum()).max() < 0.025
    assert not (tokens == 4).any()


def test_a_tiny_temperature_is_greedy() -> None:
    logits = logits_of(0, 1)
    for temperature in (1e-6, 1e-40, 1e-300):
        rows = [RowSampler(SamplingParams(temperature=temperature, top_p=0.9), ())]
        assert int(sample(logits, rows).tokens.item()) == int(mx.argmax(logits))


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
        ("top_k", None),
        ("typical_p", 1.1),
        ("typical_p", None),
        ("xtc_probability", -0.1),
        ("xtc_threshold", 2),
        ("dry_multiplier", -1),
        ("dry_multiplier", float("nan")),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("dry_allowed_length", None),
        ("dry_sequence_breakers", "\n"),
        ("dry_sequence_breakers", ("",)),
        ("dry_sequence_breakers", (1,)),
        ("stop", None),
        ("stop_token_ids", None),
        ("stop_token_ids", ("1",)),
        ("logit_bias", None),
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
