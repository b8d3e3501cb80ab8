"""GGUF files: metadata and byte ranges of tensors. Knows the container, not what keys and names mean.

Versions 2 and 3, little-endian, whole or split into parts. Every count, length and offset is checked against the file's
size before anything is allocated or read. Source: ggml's docs/gguf.md and gguf.cpp.
"""

from __future__ import annotations

import mmap
import re
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from io import SEEK_END, BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from mlxvlm.checkpoint.ggml import GGMLType, ggml_type, nbytes
from mlxvlm.errors import ModelError, WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_DEPTH = 4  # of arrays in arrays; nobody writes more than one
_HEADER_LIMIT = 1 << 27  # bytes; a vocabulary of 250,000 tokens with its merges takes an eighth of that
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    kind: np.dtype(f"<{code}")
    for kind, code in enumerate(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "u1", "", "", "u8", "i8", "f8"])
    if code
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# The least bytes of entries: a length, a type, a value; a length, a rank, a type, an offset; a type, a length.
_LEAST_VALUE = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 4 + 8
_LEAST_ARRAY = 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `part` counts the files, `offset` and `nbytes` are bytes of that file.

    shape: row-major, the last dimension contiguous (GGUF itself writes it first).
    """

    kind: GGMLType
    shape: tuple[int, ...]
    part: int
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file with all its parts, given any of them; a context manager.

    metadata: the first part's; arrays of numbers are NumPy's, arrays of strings are lists.
    Raises ModelError where there is no such file or one that can't be read by us, WeightsError for a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._streams: list[BufferedReader] = []
        self.parts = _parts(path)
        with ExitStack() as stack:
            for number, part in enumerate(self.parts):
                self._streams.append(stack.enter_context(_open(part)))
                self._add(number, part)
            self._check_total()
            self._stack = stack.pop_all()

    def _add(self, number: int, path: Path) -> None:
        header = _Header(path, self._streams[number], number)
        metadata, tensors = header.read()
        if _integer(path, metadata, "split.count", len(self.parts)) not in (0, len(self.parts)):
            count = metadata["split.count"]
            raise WeightsError(f"{path} is one of {count} parts; its name must be as ...-00001-of-{count:05}.gguf")
        if _integer(path, metadata, "split.no", number) != number:
            raise WeightsError(f"{path} is part {metadata['split.no']} by its contents, {number} by its name")
        if again := self.tensors.keys() & tensors.keys():
            raise WeightsError(f"{path} repeats {min(again)!r}, which another part has")
        self.tensors |= tensors
        if number == 0:
            self.metadata = metadata

    def _check_total(self) -> None:
        total = _integer(self.parts[0], self.metadata, "split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise WeightsError(f"{self.parts[0]} and its parts have {len(self.tensors)} tensors, {total} are announced")

    def bytes(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes [nbytes], read into memory of their own. Not for two threads at once.

        Not through a map: its pages would count as this process's memory, and a file cut short would end the process.
        """
        info = self.tensors[name]
        data = np.empty(info.nbytes, np.uint8)
        stream = self._streams[info.part]
        try:
            stream.seek(info.offset)
            # Fills all of `data` unless the file ends.
            count = stream.readinto(data.data)
        except OSError as error:
            raise WeightsError(f"{self.parts[info.part]} can't be read: {error.strerror}") from error
        if count != info.nbytes:
            raise WeightsError(f"{self.parts[info.part]} has become shorter since it was opened")
        return data

    def close(self) -> None:
        """Closes all parts; can be called twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error


def _parts(path: Path) -> list[Path]:
    """All files that a file's name speaks of, in order. Raises ModelError naming missing ones."""
    match = _PART.fullmatch(path.name)
    count = int(match[3]) if match else 1
    if match and count:
        parts = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    else:
        parts = [path]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more of {count} parts" if len(missing) > 1 else ""
        raise ModelError(f"there is no file {missing[0]}{more}")
    return parts


