"""Rotary embeddings against plain loops, from configs of every age."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.errors import UnsupportedModelError
from mlxvlm.models.rope import RoPE, inverse_frequencies, rope_parameters

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def slow_frequencies(dims: int, theta: float) -> list[float]:
    return [theta ** (-2 * j / dims) for j in range(dims // 2)]


def slow_llama3(dims: int, theta: float, factor: float, low: float, high: float, original: int) -> list[float]:
    result = []
    for inverse in slow_frequencies(dims, theta):
        wavelength = 2 * math.pi / inverse
        if wavelength > original / low:
            result.append(inverse / factor)
        elif wavelength < original / high:
            result.append(inverse)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append((1 - smooth) * inverse / factor + smooth * inverse)
    return result


@pytest.mark.parametrize("theta", [10_000.0, 100_000, 273_768, 500_000.0])
@pytest.mark.parametrize("dims", [2, 16, 12, 64, 128])
def test_default_frequencies(dims: int, theta: float) -> None:
    found = inverse_frequencies(dims, rope_parameters({"rope_theta": theta}))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow_frequencies(dims, theta), rtol=1e-6)


def test_a_factor_for_each_frequency() -> None:
    """As llama.cpp stores llama3's scaling: what each frequency is divided by."""
    plain = {"rope_theta": 500_000.0}
    scaled = inverse_frequencies(64, rope_parameters({**plain, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}))
    factors = inverse_frequencies(64, rope_parameters(plain)) / scaled
    assert factors.max() == 8
    scaling = {"rope_type": "factors", "factors": factors.tolist()}
    found = inverse_frequencies(64, rope_parameters({**plain, "rope_scaling": scaling}))
    np.testing.assert_allclose(found, scaled, rtol=1e-6)


@pytest.mark.parametrize("factors", [[], [1.0] * 7, [1.0] * 9, [0.0] * 8, [-1.0] * 8, [float("nan")] * 8])
def test_factors_that_fit_nothing(factors: list[float]) -> None:
    parameters = rope_parameters({"rope_scaling": {"rope_type": "factors", "factors": factors}})
    with pytest.raises(ValueError, match="for 8 frequencies"):
        inverse_frequencies(16, parameters)


def test_linear_frequencies() -> None:
    found = inverse_frequencies(16, rope_parameters({"rope_scaling": {"type": "linear", "factor": 4}}))
    np.testing.assert_allclose(found, [value / 4 for value in slow_frequencies(16, 10_000)], rtol=1e-6)


@pytest.mark.parametrize("original", [32, 8192])
@pytest.mark.parametrize(("factor", "low", "high"), [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (16.0, 2.0, 3.0)])
@pytest.mark.parametrize(("dims", "theta"), [(16, 5000.0), (64, 500_000.0), (128, 500_000.0)])
def test_llama3_frequencies(dims: int, theta: float, factor: float, low: float, high: float, original: int) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    found = inverse_frequencies(dims, rope_parameters({"rope_theta": theta, "rope_scaling": scaling}))
    np.testing.assert_allclose(found, slow_llama3(dims, theta, factor, low, high, original), rtol=1e-5)


def test_llama3_without_its_own_length_takes_the_models() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = inverse_frequencies(64, rope_parameters({"rope_scaling": scaling, "max_position_embeddings": 1024}))
    np.testing.assert_allclose(found, slow_llama3(64, 10_000, 8.0, 1.0, 4.0, 1024), rtol=1e-5)


def test_llama3_with_equal_bounds() -> None:
    """Llama 4 Scout's values: nothing is blended, nothing divides by zero."""
    scaling = {**LLAMA3, "rope_type": "llama3", "factor": 16.0, "high_freq_factor": 1.0}
    with np.errstate(all="raise"):
        found = inverse_frequencies(128, rope_parameters({"rope_theta": 500_000, "rope_scaling": scaling}))
    plain = slow_frequencies(128, 500_000)
    expected = [value / 16 if 2 * math.pi / value > 8192 else value for value in plain]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isfinite(found).all()


