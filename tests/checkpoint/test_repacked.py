"""Re-packed layers: exact scales, the factor outside, and the input's type all the way."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import bind
from mlxvlm.checkpoint.packed import Packed, QuantSpec, pack_codes
from mlxvlm.errors import WeightsError
from mlxvlm.models.experts import ExpertLinear
from mlxvlm.models.repacked import RepackedEmbedding, RepackedExpertLinear, RepackedLinear

Tensors = dict[str, mx.array]


class Tiny(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8)
        self.embedding = nn.Embedding(8, 64)
        self.experts = ExpertLinear(3, 64, 8)

    def sanitize(self, weights: Tensors) -> Tensors:
        return dict(weights)


def packed(mode: str, scales: np.dtype, factor: float, *lead: int) -> Packed:
    rng = np.random.default_rng(0)
    if mode == "mxfp8":
        codes = rng.integers(0, 127, (*lead, 64), np.uint8)
        return Packed(codes.view("<u4"), np.full((*lead, 2), 127, np.uint8), None, QuantSpec(8, 32, mode), factor)
    codes = rng.integers(0, 16, (*lead, 64), np.uint8)
    parts = (rng.normal(size=(2, *lead, 2)) * 0.1).astype(scales)
    return Packed(pack_codes(codes, 4), parts[0], parts[1], QuantSpec(4, 32), factor)


def values(packed: Packed) -> np.ndarray:
    spec = packed.spec
    parts = [None if part is None else mx.array(part) for part in (packed.scales, packed.biases)]
    exact = [part if part is None or part.dtype == mx.uint8 else part.astype(mx.float32) for part in parts]
    full = mx.dequantize(
        mx.array(packed.weight), exact[0], exact[1], spec.group_size, spec.bits, spec.mode, dtype=mx.float32
    )
    return np.array(full) * np.float32(packed.output_scale)


def weights_of(mode: str, scales: np.dtype, factor: float) -> tuple[Tensors, dict[str, np.ndarray]]:
    layers = {"linear": packed(mode, scales, factor, 8), "embedding": packed(mode, scales, factor, 8)}
    layers["experts"] = packed(mode, scales, factor, 3, 8)
    tensors = {"linear.bias": mx.arange(8) * mx.array(0.5, mx.float16)}
    for path, layer in layers.items():
        tensors |= layer.tensors(path)
    return tensors, {path: values(layer) for path, layer in layers.items()}


def bound(tensors: Tensors, dtype: str) -> Tiny:
    model = Tiny()
    bind(model, tensors, dtype, lambda done, total: None)  # type: ignore[arg-type]
    return model


MODES = [("affine", np.float16, 1.0), ("affine", np.float16, 1 / 416), ("affine", np.float32, 1.0)]
MODES += [("mxfp8", np.float16, 0.0123)]
HALVES = {"bfloat16": (mx.bfloat16, 2**-8), "float16": (mx.float16, 2**-11), "float32": (mx.float32, 2**-20)}


@pytest.mark.parametrize(("mode", "scales", "factor"), MODES)
@pytest.mark.parametrize("dtype", HALVES)
def test_layers_equal_their_dequantised_twins(mode: str, scales: np.dtype, factor: float, dtype: str) -> None:
    """In the model's type, rounded once: as near as a float32 product that is cast."""
    target, step = HALVES[dtype]
    tensors, exact = weights_of(mode, scales, factor)
    model = bound(tensors, dtype)
    assert (type(model.linear), type(model.embedding)) == (RepackedLinear, RepackedEmbedding)
    assert type(model.experts) is RepackedExpertLinear
    x = mx.random.normal((5, 64), key=mx.random.key(0)).astype(target)
    y = x.astype(mx.float32)

    def near(found: mx.array, expected: mx.array, dtype: mx.Dtype) -> bool:
        assert found.dtype == dtype
        error = mx.abs(found.astype(mx.float32) - expected).max().item()
        # Where scales and input are float16, MLX's CPU kernels sum in float16.
        return error <= (16 if dtype == mx.float16 else 3) * step * mx.abs(expected).max().item()

    linear, table, stack = (mx.array(exact[path]) for path in ("linear", "embedding", "experts"))
    assert near(model.linear(x), y @ linear.T + mx.arange(8) * 0.5, target)
    ids = mx.array([[0, 3, 7]])
    assert mx.array_equal(model.embedding(ids), table[ids])  # float32: Decoder.embed casts
    assert near(model.embedding.as_linear(x), y @ table.T, target)
    experts = mx.array([0, 1, 1, 2, 2], mx.uint32)
    for is_sorted in (False, True):
        found = model.experts(x[:, None], experts, is_sorted)[:, 0]
        assert near(found, mx.einsum("ri,roi->ro", y, stack[experts]), target)


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_what_float16_can_not_hold_before_the_factor(mode: str) -> None:
    tensors, exact = weights_of(mode, np.float16, 1 / 416)
    model = bound(tensors, "float16")
    x = mx.full((16, 64), {"affine": 60_000, "mxfp8": 500}[mode]).astype(mx.float16)
    experts = mx.zeros((16,), mx.uint32)
    for found in (model.linear(x), model.embedding.as_linear(x), model.experts(x[:, None], experts, True)):
        assert mx.all(mx.isfinite(found)).item()
    expected = np.array(x.astype(mx.float32)) @ exact["linear"].T
    assert np.abs(expected).max() * 416 > np.finfo(np.float16).max