def _integer(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise WeightsError(f"{path}: {key} is no integer")
    return value


class _Header:
    """A part's header, read once from front to back through a map, which touches no page of the tensors."""

    def __init__(self, path: Path, stream: BufferedReader, part: int) -> None:
        self._path, self._stream, self._part = path, stream, part
        self._size = stream.seek(0, SEEK_END)
        self._end = min(self._size, _HEADER_LIMIT)
        self._at = 0
        self._map: mmap.mmap | bytes = b""

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Metadata and tensors by name."""
        if not self._size:
            self._fail("is no GGUF file: it is empty")
        with self._mapped() as self._map:
            self._check_start()
            tensor_count, value_count = self._number(_U64), self._number(_U64)
            self._room(value_count * _LEAST_VALUE + tensor_count * _LEAST_TENSOR)
            metadata: dict[str, Any] = {}
            for _ in range(value_count):
                key = self._name()
                if key in metadata:
                    self._fail(f"has the key {key!r} twice")
                metadata[key] = self._value(self._number(_U32))
            alignment = _integer(self._path, metadata, "general.alignment", _DEFAULT_ALIGNMENT)
            if alignment < 1 or alignment & (alignment - 1):
                self._fail(f"has an alignment of {alignment}, which is no power of two")
            return metadata, self._tensors(tensor_count, alignment)

    def _mapped(self) -> mmap.mmap:
        try:
            return mmap.mmap(self._stream.fileno(), self._size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # a file system without maps; a file that has shrunk meanwhile
            raise ModelError(f"{self._path} can't be mapped into memory: {error}") from error

    def _check_start(self) -> None:
        if self._map[: len(_MAGIC)] != _MAGIC:
            self._fail("is no GGUF file (if it is a Git LFS pointer, run `git lfs pull`)")
        self._at = len(_MAGIC)
        version = self._number(_U32)
        if version in _VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise ModelError(f"{self._path} is big-endian; get the little-endian file")
        raise ModelError(f"{self._path} is GGUF version {version}; 2 and 3 can be read")

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        found = {}
        for _ in range(count):
            name = self._name()
            if name in found:
                self._fail(f"has the tensor {name!r} twice")
            found[name] = self._tensor(name, alignment)
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: TensorInfo(kind, shape, self._part, start + offset, size)
            for name, (kind, shape, offset, size) in found.items()
        }
        placed = sorted(tensors.items(), key=lambda item: item[1].offset)
        for (name, info), (after, following) in pairwise(placed):
            if info.offset + info.nbytes > following.offset:
                self._fail(f"is damaged: {name!r} and {after!r} overlap")
        for name, info in placed[-1:]:
            if info.offset + info.nbytes > self._size:
                self._fail(f"is cut off: {name!r} ends after the file; fetch it again")
        return tensors

    def _tensor(self, name: str, alignment: int) -> tuple[GGMLType, tuple[int, ...], int, int]:
        """Type, shape, offset behind the header, bytes."""
        rank = self._number(_U32)
        if rank > _MAX_DIMS:
            self._fail(f"is damaged: {name!r} has {rank} dimensions")
        shape = tuple(self._number(_U64) for _ in range(rank))[::-1]
        number, offset = self._number(_U32), self._number(_U64)
        try:
            kind = ggml_type(number)
            size = nbytes(kind, shape)
        except ModelError as error:
            raise type(error)(f"{self._path}: {name!r}: {error}") from error
        if offset % alignment:
            self._fail(f"is damaged: {name!r} does not start at a multiple of {alignment} bytes")
        return kind, shape, offset, size

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._numbers(kind, 1)[0].item()
        if kind == _STRING:
            return self._strings(1)[0]
        if kind != _ARRAY:
            self._fail_type(kind)
        if depth == _MAX_DEPTH:
            self._fail("is damaged: its arrays are nested too deeply")
        element, count = self._number(_U32), self._number(_U64)
        if element in _NUMBERS:
            return self._numbers(element, count)
        if element == _STRING:
            return self._strings(count)
        if element != _ARRAY:
            self._fail_type(element)
        self._room(count * _LEAST_ARRAY)
        return [self._value(element, depth + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> NDArray[Any]:
        dtype = _NUMBERS[kind]
        size = count * dtype.itemsize
        self._room(size)
        numbers = np.frombuffer(self._map[self._at : self._at + size], dtype)
        self._at += size
        return numbers != 0 if kind == _BOOL else numbers

    def _name(self) -> str:
        try:
            return self._strings(1, "strict")[0]
        except UnicodeDecodeError:
            self._fail("is damaged: a name is no UTF-8")

    def _strings(self, count: int, errors: str = "replace") -> list[str]:
        data, at, end, strings = self._map, self._at, self._end, []
        for _ in range(count):
            start = at + _U64.size
            at = start + _U64.unpack_from(data, at)[0] if start <= end else start
            if at > end:
                self._room(at - self._at)
            strings.append(data[start:at].decode("utf-8", errors))
        self._at = at
        return strings

    def _number(self, form: struct.Struct) -> int:
        self._room(form.size)
        self._at += form.size
        return int(form.unpack_from(self._map, self._at - form.size)[0])

    def _room(self, size: int) -> None:
        """Raises WeightsError if the header can't have this many bytes more."""
        if size > self._end - self._at:
            limit = "its end" if self._end == self._size else f"{_HEADER_LIMIT >> 20} MiB"
            self._fail(f"is damaged or cut off: its header goes on behind {limit}; fetch it again")

    def _fail_type(self, kind: int) -> NoReturn:
        self._fail(f"is damaged: no value has the type {kind}")

    def _fail(self, problem: str) -> NoReturn:
        raise WeightsError(f"{self._path} {problem}")
