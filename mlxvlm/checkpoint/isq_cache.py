"""What was quantised once, kept for the next start. Knows entries and their sizes, not models.

An entry is a folder of safetensors under the model's own names, with a manifest of sizes and checksums. Its name is a
digest of everything that its tensors depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxvlm.checkpoint.isq import Recipe
from mlxvlm.checkpoint.write import new_folder, write_json, write_shards
from mlxvlm.errors import ModelError

log = logging.getLogger(__name__)

_FORMAT = 1  # of entries: a newer one never reads an older one's
MANIFEST = "manifest.json"
_LIMIT_BYTES = 100_000_000_000
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of a source file's contents; its size and time say the rest
_READ_BYTES = 1 << 23
_LEFT_OVER_S = 3600  # age at which a draft is no longer being written


def entry_key(files: Sequence[Path], config: Mapping[str, Any], recipe: Recipe, dtype: object) -> str:
    """Of the source files as they are now, the recipe, and what computes it."""
    digest = hashlib.sha256()
    made_by = (version("mlx"), version("mlxvlm"), str(mx.default_device()))
    for fact in (_FORMAT, made_by, str(dtype), recipe.facts, json.dumps(config, sort_keys=True)):
        digest.update(repr(fact).encode())
    for path in files:
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(status.st_size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ISQCache:
    """Entries of one folder, least recently used dropped first beyond `limit_bytes`."""

    folder: Path
    limit_bytes: int = _LIMIT_BYTES

    def find(self, key: str) -> Path | None:
        """The folder of an entry that is whole. A damaged one is named, dropped, and counts as none."""
        entry = self.folder / key
        if not entry.is_dir():
            return None
        problem = _damage(entry)
        if problem:
            log.warning("the cached quantisation %s is damaged (%s): dropped, and made again", entry, problem)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with suppress(OSError):  # a folder that can only be read serves as well
            (entry / MANIFEST).touch()  # used last
        return entry

    def store(self, key: str, tensors: Iterable[tuple[str, mx.array]], nbytes: int, of: str = "") -> None:
        """Keeps evaluated tensors of `nbytes` in all; `of` tells a user of which model.

        A cache that can't be written costs time, nothing else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            free = shutil.disk_usage(self.folder).free
            if nbytes > min(self.limit_bytes, free):
                log.warning("the quantised model is not cached: it has %d bytes, and %d are free", nbytes, free)
                return
            self._make_room(nbytes)
            with new_folder(self.folder / key) as draft:
                names = sorted(set(write_shards(draft, tensors).values()))
                files = {
                    name: {"bytes": (draft / name).stat().st_size, "crc32": _crc32(draft / name)} for name in names
                }
                write_json(draft / MANIFEST, {"format": _FORMAT, "of": of, "files": files})
        except (OSError, ModelError) as error:
            if not (self.folder / key).is_dir():  # else another process was faster
                log.warning("the quantised model is not cached: %s", error)

    def _sweep(self) -> None:
        """Drafts of processes that were killed."""
        for draft in self.folder.glob(".*.*"):
            if time.time() - draft.stat().st_mtime > _LEFT_OVER_S:
                shutil.rmtree(draft, ignore_errors=True)

    def _make_room(self, nbytes: int) -> None:
        entries = sorted(self.folder.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
        sizes = {path.parent: sum(file.stat().st_size for file in path.parent.iterdir()) for path in entries}
        held = sum(sizes.values())
        for entry, size in sizes.items():
            if held + nbytes <= self.limit_bytes:
                return
            shutil.rmtree(entry, ignore_errors=True)
            held -= size


def _damage(entry: Path) -> str:
    """What is wrong with an entry, "" if nothing."""
    try:
        files = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {entry / name: int(fact["bytes"]) for name, fact in files.items()}
        sums = {entry / name: int(fact["crc32"]) for name, fact in files.items()}
        for path, size in sizes.items():
            if path.stat().st_size != size:
                return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
        with ThreadPoolExecutor() as pool:
            for path, found in zip(sums, pool.map(_crc32, sums), strict=True):
                if found != sums[path]:
                    return f"{path.name} has other contents than were written"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return f"{MANIFEST} makes no sense"
    return "" if sizes else f"{MANIFEST} names no files"


def _crc32(path: Path) -> int:
    """Finds flipped bits and cut files at the speed of a disk; nobody is kept out by it."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value
