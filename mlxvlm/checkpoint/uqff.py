"""UQFF files -> tensors by checkpoint names. Knows containers, versions and the residual, not layers' formats.

UQFF is mistral.rs's format: one or more safetensors files of quantised layers, and a residual with everything else.
Versions 1.0 to 1.2 are read here, the unnamed layers of 0.1 and 0.2 in uqff_legacy.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from mlxvlm.checkpoint.bind import Progress, stored_dtype
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.conversion import REQUANTIZED, Conversion
from mlxvlm.checkpoint.hub import INDEX
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.uqff_files import RESIDUAL
from mlxvlm.checkpoint.uqff_layers import Parts, add, named
from mlxvlm.checkpoint.uqff_legacy import LegacyLayers
from mlxvlm.checkpoint.weights import read_file, read_weights
from mlxvlm.errors import ModelError, UnsupportedModelError, WeightsError
from mlxvlm.families import family_of
from mlxvlm.processors.files import read_json

Add: TypeAlias = Callable[[Conversion, str, Parts], None]

VERSION = (1, 2)
_VERSION_NAMES = tuple(f"uqff.version.{part}" for part in ("major", "minor", "patch"))
_LARGE = ("", "scales", "biases", "zeros", "bias")  # parts of a layer; the others are a few numbers
_PART = re.compile(r"(?P<layer>.+)\.(?:weight(?:\.(?P<part>\w+))?|(?P<bias>bias))")


def read(
    files: Sequence[Path],
    folder: Path,
    base: Path | None = None,
    requantize: QuantSpec | None = REQUANTIZED,
    progress: Progress | None = None,
) -> Conversion:
    """The whole model's tensors; `.notes()` says what was lost, `.dtype` what the residual is stored in.

    folder: the model's, with config.json, and the residual unless that lies beside the files; ordinary weights there go
    before a residual. base: a folder of ordinary weights for what old files leave out. requantize: see Conversion.
    Run on the thread that will use the tensors. Raises ModelError and its kinds, naming file and layer.
    """
    if not files:
        raise ModelError("no UQFF files are given")
    shards = _Shards(files)
    config = read_json(folder / "config.json")
    conversion = Conversion(requantize, progress, sum(path.stat().st_size for path in files))
    _add_rest(conversion, files, folder, base)
    if shards.is_legacy:
        legacy = LegacyLayers(family_of(config).build_model(config), shards.homes)
        legacy.add_to(conversion)
        if base is None:
            legacy.check_complete(conversion, files[0])
        return conversion
    shards.check_version()
    if not conversion.weights:
        raise WeightsError(f"{files[0].parent} lacks {RESIDUAL}, which holds the tensors that are not quantised")
    shards.add_to(conversion, add)
    if _is_tied(config):
        _share_head(conversion.weights)
    return conversion


def outline(files: Sequence[Path], folder: Path, requantize: QuantSpec | None = REQUANTIZED) -> Conversion:
    """What read() gives as lazy zeros, from headers and layers' small parts. Raises as read() does, and for old files.

    Of the residual, and of ordinary weights in `folder`, nothing is read either: they are lazy.
    """
    from mlxvlm.checkpoint.outline import add_uqff_layer

    shards = _Shards(files)
    if shards.is_legacy:
        raise UnsupportedModelError(
            f"{shards.first} is of UQFF 0.x, whose headers don't tell its layers: it needs about its own size in memory"
        )
    shards.check_version()
    conversion = Conversion(requantize)
    _add_rest(conversion, files, folder, folder if any(folder.glob("model*.safetensors")) else None)
    shards.add_to(conversion, partial(add_uqff_layer, requantize=requantize), is_outline=True)
    if _is_tied(read_json(folder / "config.json")):
        _share_head(conversion.weights)
    return conversion


def has_residual(files: Sequence[Path]) -> bool:
    """Whether what is not quantised lies beside the files; else it is to come from the base model."""
    return bool(files) and (files[0].parent / RESIDUAL).is_file()


class _Shards:
    """The tensors of all files by name, unread."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.homes: dict[str, TensorFile] = {}
        for path in files:
            file = TensorFile(path)
            for name in file.names:
                first = self.homes.setdefault(name, file)
                is_copy = name in _VERSION_NAMES and file.read(name).data.tolist() == first.read(name).data.tolist()
                if first is not file and not is_copy:
                    raise WeightsError(f"{name} is in {first.path} and, different, in {file.path}")

    @property
    def is_legacy(self) -> bool:
        return bool(self.homes) and all(name.isascii() and name.isdecimal() for name in self.homes)

    @property
    def first(self) -> Path | str:
        return next(iter(self.homes.values())).path if self.homes else "an empty file"

    def check_version(self) -> None:
        missing = [name for name in _VERSION_NAMES if name not in self.homes]
        if missing:
            raise WeightsError(f"{self.first} is no UQFF file, or its first shard is missing: no {', '.join(missing)}")
        numbers = [self.homes[name].read(name).numbers("U32") for name in _VERSION_NAMES]
        version = tuple(number for part in numbers for number in part)
        if len(version) != 3 or version[0] != VERSION[0] or version[1] > VERSION[1]:
            text = ".".join(map(str, version))
            raise UnsupportedModelError(
                f"{self.first} is of UQFF {text}; up to {VERSION[0]}.{VERSION[1]} can be read: update mlxvlm"
            )

    def add_to(self, conversion: Conversion, add: Add, is_outline: bool = False) -> None:
        """is_outline: the values of the large parts are not read."""
        for layer, names in self._layers().items():
            home = self.homes[names["format"]].path
            with named(f"{home}: {layer}"):
                unread = _LARGE if is_outline else ()
                parts = {
                    part: self.homes[name].outline(name) if part in unread else self.homes[name].read(name)
                    for part, name in names.items()
                }
                add(conversion, layer, parts)

    def _layers(self) -> dict[str, dict[str, str]]:
        """Each layer's parts and their names. Raises WeightsError for tensors that belong to none."""
        layers: dict[str, dict[str, str]] = {}
        strays = []
        for name in self.homes.keys() - set(_VERSION_NAMES):
            match = _PART.fullmatch(name)
            if match is None:
                strays.append(name)
            else:
                layers.setdefault(match["layer"], {})[match["part"] or match["bias"] or ""] = name
        strays += [layer for layer, names in layers.items() if "format" not in names]
        if strays:
            raise WeightsError(f"{self.first}: {', '.join(sorted(strays))} are no tensors or layers of UQFF")
        return dict(sorted(layers.items()))


