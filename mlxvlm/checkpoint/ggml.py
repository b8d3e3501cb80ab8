"""ggml's block types -> float32, or MLX's packed layout where that is exact. Knows blocks, not files and not names.

Every quantised type is read as unsigned codes in groups of equal scale: value = scale * (code - offset), or
scale * code + minimum. MLX computes scale * code + bias, with bias = -scale * offset or the minimum. In float32 all
those products are exact (a float16 scale, at most 6 bits of sub-scale, at most 8 bits of code: 24 bits), so the one
addition rounds as ggml's does, fused or not: equal values, though a zero may lose its sign. Q8K's scale has 24 bits
already: its codes and scale are kept exactly, and MLX's float32 values differ by 2**-15 of a scale at most (fused
multiply-add: not at all).

Source: the block structs of ggml-common.h and the dequantize_row functions of ggml-quants.c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxvlm.checkpoint.packed import Packed, QuantSpec, pack_codes
from mlxvlm.errors import UnsupportedModelError, WeightsError

Bytes = NDArray[np.uint8]
Array = NDArray[Any]
# Of some blocks: codes [n, elements], scales [n, groups], minima [n, groups] or None.
Decoded = tuple[Array, Array, Array | None]

SLAB_ELEMENTS = 1 << 19  # decoded at a time: the temporaries stay in a core's cache


class GGMLType(IntEnum):
    """ggml's ids (enum ggml_type); the K types are written without their underscore."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2K = 10
    Q3K = 11
    Q4K = 12
    Q5K = 13
    Q6K = 14
    Q8K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


# Little-endian elements of the types that are not quantised; NumPy has no bfloat16, so it stays bits here.
PLAIN: dict[GGMLType, np.dtype[Any]] = {
    GGMLType.F32: np.dtype("<f4"),
    GGMLType.F16: np.dtype("<f2"),
    GGMLType.BF16: np.dtype("<u2"),
    GGMLType.F64: np.dtype("<f8"),
    GGMLType.I8: np.dtype("i1"),
    GGMLType.I16: np.dtype("<i2"),
    GGMLType.I32: np.dtype("<i4"),
    GGMLType.I64: np.dtype("<i8"),
}

_PAIRS = np.array([[0], [2], [4], [6]], np.uint8)  # where the four 2-bit fields of a byte start
_BITS = np.arange(8, dtype=np.uint8)[:, None]
# The values of IQ4's codes (kvalues_iq4nl) with 128 added.
_IQ4 = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint8)
# The values of E2M1's codes.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Times any code these are still float32.
_LARGEST_SCALE = np.float32(2.0**119)
_LARGEST_EXPONENT = 252  # as E8M0 writes it; 255 is its NaN


