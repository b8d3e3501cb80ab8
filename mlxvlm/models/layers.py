"""Leaves that several families share. Attribute names are the checkpoints' keys."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.errors import UnsupportedModelError

Activation = Callable[[mx.array], mx.array]


def _quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "gelu": nn.gelu,  # exact, with erf
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": _quick_gelu,
}


def activation(name: str) -> Activation:
    """The function that transformers calls `name`."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def unshared(x: mx.array) -> mx.array:
    """What is made of a partial sum, or of what one rank has, while there is one rank; see shares.py for several."""
    return x


def split_heads(x: mx.array, num_heads: int) -> mx.array:
    """[B, L, H * Dh] -> [B, H, L, Dh]."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: mx.array) -> mx.array:
    """[B, H, L, Dh] -> [B, L, H * Dh]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), the MLP of Llama-shaped decoders (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dims: int, hidden_dims: int, act: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden_dims, bias=bias)
        self.up_proj = nn.Linear(dims, hidden_dims, bias=bias)
        self.down_proj = nn.Linear(hidden_dims, dims, bias=bias)
        self._act = activation(act)
        self._sum = unshared

    def __call__(self, x: mx.array) -> mx.array:
        return self._sum(self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x)))
