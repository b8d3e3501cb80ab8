"""A checkpoint's weights -> a model, quantised on the way or taken from the cache. Knows the order of the steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import Progress, bind, choose_dtype
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.isq import AS_IT_IS, Recipe
from mlxvlm.checkpoint.isq_cache import ISQCache, entry_key
from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.checkpoint.recipe import parse_type
from mlxvlm.checkpoint.topology import Topology
from mlxvlm.checkpoint.weights import read_weights, weight_files
from mlxvlm.errors import UsageError
from mlxvlm.families import Family
from mlxvlm.models.base import VisionLanguageModel


def recipe_of(options: LoadOptions) -> Recipe:
    """Raises UsageError for unknown types and bad topology files."""
    spec = None if options.isq is None else parse_type(options.isq)
    topology = AS_IT_IS.topology if options.topology is None else Topology.read(options.topology)
    return Recipe(spec, topology, options.isq_tower)


def build(
    folder: Path,
    config: dict[str, Any],
    family: Family,
    options: LoadOptions,
    progress: Progress,
    read: Callable[[], dict[str, mx.array]] | None = None,
) -> VisionLanguageModel:
    """The model of a checkpoint folder, with its weights evaluated; `read` gives tensors that lie elsewhere."""
    recipe = recipe_of(options)
    if read is not None and recipe != AS_IT_IS:
        raise UsageError("GGUF files keep their own quantisation: leave --isq and --topology out")
    weights = read_weights(folder) if read is None else read()
    model: VisionLanguageModel = family.build_model(config)
    if recipe == AS_IT_IS:
        bind(model, weights, options.dtype, progress)
    elif options.isq_cache is None:
        _quantize(model, folder, weights, options, recipe, progress)
    else:
        cache = ISQCache(options.isq_cache)
        key = entry_key(weight_files(folder), config, recipe, choose_dtype(options.dtype, weights))
        entry = cache.find(key)
        if entry is not None:
            bind(model, read_weights(entry), options.dtype, progress)
        else:
            _quantize(model, folder, weights, options, recipe, progress)
            _keep(cache, key, model)
    return model


def _quantize(
    model: VisionLanguageModel,
    folder: Path,
    weights: dict[str, mx.array],
    options: LoadOptions,
    recipe: Recipe,
    progress: Progress,
) -> None:
    bind(model, weights, options.dtype, progress, recipe, [TensorFile(path) for path in weight_files(folder)])


def _keep(cache: ISQCache, key: str, model: VisionLanguageModel) -> None:
    assert isinstance(model, nn.Module)
    tensors = dict(tree_flatten(model.parameters()))
    cache.store(key, tensors.items(), sum(array.nbytes for array in tensors.values()))
