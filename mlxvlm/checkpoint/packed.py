"""Quantised tensors in MLX's layout, made in NumPy. Knows codes and groups, not files and not models.

Source of the layout: MLX `quantize` (affine and the float modes); a row's codes are one little-endian stream of bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

# The leaf that marks a module as re-packed from another format: its scales keep the type that makes them exact, and
# its output is multiplied by this scalar.
OUTPUT_SCALE = "output_scale"


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Exactly mx.quantize's arguments."""

    bits: int
    group_size: int = 64
    mode: str = "affine"


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight [..., out, in] as mx.quantized_matmul takes it, equal to its source without rounding.

    weight: uint32 [..., out, in * bits / 32]. scales, biases: float16 or float32 [..., out, in / group_size], whichever
    is exact; uint8 scales and no biases in the float modes. The value is dequantize(...) * output_scale.
    """

    weight: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any] | None
    spec: QuantSpec
    output_scale: float = 1.0

    def tensors(self, path: str) -> dict[str, mx.array]:
        """As a module's tensors: `path`.weight, .scales, .biases and .output_scale."""
        arrays = {"weight": self.weight, "scales": self.scales, "biases": self.biases}
        named = {f"{path}.{leaf}": mx.array(array) for leaf, array in arrays.items() if array is not None}
        return named | {f"{path}.{OUTPUT_SCALE}": mx.array(self.output_scale, mx.float32)}


def quantized(path: str, weight: mx.array, spec: QuantSpec) -> dict[str, mx.array]:
    """A module's tensors from its full weight [..., out, in], evaluated: the caller can drop the original."""
    parts = mx.quantize(weight, spec.group_size, spec.bits, mode=spec.mode)
    mx.eval(parts)
    return {f"{path}.{leaf}": part for leaf, part in zip(("weight", "scales", "biases"), parts, strict=False)}


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """uint8 codes [..., n] below 2**bits -> uint32 [..., n * bits / 32]; n is a multiple of 8, n * bits one of 32."""
    *lead, count = codes.shape
    if count * bits % 32 or count % 8:
        raise ValueError(f"{count} codes of {bits} bits fill no whole words")
    words = np.ascontiguousarray(codes).view("<u8")
    # Eight codes in a word move together: neighbours join to pairs, pairs to fours, fours to eight.
    for step in (0, 1, 2) if bits < 8 else ():
        low = sum(((1 << (bits << step)) - 1) << start for start in range(0, 64, 16 << step))
        high = low << (bits << step)
        words = (words & np.uint64(low)) | ((words >> np.uint64((8 - bits) << step)) & np.uint64(high))
    stream = words.view(np.uint8).reshape(*lead, count // 8, 8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(*lead, count * bits // 8).view("<u4")