THETA = 500_000.0
SAME: list[dict[str, Any]] = [
    {"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_theta": THETA, "rope_scaling": {"type": "llama3", **LLAMA3}},
    {"rope_theta": THETA, "rope_scaling": {"type": "default", "rope_type": "llama3", **LLAMA3}},
    {"rope_theta": THETA, "rope_scaling": {"rope_type": None, "type": "llama3", **LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **LLAMA3}},
    {"rope_parameters": {"type": "llama3", "rope_theta": THETA, **LLAMA3}},
    {"rope_theta": 3.0, "rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **LLAMA3}},
    {"rope_theta": THETA, "rope_scaling": None, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    {
        "rope_theta": THETA,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 7.0},
    },
    {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    },
]


@pytest.mark.parametrize("config", SAME, ids=lambda config: "+".join(config))
def test_spellings_of_the_same_scaling(config: dict[str, Any]) -> None:
    found = inverse_frequencies(64, rope_parameters(config))
    assert np.array_equal(found, inverse_frequencies(64, rope_parameters(SAME[0])))


@pytest.mark.parametrize("config", [{}, {"rope_scaling": None, "rope_parameters": None}, {"rope_scaling": {}}], ids=str)
def test_defaults(config: dict[str, Any]) -> None:
    found = rope_parameters(config)
    assert (found["rope_type"], found["rope_theta"]) == ("default", 10_000.0)
    assert rope_parameters(config, 500_000.0)["rope_theta"] == 500_000.0


def test_the_config_is_left_alone() -> None:
    config = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}}
    rope_parameters(config)
    assert config == {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}}


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "Llama3"])
def test_unknown_scaling(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rope_type '{kind}' is not supported; supported: default, "):
        RoPE(16, rope_parameters({"rope_scaling": {"rope_type": kind, "factor": 2}}))


def rotate_half(x: np.ndarray, offsets: list[int], inverse: np.ndarray) -> np.ndarray:
    """[B, H, L, Dh], each row counted from its own offset."""
    half = x.shape[-1] // 2
    turned = np.empty_like(x)
    for row, offset in enumerate(offsets):
        angles = np.arange(offset, offset + x.shape[2], dtype=np.float64)[:, None] * inverse  # [L, Dh / 2]
        first, second = x[row, ..., :half], x[row, ..., half:]
        turned[row, ..., :half] = first * np.cos(angles) - second * np.sin(angles)
        turned[row, ..., half:] = second * np.cos(angles) + first * np.sin(angles)
    return turned


@pytest.mark.parametrize("offset", [0, 1, 700, [0, 5, 300]], ids=str)
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("config", [{}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}], ids=["plain", "llama3"])
def test_rotation(config: dict[str, Any], length: int, offset: int | list[int]) -> None:
    parameters = rope_parameters(config)
    x = np.random.default_rng(0).standard_normal((3, 2, length, 12)).astype(np.float32)
    given = mx.array(offset) if isinstance(offset, list) else offset
    offsets = offset if isinstance(offset, list) else [offset] * 3
    found = np.array(RoPE(12, parameters).at(given)(mx.array(x)))
    expected = rotate_half(x, offsets, inverse_frequencies(12, parameters).astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    if max(offsets) < 10:
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_theta": -1.0},
        {"rope_theta": float("inf")},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {**LLAMA3, "rope_type": "llama3", "factor": 0}},
        {"rope_scaling": {**LLAMA3, "rope_type": "llama3", "factor": float("nan")}},
    ],
    ids=str,
)
def test_parameters_that_give_no_frequencies(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give no frequencies"):
        inverse_frequencies(64, rope_parameters({"rope_theta": 10000.0, **wrong}))


def test_heads_that_no_model_has() -> None:
    """Before they are allocated."""
    with pytest.raises(ValueError, match="heads of 4611686018427387904 numbers"):
        inverse_frequencies(2**62, rope_parameters({}))
