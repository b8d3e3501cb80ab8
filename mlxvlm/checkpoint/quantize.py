"""A checkpoint -> a quantised checkpoint in MLX-community's layout, tensor by tensor. Knows folders, not their use."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.checkpoint.bind import DTYPES, Progress, choose_dtype, stored_dtype, streamed
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.hub import resolve
from mlxvlm.checkpoint.isq import Recipe
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.recipe import label
from mlxvlm.checkpoint.weights import read_weights, weight_files
from mlxvlm.checkpoint.write import new_folder, write_json, write_shards
from mlxvlm.errors import ModelNotFoundError, UsageError
from mlxvlm.families import family_of
from mlxvlm.models.base import VisionLanguageModel, is_buffer
from mlxvlm.processors.files import read_json

# What a processor, a tokenizer or a template is read from; weights and their index are written anew.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "USE_POLICY*")


def quantize_folder(
    model: str, out: Path, recipe: Recipe, dtype: str, progress: Progress, revision: str | None = None
) -> None:
    """Writes `out`, whole or not at all. Holds one shard and one tensor, not the model.

    dtype: of what stays unquantised; auto keeps the checkpoint's. Raises UsageError where `out` has something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already: give a new folder")
    folder = resolve(model, revision)
    config = read_json(folder / "config.json")
    if not config:
        raise ModelNotFoundError(f"{folder} is no model: it has no config.json")
    built: VisionLanguageModel = family_of(config).build_model(config)
    weights = read_weights(folder)
    target = stored_dtype(weights) if dtype == "auto" else choose_dtype(dtype, weights)
    extras = _extras(built, weights, target)
    files = [TensorFile(path) for path in weight_files(folder)]

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for name, array in streamed(built, weights, target, progress, recipe, files):
            yield built.published(name, array)
        yield from extras.items()

    with new_folder(out) as draft:
        for pattern in _SMALL_FILES:
            for path in folder.glob(pattern):
                if not path.name.endswith(".index.json"):
                    shutil.copyfile(path, draft / path.name)
        write_shards(draft, tensors())
        specs = _specs(built)
        write_json(draft / "config.json", quantized_config(config, specs))
        (draft / "README.md").write_text(_card(model, specs), encoding="utf-8")


def _extras(model: VisionLanguageModel, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """What this runtime never binds but others look for, such as a tower's layers after the one that is used."""
    names = [name for name, array in weights.items() if not is_buffer(name) and not model.sanitize({name: array})]
    floats = {name: weights[name] for name in names}
    return {name: array.astype(dtype) if array.dtype in DTYPES.values() else array for name, array in floats.items()}


def _specs(model: VisionLanguageModel) -> dict[str, QuantSpec]:
    """How each module was quantised, by its published path."""
    assert isinstance(model, nn.Module)
    return {
        model.published(f"{path}.weight", module.weight)[0].removesuffix(".weight"): QuantSpec(
            module.bits, module.group_size, module.mode
        )
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }


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
