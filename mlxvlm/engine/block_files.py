"""Blocks of the prefix cache in files, for the next start of the same model. Knows bytes, not prompts.

A safetensors file for each block, written beside its place and moved there whole; a checksum over all of it tells a
damaged one, which counts as none, as does one with keys and values of other bits. Reads belong to the engine thread,
writes have a thread of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine.kv_cache import KVBlock
from mlxvlm.errors import UsageError

_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}  # safetensors' names
_KINDS = {2: ("",), 6: (".packed", ".scales", ".biases")}  # what keys and values are made of, by the number of parts
_SUFFIX = ".safetensors"
_MAX_HEADER_BYTES = 4096
_MAX_WAITING = 64  # blocks; they stay in memory until written, and those beyond it are left for their next use
_LEFT_OVER_S = 3600  # age at which a file that is not finished is no longer being written
_logger = logging.getLogger(__name__)


class BlockFiles:
    """A folder of blocks, at most `max_bytes`; the longest unused goes first. Several processes may share it."""

    def __init__(self, folder: Path, max_bytes: int, kv_bits: int | None = None) -> None:
        """`kv_bits`: of the blocks' packed keys and values; None where they are as they are. Raises UsageError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the prefix cache can't be kept in {folder}: {error.strerror}") from error
        self._folder, self._max_bytes, self._kv_bits = folder, max_bytes, kv_bits
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlxvlm-blocks")
        for path in folder.glob("*.part"):
            if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
                path.unlink(missing_ok=True)
        entries = [(path, path.stat()) for path in folder.glob(f"*{_SUFFIX}")]
        entries.sort(key=lambda entry: entry[1].st_mtime_ns)
        self._sizes = {path.stem: entry.st_size for path, entry in entries}  # least recently used first
        self._drop_until(max_bytes)

    def __contains__(self, key: bytes) -> bool:
        return key.hex() in self._sizes

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def read(self, key: bytes) -> KVBlock | None:
        """A block, None where its file is gone or damaged, which is then forgotten."""
        path = self._path(key.hex())
        try:
            block = _decode(np.fromfile(path, np.uint8), self._kv_bits)
        except FileNotFoundError:
            block = None
        except (OSError, ValueError, RecursionError) as error:
            _logger.warning("%s: %s; its tokens are computed anew", path, error)
            path.unlink(missing_ok=True)
            block = None
        if block is None:
            with self._lock:
                self._sizes.pop(key.hex(), None)
        return block

    def keep(self, keys: Sequence[bytes], blocks: Sequence[KVBlock]) -> None:
        """Marks a chain as used and writes what has no file yet, from its beginning and not all at once."""
        names = [key.hex() for key in keys]
        with self._lock:
            for name, block in zip(names, blocks, strict=True):
                if name not in self._sizes and name not in self._waiting and len(self._waiting) < _MAX_WAITING:
                    self._waiting.add(name)
                    data = [_bytes_of(part) for part in block.parts]
                    self._writer.submit(self._write, name, _describe(block), data)
            # Parents last, so that they are the last to go.
            held = [name for name in reversed(names) if name in self._sizes]
            for name in held:
                self._sizes[name] = self._sizes.pop(name)
        self._writer.submit(_touch, [self._path(name) for name in held])

    def close(self) -> None:
        """Waits until everything is written."""
        self._writer.shutdown()

    def _write(self, name: str, tensors: dict[str, object], data: list[NDArray[np.uint8]]) -> None:
        path, size = self._path(name), sum(part.nbytes for part in data) + _MAX_HEADER_BYTES
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            if size <= self._max_bytes:
                self._drop_until(self._max_bytes - size)
                with temporary.open("wb") as file:
                    file.write(_head(tensors, data, self._kv_bits))
                    for part in data:
                        file.write(part.data)
                temporary.replace(path)
                with self._lock:
                    self._sizes[name] = path.stat().st_size
        except OSError as error:
            _logger.warning("%s: %s; the block is not kept", path, error)
            temporary.unlink(missing_ok=True)
        finally:
            self._waiting.discard(name)

    def _drop_until(self, max_bytes: int) -> None:
        with self._lock:
            held = sum(self._sizes.values())
            while held > max_bytes:
                name = next(iter(self._sizes))
                held -= self._sizes.pop(name)
                self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


def _touch(paths: list[Path]) -> None:
    """For the next process, and for others that share the folder."""
    for path in paths:
        with suppress(OSError):  # another process has dropped it
            os.utime(path)


def _bytes_of(array: mx.array) -> NDArray[np.uint8]:
    """The array's own memory: a block is never changed."""
    flat = array.view(mx.uint8)
    mx.eval(flat)
    return np.array(flat, copy=False)


def _describe(block: KVBlock) -> dict[str, object]:
    dtypes = {dtype: name for name, dtype in _DTYPES.items()}
    tensors: dict[str, object] = {}
    start = 0
    for name, part in zip(_names(len(block.parts)), block.parts, strict=True):
        end = start + int(part.nbytes)
        tensors[name] = {"dtype": dtypes[part.dtype], "shape": [part.size], "data_offsets": [start, end]}
        start = end
    return tensors


def _names(parts: int) -> list[str]:
    return [each + kind for each in ("keys", "values") for kind in _KINDS[parts]]


def _checksum(tensors: object, data: list[NDArray[np.uint8]], kv_bits: object) -> str:
    digest = hashlib.sha256(json.dumps([kv_bits, tensors], sort_keys=True).encode())
    for part in data:
        digest.update(part.data)
    return digest.hexdigest()


def _head(tensors: dict[str, object], data: list[NDArray[np.uint8]], kv_bits: int | None) -> bytes:
    bits = str(kv_bits)  # metadata is text
    header = json.dumps({"__metadata__": {"sha256": _checksum(tensors, data, bits), "kv_bits": bits}, **tensors})
    header += " " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header.encode()


def _decode(content: NDArray[np.uint8], kv_bits: int | None) -> KVBlock:
    """Raises ValueError for anything but a whole file of ours that holds so many bits."""
    length = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or length > min(_MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError("the file is cut or no safetensors file")
    tensors, data = json.loads(content[8 : 8 + length].tobytes()), content[8 + length :]
    metadata = tensors.pop("__metadata__", None) if isinstance(tensors, dict) else None
    bits = metadata.get("kv_bits") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or metadata.get("sha256") != _checksum(tensors, [data], bits):
        raise ValueError("the checksum is wrong")
    if bits != str(kv_bits):
        raise ValueError(f"its keys and values have {bits} bits, not {kv_bits}")
    # What the checksum covers was written here.
    arrays = []
    for name in _names(len(tensors)):
        start, end = tensors[name]["data_offsets"]
        arrays.append(mx.array(data[start:end]).view(_DTYPES[tensors[name]["dtype"]]))
    mx.eval(arrays)
    return KVBlock(tuple(arrays))
