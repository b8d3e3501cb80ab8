"""A checkpoint's weights -> a model, quantised on the way or taken from the cache. Knows the order of the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import DTYPES, Progress, bind, choose_dtype, narrowed
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.conversion import Conversion, Shrink
from mlxvlm.checkpoint.isq import AS_IT_IS, Recipe, make_plan
from mlxvlm.checkpoint.isq_cache import ISQCache, entry_key
from mlxvlm.checkpoint.load import LoadOptions, ModelSource
from mlxvlm.checkpoint.packed import quantized
from mlxvlm.checkpoint.recipe import parse_type
from mlxvlm.checkpoint.topology import Topology
from mlxvlm.checkpoint.weights import read_weights, weight_files
from mlxvlm.errors import UsageError
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.models.shares import Share

log = logging.getLogger(__name__)


def recipe_of(options: LoadOptions) -> Recipe:
    """Raises UsageError for unknown types and bad topology files."""
    if options.isq_tower and options.isq is None and options.topology is None:
        raise UsageError("the vision tower's layers have no type: give one with isq (--isq), like 8")
    spec = None if options.isq is None else parse_type(options.isq)
    topology = AS_IT_IS.topology if options.topology is None else Topology.read(options.topology)
    return Recipe(spec, topology, options.isq_tower)


def identity(source: ModelSource, options: LoadOptions) -> str:
    """A key of all that decides a model's weights: files, config, recipe, number format, versions and device."""
    files = source.files or weight_files(source.folder)
    return entry_key(files, source.config, recipe_of(options), (options.dtype, options.requantize))


def build(
    source: ModelSource, options: LoadOptions, progress: Progress, share: Share | None = None
) -> VisionLanguageModel:
    """The model of a source, or a share of it, with its weights evaluated.

    Raises ModelError and its kinds, UsageError for options, and for shares that can't be.
    """
    recipe = recipe_of(options)
    requantize = None if options.requantize.lower() == "none" else parse_type(options.requantize)
    model: VisionLanguageModel = source.family.build_model(source.config)
    if source.read is not None:
        check_shareable(source.name, share)
        conversion = source.read(requantize, progress, _shrink_of(source, options, recipe))
        for line in conversion.notes():
            log.warning("%s: %s", source.name, line)
        rest = AS_IT_IS if conversion.num_shrunk else recipe
        bind(model, conversion.weights, dtype_of(options.dtype, conversion), progress, rest)
        return model
    files, weights = weight_files(source.folder), read_weights(source.folder)
    load = partial(bind, model, weights, options.dtype, progress, recipe, [TensorFile(path) for path in files], share)
    if recipe == AS_IT_IS or options.isq_cache is None:
        load()
        return model
    cache, dtype = ISQCache(options.isq_cache), choose_dtype(options.dtype, weights)
    key = entry_key(files, source.config, recipe, dtype if share is None else (dtype, share.rank))
    entry = cache.find(key)
    if entry is not None:
        if share is not None:
            narrowed(model, share)
        bind(model, read_weights(entry), options.dtype, progress)
    else:
        before = {name for name in model.sanitize(weights) if name.endswith(".scales")}
        load()
        _keep(partial(cache.store, key, of=_title(source, options, share)), model, before, progress)
    return model


def check_shareable(name: str, place: object | None) -> None:
    """Raises UsageError for GGUF and UQFF files, which are not read in part, where there are several ranks."""
    if place is not None:
        raise UsageError(
            f"{name}: GGUF and UQFF files can't be shared by several machines: give the model's safetensors instead, "
            "with isq (--isq) if it is to be small"
        )


def _shrink_of(source: ModelSource, options: LoadOptions, recipe: Recipe) -> Shrink | None:
    """Quantises a tensor when it has been read, for files that are not read lazily."""
    if recipe == AS_IT_IS:
        return None
    model: VisionLanguageModel = source.family.build_model(source.config)
    specs = make_plan(model, recipe).specs

    def shrink(name: str, array: mx.array) -> dict[str, mx.array] | None:
        (ours, full), *others = model.sanitize({name: array}).items() or [("", array)]
        path = ours.removesuffix(".weight")
        if others or path == ours or path not in specs:
            return None
        return quantized(path, full.astype(choose_dtype(options.dtype, {name: array})), specs[path])

    return shrink


def dtype_of(name: str, conversion: Conversion) -> str:
    """`auto` on a GPU is what the file's makers computed in. Of all its tensors only norms may tell, in float32."""
    if name != "auto" or conversion.dtype is None or mx.default_device().type == mx.DeviceType.cpu:
        return name
    return next(name for name, dtype in DTYPES.items() if dtype == conversion.dtype)


def _title(source: ModelSource, options: LoadOptions, share: Share | None) -> str:
    """How a list of the cache names a model."""
    types = [f"--isq {options.isq}"] if options.isq is not None else []
    types += [f"--topology {options.topology.name}"] if options.topology is not None else []
    place = [] if share is None else [f"(rank {share.rank.index} of {share.rank.count})"]
    return " ".join([source.name, *types, *place])


def _keep(store: Callable[..., None], model: VisionLanguageModel, before: set[str], progress: Progress) -> None:
    """`before`: the scales that were there already; a model that has no others is no work to keep."""
    assert isinstance(model, nn.Module)
    tensors = dict(tree_flatten(model.parameters()))
    if {name for name in tensors if name.endswith(".scales")} <= before:
        return
    total = sum(array.nbytes for array in tensors.values())

    def watched() -> Iterator[tuple[str, mx.array]]:
        for name, array in tensors.items():
            progress(total, total)  # where an interruption is noticed
            yield name, array

    store(watched(), total)
