"""DRY against the rule as its author states it, and by hand."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.engine import dry
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.sampler import RowSampler, edit

BREAKER = 3


def penalties(history: Sequence[int], **settings: float) -> dict[int, float]:
    params = SamplingParams(**{"dry_multiplier": 1.0, "dry_base": 2.0, **settings})
    return dict(dry.penalties(np.array(history, np.int64), params, lambda token: token == BREAKER))


def plainly(history: Sequence[int], multiplier: float, base: float, allowed_length: int) -> dict[int, float]:
    """For every token: append it, and look how long an earlier copy of the end there is."""
    found = {}
    for token in set(history):
        longest = 0
        for length in range(1, len(history)):
            tail = [*history[len(history) - length :], token]
            copies = (list(history[i : i + length + 1]) for i in range(len(history) - length))
            if BREAKER not in tail[:-1] and tail in copies:
                longest = length
        if longest >= allowed_length:
            found[token] = multiplier * base ** (longest - allowed_length)
    return found


@given(st.lists(st.integers(0, 4), max_size=20), st.integers(1, 4), st.sampled_from([1.0, 1.75, 3.0]))
def test_all_histories(history: list[int], allowed_length: int, base: float) -> None:
    found = penalties(history, dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed_length)
    assert found == pytest.approx(plainly(history, 0.8, base, allowed_length))


def test_by_hand() -> None:
    assert penalties([1, 2, 5, 9, 1, 2]) == {5: 1.0}  # "1 2" was followed by 5
    assert penalties([7, 1, 2, 5, 9, 7, 1, 2]) == {5: 2.0}
    assert penalties([7, 1, 2, 5, 9, 1, 2, 6, 7, 1, 2]) == {5: 2.0, 6: 1.0}
    assert penalties([7, BREAKER, 2, 5, 9, 7, BREAKER, 2]) == {}
    assert penalties([7, BREAKER, 2, 5, 9, 7, BREAKER, 2], dry_allowed_length=1) == {5: 1.0}
    assert penalties([4, 4, 4, 4]) == {4: 2.0}
    assert penalties([]) == penalties([1]) == {}


def test_long_repetitions_stay_finite() -> None:
    assert penalties([1, 2] * 500, dry_base=10.0, dry_multiplier=100.0) == {1: 1e30}
    assert penalties([1, 2] * 500) == {1: 2.0 ** (dry.MAX_MATCH - 2)}


def test_prompt_and_answer_count_and_breakers_are_text() -> None:
    """Token n reads as the n-th letter."""

    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)

    history: list[int] = []
    params = SamplingParams(dry_multiplier=1.0, dry_base=2.0, dry_sequence_breakers=("h",))
    row = RowSampler(params, (1, 2, 5, 7, 4, 99, 1), history, decode)
    zeros = mx.zeros((1, 10))
    assert not np.array(edit(zeros, [row])).any()
    history.append(2)
    assert np.array(edit(zeros, [row]))[0].tolist() == [0.0] * 5 + [-1.0] + [0.0] * 4
    history += [5, 7]  # the breaker
    assert not np.array(edit(zeros, [row])).any()
    history += [4]
    assert not np.array(edit(zeros, [row])).any()  # "h e" came before, but not over the h
    history += [99, 1]  # 99 lies beyond the vocabulary
    assert np.array(edit(zeros, [row]))[0].tolist() == [0.0] * 2 + [-2.0] + [0.0] * 7


def test_ids_beyond_the_vocabulary_touch_nothing() -> None:
    """A placeholder's id would be another row's token: MLX checks no bounds."""
    params = SamplingParams(dry_multiplier=1.0)
    rows = [RowSampler(params, (1, 2, 10, 1, 2)), RowSampler(SamplingParams(), ())]
    assert rows[0].dry() == {10: 1.0}
    assert not np.array(edit(mx.zeros((2, 10)), rows)).any()