def _add_rest(conversion: Conversion, files: Sequence[Path], folder: Path, base: Path | None) -> None:
    conversion.weights.update(_rest(files, folder, base))
    if conversion.weights:
        conversion.dtype = stored_dtype(conversion.weights)


def _rest(files: Sequence[Path], folder: Path, base: Path | None) -> dict[str, mx.array]:
    """The tensors that are not in the files, or are there again: those of the files go before them."""
    weights = read_weights(base) if base else {}
    if (folder / INDEX).is_file() or any(folder.glob("model*.safetensors")):
        return weights | read_weights(folder)
    for place in (folder, files[0].parent):
        if (place / RESIDUAL).is_file():
            return weights | read_file(place / RESIDUAL)
    return weights


def _is_tied(config: dict[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))


def _share_head(weights: dict[str, mx.array]) -> None:
    """Before UQFF 1.2, the head of a tied model stands for its embedding, too."""
    if any(name.endswith("embed_tokens.weight") for name in weights):
        return
    norms = [match[1] for name in weights if (match := re.fullmatch(r"(.+)\.norm\.weight", name))]
    head = re.compile(r"(?:.+\.)?lm_head\.(\w+)")
    for name, array in list(weights.items()):
        match = head.fullmatch(name)
        if match and len(norms) == 1:
            weights[f"{norms[0]}.embed_tokens.{match[1]}"] = array