def _halves(qs: Array) -> Array:
    """[..., k] -> [..., 2k]: all low nibbles, then all high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _fields(qs: Array) -> Array:
    """[..., 32] -> [..., 4, 32]: the lowest two bits of all bytes, then the next two."""
    return (qs[..., None, :] >> _PAIRS) & 3


def _per_block(d: Array) -> Array:
    return d[:, None]


def _q4_0(blocks: Array) -> Decoded:
    return _halves(blocks["qs"]), _per_block(blocks["d"]), None


def _q4_1(blocks: Array) -> Decoded:
    return _halves(blocks["qs"]), _per_block(blocks["d"]), _per_block(blocks["m"])


def _fifth(blocks: Array) -> Array:
    return np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4


def _q5_0(blocks: Array) -> Decoded:
    return _halves(blocks["qs"]) | _fifth(blocks), _per_block(blocks["d"]), None


def _q5_1(blocks: Array) -> Decoded:
    return _halves(blocks["qs"]) | _fifth(blocks), _per_block(blocks["d"]), _per_block(blocks["m"])


def _q8(blocks: Array) -> Decoded:
    return blocks["qs"] ^ 128, _per_block(blocks["d"]), None  # a signed byte plus 128


def _q2k(blocks: Array) -> Decoded:
    codes = _fields(blocks["qs"].reshape(-1, 2, 32))
    d, dmin = (_per_block(blocks[name].astype(np.float32)) for name in ("d", "dmin"))
    return codes, d * (blocks["scales"] & 15), -dmin * (blocks["scales"] >> 4)


def _q3k(blocks: Array) -> Decoded:
    """Sub-scale times code lies in -124...128, so 8 bits hold the product: code 128 - product, scale -d.

    Scales for each 16 elements have no form in MLX, one scale for 256 elements has.
    """
    high = (blocks["hmask"][:, None, :] >> _BITS) & 1
    codes = _fields(blocks["qs"].reshape(-1, 2, 32)).reshape(-1, 8, 32) | (high << 2)
    packed = blocks["scales"]
    six = _halves(packed[:, :8]) | (_fields(packed[:, 8:]).reshape(-1, 16) << 4)
    # Arithmetic modulo 256: true products that are negative come out right.
    product = (six - np.uint8(32))[..., None] * (codes - np.uint8(4)).reshape(-1, 16, 16)
    return np.uint8(128) - product, -_per_block(blocks["d"]), None


def _six_bit_pairs(packed: Array) -> tuple[Array, Array]:
    """[n, 12] -> the 8 scales and the 8 minima of Q4K and Q5K, each [n, 8]."""
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([high & 63, (rest >> 4) | ((high >> 6) << 4)], axis=-1)
    return scales, minima


def _q4k(blocks: Array) -> Decoded:
    scales, minima = _six_bit_pairs(blocks["scales"])
    d, dmin = (_per_block(blocks[name].astype(np.float32)) for name in ("d", "dmin"))
    return _halves(blocks["qs"].reshape(-1, 4, 32)), d * scales, -dmin * minima


def _q5k(blocks: Array) -> Decoded:
    codes, scales, minima = _q4k(blocks)
    fifth = (blocks["qh"][:, None, :] >> _BITS) & 1
    return codes.reshape(-1, 8, 32) | (fifth << 4), scales, minima


def _q6k(blocks: Array) -> Decoded:
    low = _halves(blocks["ql"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    codes = low | (_fields(blocks["qh"].reshape(-1, 2, 32)) << 4)
    return codes, _per_block(blocks["d"].astype(np.float32)) * blocks["scales"], None


def _iq4_nl(blocks: Array) -> Decoded:
    return _IQ4[_halves(blocks["qs"])], _per_block(blocks["d"]), None


def _iq4_xs(blocks: Array) -> Decoded:
    low = np.stack([blocks["low"] & 15, blocks["low"] >> 4], axis=-1).reshape(-1, 8)
    high = (blocks["high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scales = (low | (high << 4)).astype(np.float32) - 32
    codes = _IQ4[_halves(blocks["qs"].reshape(-1, 8, 16))]
    return codes, _per_block(blocks["d"].astype(np.float32)) * scales, None


def _mxfp4(blocks: Array) -> Decoded:
    return _halves(blocks["qs"]), _per_block(blocks["e"]), None


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A quantised type: its struct, the elements of a block, its decoder; bits and group of its decoded codes."""

    struct: np.dtype[Any]
    elements: int
    decode: Callable[[Array], Decoded]
    bits: int
    group: int
    offset: int = 0
    mode: str = "affine"


def _struct(*fields: tuple[Any, ...]) -> np.dtype[Any]:
    return np.dtype(list(fields))


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")
_QS16, _QS32, _QS64, _QS128 = (("qs", "u1", (count,)) for count in (16, 32, 64, 128))
_PACKED = ("scales", "u1", (12,))
_XS_SCALES = (("high", "<u2"), ("low", "u1", (4,)))

