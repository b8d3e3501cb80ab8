"""One UQFF layer -> tensors of a Conversion. Knows the seven formats, not files and not models.

A layer's parts have the names that UQFF 1.x gives them after `<module>.weight`; older records are read into the same
parts. Source: mistral.rs 0.9, mistralrs-quant; F8Q8's 416 is its encoder's largest E4M3, not the type's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum

import mlx.core as mx
import numpy as np

from mlxvlm.checkpoint import ggml
from mlxvlm.checkpoint.container import E4M3, FLOATS, Tensor
from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.packed import Packed, QuantSpec
from mlxvlm.errors import UnsupportedModelError, WeightsError

Parts = Mapping[str, Tensor]  # "" is the weight, then "format", "shape", "scales" ...


class Format(IntEnum):
    """The value of `<module>.weight.format`; older files' record types are the same."""

    GGUF = 0
    UNQUANT = 1
    HQQ = 2
    FP8 = 3
    AFQ = 4
    F8Q8 = 5
    MXFP4 = 6


AFQ_BITS = (2, 3, 4, 6, 8)
AFQ_GROUPS = (32, 64, 128)
BLOCK = 32  # elements of an F8Q8 block and of an MXFP4 group
_F8Q8 = np.dtype([("d", "u1"), ("q", "i1", BLOCK)])
_F8Q8_MAX = 416
_E4M3_ID = 9  # the program's own number for the type
_NOT_A_SCALE = 255  # E8M0's NaN
_ONE = 127  # E8M0's 1.0
_STACKS = (Format.GGUF, Format.UNQUANT, Format.AFQ, Format.MXFP4)


def add(conversion: Conversion, path: str, parts: Parts) -> None:
    """The layer of the module at `path`, its bias included. Raises WeightsError that says what is wrong, not where."""
    kind = format_of(parts)
    expected = {"", "format", *_PARTS[kind]}
    odd = sorted((parts.keys() - {"bias"}) ^ expected)
    if odd:
        lacks = [name or "weight" for name in odd if name in expected]
        raise WeightsError(f"lacks {', '.join(lacks)}" if lacks else f"has unknown parts {', '.join(odd)}")
    rank = len(shape_of(parts))
    if rank != 2 and not (rank == 3 and kind in _STACKS):
        raise WeightsError(f"has {rank} dimensions, which {kind.name} layers can't have")
    _ADD[kind](conversion, path, parts)
    if "bias" in parts:
        bias = parts["bias"]
        if bias.dtype not in (*FLOATS, "F8_E4M3") or len(bias.shape) != 1:
            raise WeightsError(f"has a bias of {bias.dtype} {list(bias.shape)}")
        conversion.plain(f"{path}.bias", bias.mlx())


@contextmanager
def named(place: str) -> Iterator[None]:
    """Errors that say what is wrong, not where, get the place in front."""
    try:
        yield
    except (WeightsError, UnsupportedModelError) as error:
        raise type(error)(f"{place} {error}") from error


def format_of(parts: Parts) -> Format:
    number = _number(parts, "format", "U8")
    if number not in list(Format):
        raise UnsupportedModelError(f"is of format {number}, which is unknown; update mlxvlm")
    return Format(number)


def shape_of(parts: Parts) -> tuple[int, ...]:
    """The logical shape, [out, in] or [E, out, in]. Raises WeightsError for parts that are missing."""
    kind = format_of(parts)
    if kind in (Format.GGUF, Format.HQQ, Format.F8Q8):
        shape = tuple(_part(parts, "shape").numbers("U32"))
        if not shape or 0 in shape:
            raise WeightsError(f"has the shape {list(shape)}")
        return shape
    if kind in (Format.UNQUANT, Format.FP8):
        return _part(parts, "").shape
    *lead, groups = _part(parts, "scales").shape or (0,)
    return *lead, groups * (_number(parts, "group_size", "U8") if kind == Format.AFQ else BLOCK)


def _part(parts: Parts, name: str) -> Tensor:
    if name not in parts:
        raise WeightsError(f"lacks {name or 'weight'}")
    return parts[name]


def _number(parts: Parts, name: str, *dtypes: str) -> int:
    numbers = _part(parts, name).numbers(*dtypes)
    if len(numbers) != 1:
        raise WeightsError(f"has {len(numbers)} numbers for {name}")
    return numbers[0]


