"""One safetensors file, header checked and tensors read one at a time. Knows bytes and types, not what names mean.

For files whose names end otherwise, with types that NumPy lacks. Source of the format: huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.errors import WeightsError

Bytes = NDArray[np.uint8]

HEADER_BYTES = 8  # a little-endian count in front of the header
MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIM = 2**31 - 1  # MLX's own
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs"
# BF16 stays bits, as NumPy has no such type; F8_E4M3 too.
_BITS: dict[str, Any] = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "C64": "<c8",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
    "F8_E4M3": "u1",
}
FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Bytes with a type and a shape that fit them. Errors name nothing: the reader of the file does."""

    dtype: str  # safetensors' word
    shape: tuple[int, ...]
    data: Bytes  # [nbytes]

    def __post_init__(self) -> None:
        if self.data.size != nbytes(self.dtype, self.shape):
            raise WeightsError(f"has {self.data.size} bytes for {self.dtype} {list(self.shape)}")

    @property
    def bits(self) -> NDArray[Any]:
        """As NumPy can have it, in its shape: bfloat16 as uint16, E4M3 as uint8."""
        # Copied only where it must be: a record's fields need not be aligned.
        bits: NDArray[Any] = np.require(self.data.view(_BITS[self.dtype]), requirements="A")
        return bits.reshape(self.shape)

    def numbers(self, *dtypes: str) -> list[int]:
        """The integers of a small tensor, of one of `dtypes`."""
        if self.dtype not in dtypes:
            raise WeightsError(f"is {self.dtype} instead of {' or '.join(dtypes)}")
        return [int(number) for number in self.bits.reshape(-1)]

    def float32(self) -> NDArray[np.float32]:
        """The values of any float type, exactly."""
        if self.dtype == "BF16":
            return np.asarray((self.bits.astype(np.uint32) << 16).view(np.float32))
        if self.dtype == "F8_E4M3":
            return np.asarray(E4M3[self.bits], np.float32)
        if self.dtype not in FLOATS:
            raise WeightsError(f"is {self.dtype}, no float type that can be read")
        return self.bits.astype(np.float32)

    def mlx(self) -> mx.array:
        """In its own type, evaluated; E4M3 as float32."""
        if self.dtype == "F8_E4M3":
            return mx.array(self.float32())
        array = mx.array(self.bits)
        if self.dtype == "BF16":
            array = array.view(mx.bfloat16)
        mx.eval(array)
        return array


