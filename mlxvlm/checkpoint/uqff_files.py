"""What a user names -> the UQFF files. Knows file names and reports, not what the files hold.

Source of the rules: mistral.rs 0.9, `--from-uqff`; `owner/name/file.uqff` is its form of 2024.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxvlm.checkpoint.hub import SMALL_FILES, fetch, is_on_disk, resolve
from mlxvlm.errors import ModelError, ModelNotFoundError
from mlxvlm.processors.files import read_json

SUFFIX = ".uqff"
REPORT = "uqff_report.json"
RESIDUAL = "residual.safetensors"  # what is not quantised
# Bits -> types, MLX's own first: they need no conversion.
SHORTHANDS = {
    "2": ("afq2", "q2k"),
    "3": ("afq3", "q3k"),
    "4": ("afq4", "q4k"),
    "5": ("q5k",),
    "6": ("afq6", "q6k"),
    "8": ("afq8", "q8_0"),
}
_NUMBERED = re.compile(r"(.+)-(\d+)")
# A report comes with the files: a name must not lead out of their folder, nor be a pattern.
_SAFE = re.compile(r"[^/\\*?\[\]\x00-\x1f]+")


def find(name: str, model: str, revision: str | None = None) -> list[Path]:
    """The shards that `name` means, in order; fetched, with the rest of the model beside them, if they are remote.

    name: a file (its numbered siblings come along), a folder, `owner/name/file.uqff`, a type or number of bits of which
    `model` has files, a name in its report, or several of these with `;` between. model: a folder or repository id.
    Raises ModelNotFoundError, or ModelError when the hub can't be reached.
    """
    files = [file for part in name.split(";") for file in _find(part.strip(), _Place(model, revision))]
    return list(dict.fromkeys(files))


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder, or a repository whose files are fetched when they are asked for."""

    model: str
    revision: str | None = None

    def small_files(self) -> Path:
        return resolve(self.model, self.revision, weights=False)

    def named(self, names: list[str]) -> list[Path]:
        """These files, those that are there."""
        folder = self._folder(names)
        return [folder / name for name in names if os.path.isfile(folder / name)]

    def series(self, stem: str) -> list[Path]:
        """`stem`-0.uqff, -1 and so on, up to the first that lacks; else `stem`.uqff."""
        if not _SAFE.fullmatch(stem):
            return []
        folder = self._folder([f"{stem}-[0-9]*{SUFFIX}", f"{stem}{SUFFIX}"])
        return _siblings(folder, stem) or [file for file in [folder / f"{stem}{SUFFIX}"] if os.path.isfile(file)]

    def _folder(self, patterns: list[str]) -> Path:
        if is_on_disk(self.model):
            return resolve(self.model)
        return fetch(self.model, [*SMALL_FILES, RESIDUAL, *patterns], self.revision)


def _find(name: str, place: _Place) -> list[Path]:
    path = Path(os.path.expanduser(name))
    # os.path, as Path's own questions raise on names that no file can have.
    if name and os.path.isdir(path):
        return _only_series(path)
    if os.path.isfile(path):
        return _siblings(path.parent, _stem(path.name)) or [path]
    for files in _candidates(name, place):
        if files:
            return files
    raise ModelNotFoundError(
        f"no UQFF files {name!r}: it is no file or folder, no owner/name/file{SUFFIX}, and no type, number of bits or"
        f" name in the report of {place.model}"
    )


def _candidates(name: str, place: _Place) -> Iterator[list[Path]]:
    """Where `name` may mean something, the likeliest first."""
    yield place.named(_reported(place.small_files(), name))
    repository, _, file = name.rpartition("/")
    if file.endswith(SUFFIX):
        yield (
            _Place(repository, place.revision if repository == place.model else None) if repository else place
        ).series(_stem(file))
    elif not repository:
        for kind in SHORTHANDS.get(name, (name.lower(),)):
            yield place.series(kind)


def _stem(file: str) -> str:
    stem = file.removesuffix(SUFFIX)
    numbered = _NUMBERED.fullmatch(stem)
    return numbered[1] if numbered else stem


def _siblings(folder: Path, stem: str) -> list[Path]:
    files: list[Path] = []
    while os.path.isfile(file := folder / f"{stem}-{len(files)}{SUFFIX}"):
        files.append(file)
    return files


def _only_series(folder: Path) -> list[Path]:
    stems = sorted({_stem(file.name) for file in folder.glob(f"*{SUFFIX}")})
    if len(stems) != 1:
        kinds = f"holds {', '.join(stems)}: name one" if stems else f"has no {SUFFIX} files"
        raise ModelNotFoundError(f"{folder} {kinds}")
    return _Place(str(folder)).series(stems[0])


def _reported(folder: Path, name: str) -> list[str]:
    """The shards of the report's output that has this name, or this shard."""
    outputs: Any = read_json(folder / REPORT).get("outputs") or []
    for output in outputs if isinstance(outputs, list) else []:
        shards = output.get("shards") if isinstance(output, dict) else None
        if not isinstance(shards, list) or not all(isinstance(shard, str) for shard in shards):
            raise ModelError(f"{folder / REPORT} makes no sense: an output without a list of shards")
        if name.lower() in (str(output.get("quant")).lower(), *map(str.lower, shards)):
            unsafe = [shard for shard in shards if not _SAFE.fullmatch(shard)]
            if unsafe:
                raise ModelError(f"{folder / REPORT} names files that are not beside it: {', '.join(unsafe)}")
            return shards
    return []