def _check(tensor: Tensor, dtype: str, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise WeightsError(f"has {name} of {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(shape)}")


def _gguf(conversion: Conversion, path: str, parts: Parts) -> None:
    kind, shape = ggml.ggml_type(_number(parts, "dtype", "U32")), shape_of(parts)
    _check(parts[""], "U8", (ggml.nbytes(kind, shape),), "weight")
    conversion.ggml(path, parts[""].data, kind, shape)


def _unquant(conversion: Conversion, path: str, parts: Parts) -> None:
    if parts[""].dtype not in FLOATS:
        raise WeightsError(f"has an unquantised weight of {parts[''].dtype}")
    conversion.plain(f"{path}.weight", parts[""].mlx())


def _hqq(conversion: Conversion, path: str, parts: Parts) -> None:
    """Groups lie along axis 0 of a [group, N / group] matrix of codes, so that they cross the weight's rows."""
    bits, group, shape = _number(parts, "bits", "U8"), _number(parts, "group_size", "U32"), shape_of(parts)
    if bits not in (4, 8) or _number(parts, "axis", "U8") != 0:
        raise UnsupportedModelError(
            f"is HQQ of {bits} bits, axis {_number(parts, 'axis', 'U8')}; 4 or 8, axis 0, can be read"
        )
    if group not in (32, 64, 128) or math.prod(shape) % group:
        raise WeightsError(f"has groups of {group} in the shape {list(shape)}")
    columns = math.prod(shape) // group
    _check(parts[""], "U8", (group * bits // 8, columns), "weight")
    for name in ("scales", "zeros"):
        _check(parts[name], parts[name].dtype, (1, columns), name)
    codes = parts[""].bits
    if bits == 4:
        codes = np.concatenate([codes >> 4, codes & 15])  # the high half first
    values = codes.astype(np.float32)
    values -= parts["zeros"].float32()
    values *= parts["scales"].float32()
    conversion.inexact(path, values.reshape(shape), f"HQQ{bits}")


def _fp8(conversion: Conversion, path: str, parts: Parts) -> None:
    shape, scale = shape_of(parts), parts["dequant_w_scale"].float32().reshape(-1)
    _check(parts[""], "F8_E4M3", shape, "weight")
    if _number(parts, "dtype", "U32") != _E4M3_ID:
        raise UnsupportedModelError("is FP8 of another kind than E4M3")
    if scale.size != 1 or not np.isfinite(scale[0]):
        raise WeightsError("has no scale that is a number")
    codes = parts[""].bits
    if np.any((codes & 0x7F) == 0x7F):
        raise WeightsError("holds weights that are no numbers: the file is damaged; fetch it again")
    if shape[-1] % BLOCK:
        conversion.inexact(path, E4M3[codes] * scale[0], "FP8")
        return
    ones = np.full((*shape[:-1], shape[-1] // BLOCK), _ONE, np.uint8)
    conversion.exact(path, Packed(codes.view("<u4"), ones, None, QuantSpec(8, BLOCK, "mxfp8"), float(scale[0])))


def _afq(conversion: Conversion, path: str, parts: Parts) -> None:
    bits, group, shape = _number(parts, "bits", "U8"), _number(parts, "group_size", "U8"), shape_of(parts)
    if bits not in AFQ_BITS or group not in AFQ_GROUPS:
        raise WeightsError(f"is AFQ of {bits} bits in groups of {group}, which does not exist")
    scales, biases = parts["scales"], parts["biases"]
    if scales.dtype not in FLOATS or biases.dtype != scales.dtype:
        raise WeightsError(f"has scales of {scales.dtype} and biases of {biases.dtype}")
    _check(biases, scales.dtype, scales.shape, "biases")
    _check(parts[""], "U32", (*shape[:-1], shape[-1] * bits // 32), "weight")
    for leaf, tensor in (("weight", parts[""]), ("scales", scales), ("biases", biases)):
        conversion.plain(f"{path}.{leaf}", tensor.mlx())


def _f8q8(conversion: Conversion, path: str, parts: Parts) -> None:
    shape, count = shape_of(parts), _number(parts, "num_blocks", "U32")
    if count != -(-math.prod(shape) // BLOCK):
        raise WeightsError(f"has {count} blocks for the shape {list(shape)}")
    _check(parts[""], "U8", (count * _F8Q8.itemsize,), "weight")
    blocks = parts[""].data.view(_F8Q8)
    scales = E4M3[blocks["d"]]
    if not np.all(np.isfinite(scales)):
        raise WeightsError("holds scales that are no numbers: the file is damaged; fetch it again")
    factor = np.float32(1 / _F8Q8_MAX)
    if shape[-1] % BLOCK:
        values = blocks["q"].astype(np.float32) * scales[:, None] * factor
        conversion.inexact(path, values.reshape(-1)[: math.prod(shape)].reshape(shape), "F8Q8")
        return
    # q + 128, and E4M3 times 128, are exact.
    codes = (blocks["q"].view(np.uint8) ^ 0x80).reshape(shape)
    groups = scales.reshape(*shape[:-1], -1).astype(np.float16)
    packed = Packed(codes.view("<u4"), groups, groups * np.float16(-128), QuantSpec(8, BLOCK), float(factor))
    conversion.exact(path, packed)


def _mxfp4(conversion: Conversion, path: str, parts: Parts) -> None:
    shape = shape_of(parts)
    _check(parts["scales"], "U8", (*shape[:-1], shape[-1] // BLOCK), "scales")
    _check(parts[""], "U8", (*shape[:-1], shape[-1] // 2), "weight")
    scales = parts["scales"].bits
    if np.any(scales == _NOT_A_SCALE):
        raise WeightsError("holds scales that are no numbers: the file is damaged; fetch it again")
    # MLX's own layout: no factor, no marker.
    conversion.plain(f"{path}.weight", mx.array(parts[""].bits.view("<u4")))
    conversion.plain(f"{path}.scales", mx.array(scales))


_PARTS: Mapping[Format, tuple[str, ...]] = {
    Format.GGUF: ("dtype", "shape"),
    Format.UNQUANT: (),
    Format.HQQ: (
        "scales",
        "zeros",
        "shape",
        "bits",
        "axis",
        "round_zeros",
        "channel_wise",
        "group_size",
        "optimization_steps",
    ),
    Format.FP8: ("dequant_w_scale", "dequant_x_scale", "quant_scale", "dtype"),
    Format.AFQ: ("scales", "biases", "bits", "group_size"),
    Format.F8Q8: ("num_blocks", "shape"),
    Format.MXFP4: ("scales",),
}
_ADD: Mapping[Format, Callable[[Conversion, str, Parts], None]] = {
    Format.GGUF: _gguf,
    Format.UNQUANT: _unquant,
    Format.HQQ: _hqq,
    Format.FP8: _fp8,
    Format.AFQ: _afq,
    Format.F8Q8: _f8q8,
    Format.MXFP4: _mxfp4,
}
