"""Rotary position embedding and its scalings. Knows config keys, no family.

Sources: Su et al. 2021 (arXiv 2104.09864); transformers `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.errors import UnsupportedModelError

DEFAULT_THETA = 10000.0
_MAX_DIMS = 1 << 16  # far more than any head has

Rotation: TypeAlias = Callable[[mx.array], mx.array]  # queries or keys [B, H, L, Dh] -> the same, rotated


def rope_parameters(config: Mapping[str, Any], default_theta: float = DEFAULT_THETA) -> dict[str, Any]:
    """One dict with rope_type and rope_theta from any age of config.

    Old configs have rope_theta beside rope_scaling, transformers 5 has rope_parameters; rope_scaling wins over it.
    """
    merged = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    if merged.get("rope_theta") is None:
        fallback = (config.get("rope_parameters") or {}).get("rope_theta")
        merged["rope_theta"] = config.get("rope_theta") or fallback or default_theta
    merged.setdefault("max_position_embeddings", config.get("max_position_embeddings"))
    return merged


def _default_frequencies(dims: int, parameters: Mapping[str, Any]) -> NDArray[np.float32]:
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return (1.0 / np.power(np.float32(parameters["rope_theta"]), exponents)).astype(np.float32)


def _linear_frequencies(dims: int, parameters: Mapping[str, Any]) -> NDArray[np.float32]:
    return _default_frequencies(dims, parameters) / np.float32(parameters["factor"])


def _llama3_frequencies(dims: int, parameters: Mapping[str, Any]) -> NDArray[np.float32]:
    """Long waves are slowed by `factor`, short ones kept. Source: `_compute_llama3_parameters`."""
    inverse = _default_frequencies(dims, parameters)
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters.get("original_max_position_embeddings") or parameters["max_position_embeddings"]
    wavelengths = 2 * math.pi / inverse
    # With low == high nothing lies between; the guard keeps the unused quotient finite.
    smooth = (original / wavelengths - low) / (high - low if high != low else 1.0)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = np.where(wavelengths > original / low, inverse / factor, inverse)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return np.where(between, blended, scaled).astype(np.float32)


def _divided_frequencies(dims: int, parameters: Mapping[str, Any]) -> NDArray[np.float32]:
    """A factor for each frequency, as llama.cpp stores llama3's scaling. Source: `ggml_rope_ext`, freq_factors."""
    factors = np.asarray(parameters["factors"], np.float32)
    if factors.shape != (dims // 2,) or not np.all(np.isfinite(factors) & (factors > 0)):
        raise ValueError(f"{factors.size} RoPE factors for {dims // 2} frequencies, or some that are not positive")
    return _default_frequencies(dims, parameters) / factors


_FREQUENCIES: dict[str, Callable[[int, Mapping[str, Any]], NDArray[np.float32]]] = {
    "default": _default_frequencies,
    "mrope": _default_frequencies,  # only the positions have three axes
    "linear": _linear_frequencies,
    "llama3": _llama3_frequencies,
    "factors": _divided_frequencies,
}


def inverse_frequencies(dims: int, parameters: Mapping[str, Any]) -> NDArray[np.float32]:
    """float32 [dims / 2]: angle of pair j at position p is p * result[j]. Raises ValueError for nonsense."""
    kind = parameters["rope_type"]
    if kind not in _FREQUENCIES:
        raise UnsupportedModelError(f"rope_type {kind!r} is not supported; supported: {', '.join(_FREQUENCIES)}")
    if dims > _MAX_DIMS:
        raise ValueError(f"heads of {dims} numbers")
    with np.errstate(all="ignore"):
        frequencies = _FREQUENCIES[kind](dims, parameters)
    if not np.all(np.isfinite(frequencies) & (frequencies > 0)):
        raise ValueError(f"these RoPE parameters give no frequencies: {dict(parameters)}")
    return frequencies


class RoPE:
    """Rotates [B, H, L, Dh] by positions counted from an offset.

    Element j pairs with j + dims / 2; interleaved, 2j pairs with 2j + 1.
    """

    def __init__(self, dims: int, parameters: Mapping[str, Any], interleaved: bool = False) -> None:
        self.dims = dims
        # mx.fast.rope takes wavelengths / 2 pi, the reciprocals of the inverse frequencies.
        self._periods = mx.array(1.0 / inverse_frequencies(dims, parameters))
        self._interleaved = interleaved

    def at(self, offset: int | mx.array) -> Rotation:
        """The rotation of one forward pass whose rows stand at `offset`, an int or int32 [B]."""
        return partial(
            mx.fast.rope,
            dims=self.dims,
            traditional=self._interleaved,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )


class MRoPE(RoPE):
    """RoPE over three axes (time, height, width): each frequency reads its position from one of them.

    Sources: Wang et al. 2024 (Qwen2-VL, arXiv 2409.12191); transformers `Qwen2VLRotaryEmbedding`.
    """

    def __init__(self, dims: int, parameters: Mapping[str, Any], sections: Sequence[int]) -> None:
        super().__init__(dims, parameters)
        if sum(sections) != dims // 2:
            raise ValueError(f"mrope_section {list(sections)} does not cover {dims // 2} frequencies")
        self._inverse = mx.array(inverse_frequencies(dims, parameters))
        self._axes = mx.array(np.repeat(np.arange(len(sections)) % 3, sections).astype(np.int32))

    def at_positions(self, positions: mx.array) -> Rotation:
        """The rotation of one forward pass at positions [3, B, L]; where all three agree it is that of `at`."""
        chosen = positions[self._axes].transpose(1, 2, 0)  # [B, L, Dh / 2]
        return rotation(chosen[:, None] * self._inverse)


def rotation(angles: mx.array) -> Rotation:
    """Rotates element j and j + dims / 2 by float32 angles [..., L, Dh / 2], for positions that are no plain count.

    Computes in float32 and answers in the dtype of what it rotates, as mx.fast.rope does.
    """
    cos, sin = mx.cos(angles), mx.sin(angles)

    def rotate(x: mx.array) -> mx.array:
        first, second = mx.split(x, 2, axis=-1)
        return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

    return rotate
