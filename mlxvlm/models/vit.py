"""The plain vision transformer that SigLIP and CLIP share. Knows patches and layers, not where its output goes.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929); Zhai et al. 2023 (SigLIP, arXiv 2303.15343); transformers
`SiglipEncoderLayer`, `CLIPEncoderLayer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.errors import UnsupportedModelError
from mlxvlm.models.base import check_numbers
from mlxvlm.models.layers import activation, join_heads, split_heads


@dataclass(frozen=True)
class VisionConfig:
    """A vision_config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"vision width {self.hidden_size} can't be split into {self.num_attention_heads} heads")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> VisionConfig:
        """`defaults` are those of the reference's class for what a config leaves out."""
        given = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        return cls(**{**defaults, **given})

    @property
    def grid(self) -> int:
        """Patches a side; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size


class VisionAttention(nn.Module):
    """Attention over all patches of one frame, with biases."""

    def __init__(self, dims: int, num_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dims, dims)
        self.k_proj = nn.Linear(dims, dims)
        self.v_proj = nn.Linear(dims, dims)
        self.out_proj = nn.Linear(dims, dims)
        self._heads = num_heads
        self._scale = (dims // num_heads) ** -0.5

    def __call__(self, x: mx.array) -> mx.array:
        queries, keys, values = (
            split_heads(projection(x), self._heads) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self._scale)
        return self.out_proj(join_heads(mixed))


class VisionMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, dims: int, hidden_dims: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, dims)
        self._act = activation(act)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._act(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dims: int, hidden_dims: int, num_heads: int, act: str, eps: float) -> None:
        super().__init__()
        self.self_attn = VisionAttention(dims, num_heads)
        self.layer_norm1 = nn.LayerNorm(dims, eps=eps)
        self.mlp = VisionMLP(dims, hidden_dims, act)
        self.layer_norm2 = nn.LayerNorm(dims, eps=eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers, named as in the checkpoints. A tower may have fewer of them than its config says."""

    def __init__(self, config: VisionConfig, num_layers: int | None = None) -> None:
        super().__init__()
        self.layers = [
            EncoderLayer(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.hidden_act,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers if num_layers is None else num_layers)
        ]


# Head sizes that Metal's fused attention takes for more than 8 queries (MLX 0.32 `use_fallback`).
_FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)


def fused_padding(dims: int) -> int:
    """Zeros that a head needs behind it for the fused kernel; the CPU has none, and would only multiply them."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return 0
    return next((size for size in _FUSED_HEAD_DIMS if size >= dims), dims) - dims


def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Attention of all to all, [F, H, P, Dh]; odd head sizes go through the fused kernel with zeros behind them.

    Zeros add nothing to a dot product, and what they become in the output is cut off.
    """
    dims = queries.shape[-1]
    if padding := fused_padding(dims):
        widths = [(0, 0)] * 3 + [(0, padding)]
        queries, keys, values = (mx.pad(heads, widths) for heads in (queries, keys, values))
    mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=dims**-0.5)
    return mixed[..., :dims]


def pixel_shuffle(x: mx.array, scale: int) -> mx.array:
    """[F, P, D] of a square grid -> [F, P / s^2, s * s * D]: s x s patches side by side, row by row.

    Source: Shi et al. 2016 (arXiv 1609.05158), backwards; transformers `pixel_shuffle` of several models.
    """
    frames, patches, dims = x.shape
    small = int(patches**0.5) // scale
    blocks = x.reshape(frames, small, scale, small, scale, dims).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(frames, small * small, scale * scale * dims)


def to_channels_last(weight: mx.array, channels: int) -> mx.array:
    """A patch convolution [O, C, kH, kW] as MLX wants it, [O, kH, kW, C]; one that already is stays.

    Raises UnsupportedModelError where the shape does not tell which it is.
    """
    if weight.ndim != 4 or weight.shape[1] != channels:
        return weight
    if weight.shape[-1] == channels:
        raise UnsupportedModelError(
            f"patches of {channels} pixels and {channels} channels are not supported: the patch convolution "
            f"{tuple(weight.shape)} may be of either layout"
        )
    return weight.transpose(0, 2, 3, 1)
