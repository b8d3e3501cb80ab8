"""Shares of a decoder: together they are the whole, for every family, and nothing is in two of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.models.base import Inputs, KVSpec, VisionLanguageModel
from mlxvlm.models.shares import Cut, Rank, head_share, narrow, width_share
from tests.golden import GOLDENS, Case

CLOSE = 2e-5
# At most as many ranks as heads, and more than kv heads where that can be.
CASES = [
    *(("idefics3_split", 2), ("llama4_dense", 2), ("llama4_norms", 2), ("llava_clip", 2), ("llava_next_tiles", 2)),
    *(("mllama_tiles", 2), ("mllama_tiles", 4), ("qwen2_vl_tied", 2), ("qwen2_vl_window", 2), ("smolvlm2_tied", 2)),
]


class Sum:
    """Adds what all ranks, each a thread, hand in; arrays belong to threads, so numbers cross."""

    def __init__(self, count: int) -> None:
        self.parts: list[Any] = [None] * count
        self.meeting = threading.Barrier(count, timeout=60)

    def of(self, index: int) -> Callable[[mx.array], mx.array]:
        def add(part: mx.array) -> mx.array:
            self.parts[index] = np.array(part)
            self.meeting.wait()
            whole = np.sum(self.parts, axis=0)
            self.meeting.wait()  # nobody writes the next sum's part before all have read
            return mx.array(whole)

        return add


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def specs_of(model: VisionLanguageModel, kv_heads: dict[int, int]) -> list[KVSpec]:
    return [KVSpec(kv_heads[spec.num_kv_heads], spec.head_dim, spec.window, spec.chunk) for spec in model.kv_specs]


@pytest.mark.parametrize(("family", "count"), CASES)
def test_shares_together_are_the_whole(family: str, count: int) -> None:
    """Hidden states and logits of a prompt with pictures; every rank embeds for itself."""
    case = Case(GOLDENS / family)
    scenario = next(name for name in case.scenarios if name != "text_only")
    prompt = case.open().processor(case.messages(scenario), case.template)

    def run(index: int | None) -> tuple[Any, Any]:
        model, kv_heads = case.build(), {spec.num_kv_heads: spec.num_kv_heads for spec in case.build().kv_specs}
        if index is not None:
            narrow(model, Rank(index, count), total.of(index))
            text = model._config.text
            own = head_share(text.num_attention_heads, text.num_key_value_heads, Rank(index, count))
            kv_heads = {text.num_key_value_heads: len(own.kv_heads)}
        inputs: Inputs = model.embed_prompt(prompt, model.encode_images(prompt.images))
        hidden = model(inputs, KVPass([KVGroup.single(specs_of(model, kv_heads), 0)], len(prompt.token_ids)).layers)
        return np.array(hidden), np.array(model.logits(hidden))

    hidden, logits = run(None)
    total = Sum(count)
    shares = together(count, run)
    for each, _ in shares:
        np.testing.assert_allclose(each, hidden, atol=CLOSE)
    parts = [part for _, part in shares]
    is_tied = parts[0].shape == logits.shape
    np.testing.assert_allclose(parts[0] if is_tied else np.concatenate(parts, axis=-1), logits, atol=CLOSE)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 12))
def test_every_head_is_on_one_rank_beside_its_kv_head(kv_heads: int, group: int, count: int) -> None:
    heads = kv_heads * group
    try:
        shares = [head_share(heads, kv_heads, Rank(index, count)) for index in range(count)]
    except ValueError:
        assert count > kv_heads  # every count that divides the kv heads, or is smaller, has a share for all
        return
    assert [head for share in shares for head in share.heads] == list(range(heads))
    for share in shares:
        size, own = len(share.heads), len(share.kv_heads)
        assert size
        assert size % own == 0
        # As attention takes them: query head i reads kv head i // (heads per kv head) of its rank.
        read = [share.kv_heads[place // (size // own)] for place in range(size)]
        assert read == [head // group for head in share.heads]


@given(st.integers(1, 100), st.sampled_from([1, 32, 64, 128]), st.integers(1, 8))
def test_widths_are_cut_between_groups(units: int, unit: int, count: int) -> None:
    width = units * unit
    if width < count:
        with pytest.raises(ValueError, match="can't be shared"):
            width_share(width, Rank(0, count))
        return
    shares = [width_share(width, Rank(index, count)) for index in range(count)]
    assert [place for share in shares for place in share] == list(range(width))
    assert min(map(len, shares)) > 0
    if units >= count:
        assert all(share.start % unit == 0 for share in shares)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_share_of_a_quantised_layer_is_quantised_alike(bits: int) -> None:
    """Cut first or quantised first: the same numbers, along rows and columns."""
    weight = mx.random.normal((8, 128), key=mx.random.key(0))
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, 32, bits), strict=True))
    for cut, own in (
        (Cut(-1, range(32, 96), 128, True), weight[:, 32:96]),
        (Cut(-2, range(2, 5), 8, True), weight[2:5]),
    ):
        expected = mx.quantize(own, 32, bits)
        for leaf, other in zip(parts, expected, strict=True):
            assert mx.array_equal(cut.of(leaf, parts[leaf]), other)
    with pytest.raises(ValueError, match="cut a quantised group"):
        Cut(-1, range(16, 96), 128, True).of("scales", parts["scales"])


def test_too_many_ranks_are_refused_before_anything_is_changed() -> None:
    model = Case(GOLDENS / "idefics3_split").build()
    before = model.logits(mx.zeros((1, model._config.text.hidden_size)))
    with pytest.raises(ValueError, match=r"can't be shared by 64 ranks: use \d+ at most"):
        narrow(model, Rank(0, 64), lambda part: part)
    assert mx.array_equal(model.logits(mx.zeros((1, model._config.text.hidden_size))), before)


def test_a_bias_of_a_sum_is_added_once() -> None:
    bias = mx.ones((4,))
    found = [Cut(-1, range(4), 8, index == 0).of("bias", bias) for index in range(2)]
    assert mx.array_equal(found[0] + found[1], bias)
