"""Stacks of experts against a loop over rows: few and many of them, whole and quantised."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import quantize_modules
from mlxvlm.models.experts import ExpertLinear, Experts, QuantizedExpertLinear

EXPERTS, DIMS, HIDDEN = 5, 64, 32


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    stream = np.random.default_rng(seed)
    module.load_weights(
        [
            (name, mx.array((stream.standard_normal(array.shape) / 8).astype(np.float32)))
            for name, array in tree_flatten(module.parameters())
        ]
    )
    return module


def slow(stacks: list[mx.array], rows: mx.array, experts: mx.array) -> mx.array:
    gate, up, down = stacks
    outputs = []
    for row, expert in zip(rows, experts.tolist(), strict=True):
        hidden = nn.silu(gate[expert] @ row) * (up[expert] @ row)
        outputs.append(down[expert] @ hidden)
    return mx.stack(outputs)


def inputs(count: int) -> tuple[mx.array, mx.array]:
    stream = np.random.default_rng(count)
    rows = mx.array(stream.standard_normal((count, DIMS)).astype(np.float32))
    return rows, mx.array(stream.integers(0, EXPERTS, count).astype(np.uint32))


# 20 rows of 5 experts are where sorting begins.
@pytest.mark.parametrize("count", [1, 3, 19, 20, 57])
def test_every_row_meets_its_expert(count: int) -> None:
    module = filled(Experts(EXPERTS, DIMS, HIDDEN, "silu"))
    rows, experts = inputs(count)
    expected = slow([layer.weight for layer in (module.gate_proj, module.up_proj, module.down_proj)], rows, experts)
    assert mx.abs(module(rows, experts) - expected).max().item() < 1e-5


@pytest.mark.parametrize(("count", "expected"), [(1, False), (19, False), (20, True), (57, True)])
def test_many_rows_are_sorted(count: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = ExpertLinear.__call__

    def watch(layer: ExpertLinear, rows: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        ids = experts.tolist()
        seen.append((is_sorted, ids == sorted(ids)))
        return plain(layer, rows, experts, is_sorted)

    monkeypatch.setattr(ExpertLinear, "__call__", watch)
    filled(Experts(EXPERTS, DIMS, HIDDEN, "silu"))(*inputs(count))
    assert all(said == expected and (true or not said) for said, true in seen)


@pytest.mark.parametrize("count", [2, 57])
@pytest.mark.parametrize(
    ("group_size", "bits", "mode"), [(32, 4, "affine"), (32, 8, "affine"), (32, 4, "mxfp4"), (16, 4, "nvfp4")]
)
def test_quantised_binding(count: int, group_size: int, bits: int, mode: str) -> None:
    module = filled(Experts(EXPERTS, DIMS, HIDDEN, "silu"))
    stored: dict[str, mx.array] = {}
    plain = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        parts = mx.quantize(module[name].weight, group_size, bits, mode=mode)
        stored |= dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), parts, strict=False))
        plain.append(mx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode).astype(mx.float32))
    fresh = Experts(EXPERTS, DIMS, HIDDEN, "silu")
    quantize_modules(fresh, stored)
    assert isinstance(fresh.down_proj, QuantizedExpertLinear)
    fresh.load_weights(list(stored.items()))
    rows, experts = inputs(count)
    assert mx.abs(fresh(rows, experts) - slow(plain, rows, experts)).max().item() < 1e-4