def _e4m3() -> NDArray[np.float32]:
    """The value of each byte: 4 bits of exponent with bias 7, 3 of mantissa, no infinities (OCP 8-bit, E4M3)."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    values[mantissa + (exponent << 3) == 127] = np.nan
    return np.where(byte >> 7, -values, values).astype(np.float32)


E4M3 = _e4m3()


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Raises WeightsError for a type that can't be read."""
    if dtype not in _BITS:
        raise WeightsError(f"is {dtype}, a type that can't be read")
    return math.prod(shape) * int(np.dtype(_BITS[dtype]).itemsize)


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """The names of a file, and their tensors on demand. Raises WeightsError naming the file, and the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0  # of tensors, by read and read_part
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(HEADER_BYTES), "little")
                # Before the read, which would allocate as much.
                if length > min(MAX_HEADER, size - HEADER_BYTES):
                    raise WeightsError(damage(path, f"a header of {length} bytes in a file of {size}"))
                header = stream.read(length)
        except OSError as error:
            raise WeightsError(f"{path} can't be read: {error.strerror}") from error
        self._data = HEADER_BYTES + length
        self._entries = self._parsed(header, size - self._data)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def read(self, name: str) -> Tensor:
        return self._read(name, self._entries[name])

    def outline(self, name: str) -> Tensor:
        """Its type and shape, with zeros that take no room: nothing is read."""
        entry = self._entries[name]
        return Tensor(entry.dtype, entry.shape, np.broadcast_to(np.uint8(0), (entry.end - entry.start,)))

    def read_part(self, name: str, ranges: Mapping[int, Sequence[range]]) -> Tensor:
        """Of each axis given only these ranges of it, one after the other; nothing else is read."""
        entry, rest = self._entries[name], dict(ranges)
        for axis in sorted(ranges):
            if len(ranges[axis]) > 1 or math.prod(entry.shape[:axis]) != 1:
                break
            (own,) = rest.pop(axis)
            step = nbytes(entry.dtype, entry.shape[axis + 1 :])
            start, shape = entry.start + own.start * step, (*entry.shape[:axis], len(own), *entry.shape[axis + 1 :])
            entry = _Entry(entry.dtype, shape, start, start + len(own) * step)
        return self._read_apart(name, entry, rest) if rest else self._read(name, entry)

    def _read_apart(self, name: str, entry: _Entry, ranges: Mapping[int, Sequence[range]]) -> Tensor:
        """Pieces that lie apart, of a mapped file: a call for each would wait for the disk each time."""
        size = nbytes(entry.dtype, ())
        try:
            data: Bytes = np.memmap(self.path, np.uint8, "r", self._data + entry.start, (entry.end - entry.start,))
        except OSError as error:
            raise WeightsError(f"{self.path} can't be read: {error.strerror}") from error
        except ValueError as error:  # the file has become shorter
            raise WeightsError(damage(self.path, f"{name} ends too early")) from error
        data = data.reshape(*entry.shape, size)
        shape = list(entry.shape)
        for axis, pieces in ranges.items():
            places = [(*[slice(None)] * axis, slice(each.start, each.stop)) for each in pieces]
            data = np.concatenate([data[place] for place in places], axis) if len(places) > 1 else data[places[0]]
            shape[axis] = data.shape[axis]
        data = np.ascontiguousarray(data).reshape(-1)
        self.bytes_read += data.size
        return Tensor(entry.dtype, tuple(shape), data)

    def _read(self, name: str, entry: _Entry) -> Tensor:
        count = entry.end - entry.start
        try:
            data = np.fromfile(self.path, np.uint8, count, offset=self._data + entry.start)
        except OSError as error:
            raise WeightsError(f"{self.path} can't be read: {error.strerror}") from error
        if data.size != count:
            raise WeightsError(damage(self.path, f"{name} ends too early"))
        self.bytes_read += count
        return Tensor(entry.dtype, entry.shape, data)

    def _parsed(self, header: bytes, size: int) -> dict[str, _Entry]:
        """Entries that fit their types and shapes, and together cover `size` bytes without gap or overlap."""
        try:
            table = json.loads(header, object_pairs_hook=self._without_copies)
        except (ValueError, RecursionError) as error:
            raise WeightsError(damage(self.path, "its header is no JSON")) from error
        if not isinstance(table, dict):
            raise WeightsError(damage(self.path, "its header is no JSON object"))
        entries = {name: self._entry(name, value) for name, value in table.items() if name != _METADATA}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise WeightsError(damage(self.path, f"{name} starts at {entry.start} instead of {end}"))
            end = entry.end
        if end != size:
            raise WeightsError(damage(self.path, f"its tensors need {end} bytes, it has {size}"))
        return entries

    def _without_copies(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise WeightsError(damage(self.path, "its header has a name twice"))
        return dict(pairs)

    def _entry(self, name: str, value: Any) -> _Entry:
        value = value if isinstance(value, dict) else {}
        dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise WeightsError(damage(self.path, f"the header's entry of {name} makes no sense"))
        start, end = offsets
        try:
            expected = nbytes(dtype, shape)
        except WeightsError as error:
            raise WeightsError(f"{self.path}: {name} {error}") from error
        if end - start != expected:
            raise WeightsError(damage(self.path, f"{name} has {end - start} bytes for {dtype} {shape}"))
        if max(shape, default=0) > _MAX_DIM:
            raise WeightsError(damage(self.path, f"{name} has the shape {shape}"))
        return _Entry(dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def damage(file: Path, reason: str) -> str:
    """What is wrong with a weight file, and the remedy."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError as unreadable:
        return f"{file} can't be read: {unreadable.strerror}"
    if start == _LFS_POINTER:
        return f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`"
    return f"{file} is damaged or truncated ({reason}); fetch it again"