_QUANTISED: dict[GGMLType, _Blocks] = {
    GGMLType.Q4_0: _Blocks(_struct(_D, _QS16), 32, _q4_0, 4, 32, offset=8),
    GGMLType.Q4_1: _Blocks(_struct(_D, _M, _QS16), 32, _q4_1, 4, 32),
    GGMLType.Q5_0: _Blocks(_struct(_D, ("qh", "u1", (4,)), _QS16), 32, _q5_0, 5, 32, offset=16),
    GGMLType.Q5_1: _Blocks(_struct(_D, _M, ("qh", "u1", (4,)), _QS16), 32, _q5_1, 5, 32),
    GGMLType.Q8_0: _Blocks(_struct(_D, _QS32), 32, _q8, 8, 32, offset=128),
    GGMLType.Q8_1: _Blocks(_struct(_D, ("sum", "<f2"), _QS32), 32, _q8, 8, 32, offset=128),
    GGMLType.Q2K: _Blocks(_struct(("scales", "u1", (16,)), _QS64, _D, _DMIN), 256, _q2k, 2, 16),
    GGMLType.Q3K: _Blocks(_struct(("hmask", "u1", (32,)), _QS64, _PACKED, _D), 256, _q3k, 8, 128, offset=128),
    GGMLType.Q4K: _Blocks(_struct(_D, _DMIN, _PACKED, _QS128), 256, _q4k, 4, 32),
    GGMLType.Q5K: _Blocks(_struct(_D, _DMIN, _PACKED, ("qh", "u1", (32,)), _QS128), 256, _q5k, 5, 32),
    GGMLType.Q6K: _Blocks(
        _struct(("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), _D), 256, _q6k, 6, 16, offset=32
    ),
    GGMLType.Q8K: _Blocks(
        _struct(("d", "<f4"), ("qs", "u1", (256,)), ("sums", "<i2", (16,))), 256, _q8, 8, 128, offset=128
    ),
    GGMLType.IQ4_NL: _Blocks(_struct(_D, _QS16), 32, _iq4_nl, 8, 32, offset=128),
    GGMLType.IQ4_XS: _Blocks(_struct(_D, *_XS_SCALES, _QS128), 256, _iq4_xs, 8, 32, offset=128),
    GGMLType.MXFP4: _Blocks(_struct(("e", "u1"), _QS16), 32, _mxfp4, 4, 32, mode="mxfp4"),
}
_SMALLEST_MLX_GROUP = 32
_REMEDY = "use a file of another quantisation, as Q4_K_M"


def ggml_type(number: int) -> GGMLType:
    """The type with this id. Raises UnsupportedModelError for ids and types that can't be read."""
    known = {int(kind): kind for kind in GGMLType}
    kind = known.get(number)
    if kind is None:
        raise UnsupportedModelError(f"ggml type {number} is unknown; {_REMEDY}")
    _check_readable(kind)
    return kind


def _check_readable(kind: GGMLType) -> None:
    if kind not in PLAIN and kind not in _QUANTISED:
        raise UnsupportedModelError(
            f"ggml type {kind.name} can't be read; use a file of another quantisation, as Q4_K_M"
        )


def nbytes(kind: GGMLType, shape: Sequence[int]) -> int:
    """The bytes of a tensor. Raises WeightsError where a row is no whole number of blocks."""
    _check_readable(kind)
    if any(size < 1 for size in shape):
        raise WeightsError(f"shape {list(shape)} holds nothing")
    count = math.prod(shape)
    if kind in PLAIN:
        return count * PLAIN[kind].itemsize
    blocks = _QUANTISED[kind]
    if not shape or shape[-1] % blocks.elements:
        raise WeightsError(f"shape {list(shape)} does not fit {kind.name}: its blocks have {blocks.elements} elements")
    return count // blocks.elements * blocks.struct.itemsize


def plain(data: Bytes, kind: GGMLType, shape: Sequence[int]) -> Array:
    """A type of PLAIN as it is, in its own shape; bfloat16 as uint16 bits. Shares memory with `data` if it can."""
    _check_size(data, kind, shape)
    return np.ascontiguousarray(data).view(PLAIN[kind]).reshape(shape)


def dequantize(data: Bytes, kind: GGMLType, shape: Sequence[int]) -> NDArray[np.float32]:
    """uint8 [nbytes] -> float32 of `shape`, last dimension contiguous; F64 and large integers are rounded.

    Raises WeightsError where `data` is not as long as the shape says, before anything is allocated, or holds scales
    that are not numbers.
    """
    if kind in PLAIN:
        values = plain(data, kind, shape)
        if kind is GGMLType.BF16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)
    _check_size(data, kind, shape)
    layout = _QUANTISED[kind]
    out = np.empty((data.size // layout.struct.itemsize, layout.elements), np.float32)
    for part, (codes, scales, minima) in _slabs(data, layout):
        values = out[part].reshape(len(codes), -1, layout.elements // scales.shape[1])
        codes = codes.reshape(values.shape)
        if layout.mode == "mxfp4":
            np.multiply(_E2M1[codes], np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None], out=values)
            continue
        np.subtract(codes, layout.offset, out=values, dtype=np.float32)
        values *= scales[..., None]
        if minima is not None:
            values += minima[..., None]
    return out.reshape(shape)


def repack(data: Bytes, kind: GGMLType, shape: Sequence[int]) -> Packed | None:
    """uint8 [nbytes] -> MLX's layout of [..., out, in] with the same values; None where MLX has none.

    None: Q2K and Q6K (their scales are for 16 elements, MLX's for 32 or more), types that are not quantised, vectors.
    Raises WeightsError where `data` is not as long as the shape says, or holds scales that are not numbers.
    """
    _check_size(data, kind, shape)
    layout = _QUANTISED.get(kind)
    if layout is None or layout.group < _SMALLEST_MLX_GROUP or len(shape) < 2:
        return None
    count, groups = data.size // layout.struct.itemsize, layout.elements // layout.group
    words = np.empty((count, layout.elements * layout.bits // 32), np.uint32)
    parts: list[Array] = []
    for part, (codes, *numbers) in _slabs(data, layout):
        words[part] = pack_codes(codes.reshape(len(codes), -1), layout.bits)
        given = [number for number in numbers if number is not None]
        parts = parts or [np.empty((count, groups), number.dtype) for number in given]
        for whole, number in zip(parts, given, strict=True):
            whole[part] = number
    if layout.mode == "affine" and len(parts) == 1:
        parts = _symmetric(parts[0], layout.offset)
    rows = [part.reshape(*shape[:-1], -1) for part in (words, *parts)]
    return Packed(
        rows[0], rows[1], rows[2] if len(rows) > 2 else None, QuantSpec(layout.bits, layout.group, layout.mode)
    )


def _slabs(data: Bytes, layout: _Blocks) -> Iterator[tuple[slice, Decoded]]:
    """Decodes a few blocks at a time; the slice counts blocks. Raises WeightsError for scales that are not numbers."""
    blocks = np.ascontiguousarray(data).view(layout.struct)
    step = SLAB_ELEMENTS // layout.elements
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        with np.errstate(invalid="ignore"):  # infinity times nothing; refused below
            decoded = layout.decode(blocks[part])
        largest = _LARGEST_EXPONENT if layout.mode == "mxfp4" else _LARGEST_SCALE
        if not all(np.all(np.abs(numbers) <= largest) for numbers in decoded[1:] if numbers is not None):
            raise WeightsError("holds scales that are not numbers: the file is damaged; fetch it again")
        yield part, decoded


def _symmetric(scales: Array, offset: int) -> list[Array]:
    """Scales and biases, both float32 if a bias is beyond float16; exact, as the offset is a power of two."""
    biases = scales.astype(np.float32) * np.float32(-offset)
    if scales.dtype == np.float16 and np.all(np.abs(biases) <= np.finfo(np.float16).max):
        return [scales, biases.astype(np.float16)]
    return [scales.astype(np.float32), biases]


def _check_size(data: Bytes, kind: GGMLType, shape: Sequence[int]) -> None:
    expected = nbytes(kind, shape)
    if data.size != expected:
        raise WeightsError(f"has {data.size} bytes where {kind.name} of shape {list(shape)} needs {expected}")
