"""Quantised layers whose weights were re-packed from another format. Knows factors and types, not the format.

Their scales have the type that keeps them exact, float16 or float32, and what MLX computes from such scales is float32
whatever the input: so the output is cast back. Some formats need a factor that no group's scale can hold.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.experts import QuantizedExpertLinear, expert_matmul


class _Repacked(nn.Module):
    """Takes over a quantised layer's parameters; `is_scaled`: whether `output_scale` will be anything but 1."""

    def __init__(self, layer: Any, is_scaled: bool) -> None:
        nn.Module.__init__(self)
        for name, array in layer.items():
            self[name] = array
        self.group_size, self.bits, self.mode = layer.group_size, layer.bits, layer.mode
        self.output_scale = mx.array(1.0)
        self._is_scaled = is_scaled
        self.freeze()

    def _read(self, x: mx.array) -> mx.array:
        # Before the factor, numbers may be hundreds of times as large: beyond float16.
        return x.astype(mx.float32) if self._is_scaled and x.dtype == mx.float16 else x

    def _finished(self, y: mx.array, dtype: mx.Dtype) -> mx.array:
        # The scale is a float32 array: the product is rounded once, by the cast.
        return (y * self.output_scale if self._is_scaled else y).astype(dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out], without a bias."""
        y = mx.quantized_matmul(
            self._read(x),
            self.weight,
            scales=self.scales,
            biases=self.get("biases"),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return self._finished(y, x.dtype)


class RepackedLinear(_Repacked):
    """A linear layer; the bias, where there is one, is not scaled."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out] in the input's type."""
        y = self.as_linear(x)
        return y + self.bias if "bias" in self else y


class RepackedEmbedding(_Repacked):
    """An embedding, as_linear where it is the head too."""

    def __call__(self, token_ids: mx.array) -> mx.array:
        """[...] -> float32 [..., D]; the decoder casts."""
        scales, biases = self.scales[token_ids], self.get("biases")
        if biases is not None:
            # A few rows: products in float16 would be rounded.
            scales, biases = scales.astype(mx.float32), biases[token_ids].astype(mx.float32)
        rows = mx.dequantize(
            self.weight[token_ids], scales, biases, self.group_size, self.bits, self.mode, dtype=mx.float32
        )
        return self._finished(rows, mx.float32)


class RepackedExpertLinear(_Repacked):
    """A stack of linear layers, see ExpertLinear."""

    def __call__(self, rows: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        """[R, 1, D], uint32 [R] -> [R, 1, out] in the input's type."""
        return self._finished(expert_matmul(self, self._read(rows), experts, is_sorted), rows.dtype)


_TWINS: dict[type[nn.Module], type[_Repacked]] = {
    nn.QuantizedLinear: RepackedLinear,
    nn.QuantizedEmbedding: RepackedEmbedding,
    QuantizedExpertLinear: RepackedExpertLinear,
}


def repacked(layer: nn.Module, is_scaled: bool) -> nn.Module:
    """The re-packed twin of what a layer's to_quantized gives."""
    return _TWINS[type(layer)](layer, is_scaled)
