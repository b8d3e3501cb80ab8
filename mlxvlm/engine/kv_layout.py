"""How a layer's keys and values are held, as they are or quantised, and attention over them. Knows no rows.

The parts of a layer are arrays [B, K, S, width]: keys and values, or the packed values, scales and biases of each. All
are made along a head's values, so that no position depends on another: rows join, leave and are cut as if unquantised.
Attention always reads what is held, of fresh positions too: a row's tokens then depend neither on how its prompt was
cut into chunks, nor on what came out of the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from mlxvlm.errors import ModelError
from mlxvlm.models.base import KVSpec

_SMALLEST_GROUP = 32  # of mx.quantize
_SCORE_COPIES = 3  # scores, masked scores and probabilities


def quantised(specs: Sequence[KVSpec], bits: int | None, group_size: int) -> Sequence[KVSpec]:
    """A model's layers, held in so many bits; None: as they are. Raises ModelError for heads that no group divides."""
    if bits is None:
        return specs
    return [replace(spec, bits=bits, group_size=_group_of(spec.head_dim, group_size)) for spec in specs]


def _group_of(head_dim: int, group_size: int) -> int:
    for size in (group_size, _SMALLEST_GROUP):
        if head_dim % size == 0:
            return size
    raise ModelError(
        f"the model's heads have {head_dim} values, which groups of {_SMALLEST_GROUP} don't divide: its keys and "
        "values can't be quantised, leave kv_bits (--kv-bits) out"
    )


def part_widths(spec: KVSpec) -> tuple[int, ...]:
    """Values of each part at one position of one head."""
    if spec.bits is None:
        return (spec.head_dim,) * 2
    groups = spec.head_dim // spec.group_size
    return (spec.head_dim * spec.bits // 32, groups, groups) * 2


def encode(spec: KVSpec, keys: mx.array, values: mx.array) -> list[mx.array]:
    """[B, K, L, Dh] -> parts."""
    if spec.bits is None:
        return [keys, values]
    return [part for each in (keys, values) for part in mx.quantize(each, group_size=spec.group_size, bits=spec.bits)]


def attend(
    spec: KVSpec, queries: mx.array, parts: Sequence[mx.array], scale: float, mask: mx.array | str | None
) -> mx.array:
    """Queries [B, H, L, Dh] over the parts of S positions; mask: bool [B, 1, L, S], "causal", or None for all."""
    if spec.bits is None:
        keys, values = parts
    else:
        # Whatever takes less memory, which for one head and position is a comparison without S. Llama 3.1 8B at 32k
        # positions: a chunk of 2,048 has 4.3 GB of scores a copy, a layer's keys and values in full are 134 MB, and
        # fused attention then writes no scores; a decode step has 2 MB of scores. Both read the same numbers.
        heads, new, dim = queries.shape[1:]
        if _SCORE_COPIES * heads * new <= 2 * spec.num_kv_heads * dim:
            return _attend_packed(spec, queries, parts, scale, mask)
        keys, values = _unpacked(spec, parts[:3]), _unpacked(spec, parts[3:])
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _attend_packed(
    spec: KVSpec, queries: mx.array, parts: Sequence[mx.array], scale: float, mask: mx.array | str | None
) -> mx.array:
    """Without unpacking; heads that share keys and values become more queries of one head."""
    rows, heads, new, dim = queries.shape
    shared = (rows, spec.num_kv_heads, heads // spec.num_kv_heads * new, -1)
    scores = _multiplied(spec, queries.reshape(shared), parts[:3], transpose=True)
    scores = scores.astype(mx.float32).reshape(rows, spec.num_kv_heads, -1, new, scores.shape[-1]) * scale
    if isinstance(mask, str):
        held = scores.shape[-1]
        mask = (mx.arange(held) <= mx.arange(held - new, held)[:, None])[None, None]
    if mask is not None:
        scores = mx.where(mask[:, :, None], scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1).astype(queries.dtype).reshape(shared)
    return _multiplied(spec, weights, parts[3:], transpose=False).reshape(rows, heads, new, dim)


def _unpacked(spec: KVSpec, packed: Sequence[mx.array]) -> mx.array:
    weights, scales, biases = packed
    return mx.dequantize(weights, scales, biases, group_size=spec.group_size, bits=spec.bits)


def _multiplied(spec: KVSpec, x: mx.array, packed: Sequence[mx.array], transpose: bool) -> mx.array:
    weights, scales, biases = packed
    return mx.quantized_matmul(x, weights, scales, biases, transpose, spec.group_size, spec.bits)