@pytest.mark.parametrize(
    ("stored", "dtype", "kept"),
    [
        (np.float16, "float16", mx.float16),
        (np.float16, "bfloat16", mx.float32),
        (np.float16, "float32", mx.float32),
        (np.float32, "bfloat16", mx.float32),
        (np.float32, "float16", mx.float32),
    ],
)
def test_scales_are_never_rounded(stored: np.dtype, dtype: str, kept: mx.Dtype) -> None:
    tensors, _ = weights_of("affine", stored, 1.0)
    originals = dict(tensors)
    model = bound(tensors, dtype)
    for name, array in tree_flatten(model.parameters()):
        if name.endswith(("scales", "biases")):
            assert array.dtype == kept
            assert mx.array_equal(array.astype(mx.float32), originals[name].astype(mx.float32))
    assert model.linear.output_scale.dtype == mx.float32
    assert model.linear.bias.dtype == HALVES[dtype][0]
    assert not tree_flatten(model.trainable_parameters())


def test_plain_quantised_layers_stay_as_they_are() -> None:
    """Without the marker, scales are cast with the rest."""
    tensors, _ = weights_of("affine", np.float32, 1.0)
    kept = {name: array for name, array in tensors.items() if not name.endswith("output_scale")}
    model = bound(kept, "bfloat16")
    assert type(model.linear) is nn.QuantizedLinear
    assert model.linear.scales.dtype == mx.bfloat16


def test_progress_counts_what_is_bound() -> None:
    model, steps = Tiny(), []
    tensors, _ = weights_of("affine", np.float16, 0.5)
    bind(model, tensors, "bfloat16", lambda *step: steps.append(step))  # type: ignore[arg-type]
    assert steps[-1][0] == steps[-1][1] == sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("factor", [mx.ones((2,)), mx.ones((1,)), mx.array(1)])
def test_a_factor_that_is_no_number(factor: mx.array) -> None:
    tensors, _ = weights_of("affine", np.float16, 1.0)
    tensors["linear.output_scale"] = factor
    with pytest.raises(WeightsError, match=r"linear\.output_scale"):
        bound(tensors, "float32")


def test_a_factor_without_a_quantised_weight() -> None:
    tensors, _ = weights_of("affine", np.float16, 1.0)
    for leaf in ("weight", "scales", "biases"):
        del tensors[f"linear.{leaf}"]
    tensors["linear.weight"] = mx.zeros((8, 64))
    with pytest.raises(WeightsError, match=r"1 unknown: linear\.output_scale"):
        bound(tensors, "float32")
