"""Tensors -> a folder of safetensors shards. Knows files, not what they are for.

A folder appears whole or not at all: it is written beside its place and then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxvlm.checkpoint.hub import INDEX
from mlxvlm.errors import ModelError

# Hubs want shards of 5 GB at most. What is not written yet is held in memory, so ours are smaller.
MAX_SHARD_BYTES = 2_000_000_000
# What readers take as the sign that convolutions have their channels last.
_METADATA = {"format": "mlx"}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes `path`'s place in the end; whatever goes wrong leaves nothing there.

    Raises ModelError where it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ModelError(f"{path} can't be written: {error.strerror}") from error
    try:
        yield draft
        draft.chmod(0o755)  # as mkdir would have made it
        draft.rename(path)
    except OSError as error:
        raise ModelError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, mx.array]], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Writes tensors as they come, and the index; gives each one's file name. Raises ModelError for a full disk."""
    shards: list[list[str]] = []
    total = size = 0
    pending: dict[str, mx.array] = {}
    for name, array in tensors:
        if pending and size + array.nbytes > max_bytes:
            shards.append(_write(folder, len(shards), pending))
            pending, size = {}, 0
        pending[name] = array
        size += array.nbytes
        total += array.nbytes
    if pending:
        shards.append(_write(folder, len(shards), pending))
    return _name(folder, shards, total)


def _write(folder: Path, number: int, tensors: dict[str, mx.array]) -> list[str]:
    path = folder / f"{number}.safetensors"
    try:
        mx.save_safetensors(str(path), tensors, metadata=_METADATA)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder.parent} can't be written: {error}") from error
    return list(tensors)


def _name(folder: Path, shards: list[list[str]], total: int) -> dict[str, str]:
    """Shards get their names when their number is known: model-00001-of-00003.safetensors."""
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return weight_map


def write_json(path: Path, value: Any) -> None:
    """As the hub's files are written."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
