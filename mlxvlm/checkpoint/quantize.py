"""A checkpoint -> a quantised checkpoint in MLX-community's layout, tensor by tensor. Knows folders, not their use."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.checkpoint.bind import DTYPES, Progress, choose_dtype, stored_dtype, streamed
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.hub import resolve
from mlxvlm.checkpoint.isq import Recipe
from mlxvlm.checkpoint.load import is_packed
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.recipe import label
from mlxvlm.checkpoint.uqff_write import checkpoint_names, write
from mlxvlm.checkpoint.weights import read_weights, weight_files
from mlxvlm.checkpoint.write import new_folder, write_json, write_shards
from mlxvlm.errors import ModelNotFoundError, UsageError
from mlxvlm.families import family_of
from mlxvlm.models.base import VisionLanguageModel, is_buffer
from mlxvlm.processors.files import read_json

# What a processor, a tokenizer or a template is read from; weights and their index are written anew.
_ANY = mx.zeros(())  # where only a name is asked for
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "USE_POLICY*")


class _Source:
    """A checkpoint folder, its tensors unread, and the model that they are of."""

    def __init__(self, model: str, revision: str | None, dtype: str) -> None:
        if is_packed(Path(model).expanduser()):
            raise UsageError(f"{model} is quantised already: give an ordinary checkpoint")
        self.folder = resolve(model, revision)
        self.config = read_json(self.folder / "config.json")
        if not self.config:
            raise ModelNotFoundError(f"{self.folder} is no model: it has no config.json")
        self.model: VisionLanguageModel = family_of(self.config).build_model(self.config)
        self.weights = read_weights(self.folder)
        self.dtype = stored_dtype(self.weights) if dtype == "auto" else choose_dtype(dtype, self.weights)
        self._files = [TensorFile(path) for path in weight_files(self.folder)]

    @cached_property
    def modules(self) -> dict[str, QuantSpec]:
        """How each quantised module was; known from the first tensor of `quantised` on."""
        assert isinstance(self.model, nn.Module)
        return {
            path: QuantSpec(module.bits, module.group_size, module.mode)
            for path, module in self.model.named_modules()
            if hasattr(module, "bits")
        }

    def quantised(self, recipe: Recipe, progress: Progress) -> Iterator[tuple[str, mx.array]]:
        """Tensors under the model's own names; self.weights keeps the unread originals."""
        return streamed(self.model, dict(self.weights), self.dtype, progress, recipe, self._files)


def quantize_folder(
    model: str, out: Path, recipe: Recipe, dtype: str, progress: Progress, revision: str | None = None
) -> None:
    """Writes `out`, whole or not at all, in MLX-community's layout. Holds one shard and one tensor, not the model.

    dtype: of what stays unquantised; auto keeps the checkpoint's. Raises UsageError where `out` has something in it.
    """
    _check_new(out)
    source = _Source(model, revision, dtype)
    extras = _extras(source.model, source.weights, source.dtype)

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for name, array in source.quantised(recipe, progress):
            yield source.model.published(name, array)
        yield from extras.items()

    with new_folder(out) as draft:
        for pattern in _SMALL_FILES:
            for path in source.folder.glob(pattern):
                if not path.name.endswith(".index.json"):
                    shutil.copyfile(path, draft / path.name)
        write_shards(draft, tensors())
        specs = {
            source.model.published(f"{path}.weight", _ANY)[0].removesuffix(".weight"): spec
            for path, spec in source.modules.items()
        }
        write_json(draft / "config.json", quantized_config(source.config, specs))
        (draft / "README.md").write_text(_card(model, specs), encoding="utf-8")


def quantize_uqff(
    model: str, out: Path, recipe: Recipe, dtype: str, progress: Progress, revision: str | None = None
) -> None:
    """Writes `out` as UQFF files with their residual, for mistral.rs. Holds the quantised layers.

    The checkpoint must have the hub's names, and be quantised in no other way. Raises UsageError and WeightsError.
    """
    _check_new(out)
    source = _Source(model, revision, dtype)
    if any(name.endswith(".scales") for name in source.weights):
        raise UsageError(f"{model} is quantised already: give the original checkpoint")
    names = checkpoint_names(source.model, source.weights)
    tensors: dict[str, mx.array] = {}
    for name, array in source.quantised(recipe, progress):
        path, _, leaf = name.rpartition(".")
        if path in source.modules:
            theirs = names[f"{path}.weight"].removesuffix(".weight")
            tensors[f"{theirs}.{leaf}"] = array
    for name, array in source.weights.items():
        ours = source.model.sanitize({name: array})
        # The rest as it is stored, and read when it is written.
        if not is_buffer(name) and not any(our.rpartition(".")[0] in source.modules for our in ours):
            tensors[name] = array
    specs = {names[f"{path}.weight"].removesuffix(".weight"): spec for path, spec in source.modules.items()}
    usual = Counter(specs.values()).most_common(1)[0][0] if specs else QuantSpec(4)
    stem = f"afq{usual.bits}" if usual.mode == "affine" else usual.mode
    write(out, stem, tensors, specs, source.folder)


def _check_new(out: Path) -> None:
    # Renaming puts a folder in the place of an empty one, but not of a link or of where we are.
    is_taken = out.is_symlink() or out.resolve() == Path.cwd()
    if is_taken or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out} is there already: give a new folder")


def _extras(model: VisionLanguageModel, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """What this runtime never binds but others look for, such as a tower's layers after the one that is used."""
    names = [name for name, array in weights.items() if not is_buffer(name) and not model.sanitize({name: array})]
    floats = {name: weights[name] for name in names}
    return {name: array.astype(dtype) if array.dtype in DTYPES.values() else array for name, array in floats.items()}


def quantized_config(config: Mapping[str, Any], specs: Mapping[str, QuantSpec]) -> dict[str, Any]:
    """config.json with the block that MLX's loaders read: the usual type, and each module that has another."""
    block: dict[str, Any] = {}
    if specs:
        usual = Counter(specs.values()).most_common(1)[0][0]
        block = asdict(usual) | {path: asdict(spec) for path, spec in sorted(specs.items()) if spec != usual}
    # Loaders of different ages look under different names.
    blocks = {"quantization": block, "quantization_config": block} if block else {}
    return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")} | blocks


def _card(model: str, specs: Mapping[str, QuantSpec]) -> str:
    counts = Counter(label(spec) for spec in specs.values())
    kinds = "".join(f"| {kind} | {count} |\n" for kind, count in counts.most_common())
    base = f"base_model: {model}\n" if model.count("/") == 1 and not Path(model).exists() else ""
    return f"""---
library_name: mlx
pipeline_tag: image-text-to-text
{base}tags:
- mlx
---

# {Path(model).name}, quantised

Made with `mlxvlm quantize` from `{model if base else Path(model).name}`; everything else is as it was there.

| type (bits@group) | layers |
|---|---|
{kinds}
```
mlxvlm run -m PATH_OR_REPOSITORY --image picture.jpg "What is this?"
```
"""
