"""Leaves against formulas in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.errors import UnsupportedModelError
from mlxvlm.models.base import check_numbers
from mlxvlm.models.decoder import DecoderConfig
from mlxvlm.models.layers import ACTIVATIONS, GatedMLP, activation, join_heads, split_heads
from mlxvlm.models.vit import VisionAttention, to_channels_last

POINTS = np.concatenate([np.linspace(-12, 12, 481), [0.0, -0.0, 1e-8, -1e-8, 40, -40]]).astype(np.float32)


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(name: str) -> None:
    found = np.array(activation(name)(mx.array(POINTS)))
    np.testing.assert_allclose(found, [FORMULAS[name](float(x)) for x in POINTS], atol=2e-6)


def test_gelus_differ() -> None:
    x = mx.array([1.0, 2.0])
    assert len({round(activation(name)(x)[1].item(), 5) for name in ("gelu", "gelu_new", "quick_gelu")}) == 3


def test_unknown_activation() -> None:
    with pytest.raises(UnsupportedModelError, match="activation 'mish' is not supported; supported: silu"):
        activation("mish")


def test_heads() -> None:
    x = mx.arange(2 * 3 * 8).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    assert all(mx.array_equal(heads[:, head], x[..., 2 * head : 2 * head + 2]) for head in range(4))
    assert mx.array_equal(join_heads(heads), x)


def weights_of(layer: Any, name: str) -> np.ndarray:
    return np.array(layer[name].weight, dtype=np.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(bias: bool) -> None:
    mlp = GatedMLP(6, 10, "silu", bias)
    assert ("bias" in mlp.gate_proj) == bias
    x = np.random.default_rng(0).standard_normal((2, 6))
    biases = {name: np.array(mlp[name].bias) if bias else 0.0 for name in ("gate_proj", "up_proj", "down_proj")}
    gate, up = (x @ weights_of(mlp, name).T + biases[name] for name in ("gate_proj", "up_proj"))
    expected = (gate / (1 + np.exp(-gate)) * up) @ weights_of(mlp, "down_proj").T + biases["down_proj"]
    np.testing.assert_allclose(np.array(mlp(mx.array(x.astype(np.float32)))), expected, atol=1e-5)


def test_vision_attention_is_softmax_over_all_patches() -> None:
    layer = VisionAttention(8, 2)
    x = np.random.default_rng(0).standard_normal((1, 5, 8))
    q, k, v = (x[0] @ weights_of(layer, n).T + np.array(layer[n].bias) for n in ("q_proj", "k_proj", "v_proj"))
    mixed = np.empty((5, 8))
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(4))
        mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
    expected = mixed @ weights_of(layer, "out_proj").T + np.array(layer.out_proj.bias)
    np.testing.assert_allclose(np.array(layer(mx.array(x.astype(np.float32))))[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 3, 4, 5), (8, 4, 5, 3)),
        ((8, 4, 5, 3), (8, 4, 5, 3)),
        ((8, 1, 2, 2), (8, 1, 2, 2)),
        ((3, 3), (3, 3)),
    ],
)
def test_channels_last(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    weight = mx.arange(math.prod(shape)).reshape(shape)
    once = to_channels_last(weight, 3)
    assert once.shape == expected
    assert mx.array_equal(once, to_channels_last(once, 3))
    if shape != expected:
        assert mx.array_equal(once.transpose(0, 3, 1, 2), weight)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("hidden_size", "32"), ("hidden_size", -1), ("num_hidden_layers", True), ("head_dim", 8.0)),
        *(("rms_norm_eps", "x"), ("rms_norm_eps", math.inf), ("hidden_size", 2**63)),
    ],
)
def test_numbers_of_a_config(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} {value!r}"):
        DecoderConfig.from_dict({name: value, **({} if name == "head_dim" else {"head_dim": 8})})


def test_token_ids_may_be_zero() -> None:
    from dataclasses import make_dataclass

    check_numbers(make_dataclass("Config", [("image_token_id", "int"), ("width", "int")])(0, 1))
    with pytest.raises(ValueError, match="width 0"):
        check_numbers(make_dataclass("Config", [("image_token_id", "int"), ("width", "int")])(0, 0))


def test_a_kernel_that_may_be_of_either_layout_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"patches of 3 pixels and 3 channels are not supported"):
        to_channels_last(mx.zeros((8, 3, 3, 3)), 3)
