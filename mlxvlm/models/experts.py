"""Mixtures of gated MLPs, each projection one stack over all experts. Knows rows and experts, not who chose them.

Sources: Shazeer et al. 2017 (arXiv 1701.06538); mlx-lm `switch_layers.py`, which has the same names and shapes.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.layers import activation

# From here on MLX's Metal kernels read each expert's weights once for all its rows, if these lie together.
_MIN_SORTED_ROWS = 16
_MIN_ROWS_PER_EXPERT = 4


class ExpertLinear(nn.Module):
    """One linear layer without bias for each expert: row i goes through layer experts[i]."""

    def __init__(self, num_experts: int, dims: int, out_dims: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, out_dims, dims))

    def __call__(self, rows: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        """[R, 1, D], uint32 [R] -> [R, 1, out]."""
        stack = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(rows, stack, rhs_indices=experts, sorted_indices=is_sorted)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedExpertLinear:
        """The same layers, quantised."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """ExpertLinear with packed weights."""

    def __init__(self, weight: mx.array, group_size: int | None, bits: int | None, mode: str) -> None:
        super().__init__()
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        self.biases = biases[0] if biases else None  # the float modes have none
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.freeze()

    def __call__(self, rows: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        """[R, 1, D], uint32 [R] -> [R, 1, out]."""
        return expert_matmul(self, rows, experts, is_sorted)


def expert_matmul(layer: nn.Module, rows: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
    """[R, 1, D], uint32 [R] -> [R, 1, out] with a layer's packed weights."""
    return mx.gather_qmm(
        rows,
        layer.weight,
        layer.scales,
        layer.get("biases"),
        rhs_indices=experts,
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        sorted_indices=is_sorted,
    )


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of one chosen expert a row; attribute names are those of a single gated MLP."""

    def __init__(self, num_experts: int, dims: int, hidden_dims: int, act: str) -> None:
        super().__init__()
        self.gate_proj = ExpertLinear(num_experts, dims, hidden_dims)
        self.up_proj = ExpertLinear(num_experts, dims, hidden_dims)
        self.down_proj = ExpertLinear(num_experts, hidden_dims, dims)
        self._num_experts = num_experts
        self._act = activation(act)

    def __call__(self, rows: mx.array, experts: mx.array) -> mx.array:
        """[R, D], uint32 [R] -> [R, D]."""
        # Sorting costs a gather before and after, so a decode step's few rows stay as they are.
        if rows.shape[0] < max(_MIN_SORTED_ROWS, _MIN_ROWS_PER_EXPERT * self._num_experts):
            return self._apply(rows, experts, False)
        order = mx.argsort(experts)
        return self._apply(rows[order], experts[order], True)[mx.argsort(order)]

    def _apply(self, rows: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        rows = rows[:, None]  # [R, 1, D]: one matrix of one row for each
        gate = self._act(self.gate_proj(rows, experts, is_sorted))
        return self.down_proj(gate * self.up_proj(rows, experts, is_sorted), experts, is_sorted)[:, 0]
