"""In-situ quantisation: full tensors in, MLX's quantised ones out, one at a time. Knows modules, not files' formats.

A tensor is read, quantised, evaluated and dropped before the next one is read, so the peak is the quantised model and
one tensor. Stacks of experts are larger than all else together; they come expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.packed import QuantSpec, quantized
from mlxvlm.checkpoint.recipe import fitted, label, promoted
from mlxvlm.checkpoint.topology import Topology
from mlxvlm.errors import WeightsError
from mlxvlm.models.base import VisionLanguageModel

Tensors: TypeAlias = dict[str, mx.array]
Sanitize: TypeAlias = Callable[[Tensors], Tensors]

_NO_TOPOLOGY = Topology()
# Decides where each token goes: a few kilobytes, and an error there is a wrong expert.
_ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a user asks for. spec: of every layer that the topology says nothing about; None leaves those alone."""

    spec: QuantSpec | None = None
    topology: Topology = _NO_TOPOLOGY
    tower: bool = False

    @property
    def facts(self) -> str:
        """All of it in words. A pattern's own repr leaves out what is long."""
        entries = [
            (entry.layers, entry.pattern.pattern if entry.pattern else None, entry.spec)
            for entry in self.topology.entries
        ]
        return repr((self.spec, entries, self.tower))


AS_IT_IS = Recipe()


@dataclass(frozen=True, slots=True)
class Plan:
    """What each module becomes, by path, and a line for those that were wanted but can't."""

    specs: Mapping[str, QuantSpec]
    left: Sequence[str] = ()


def make_plan(model: VisionLanguageModel, recipe: Recipe) -> Plan:
    """Of the modules that are not quantised yet. Evaluates nothing."""
    assert isinstance(model, nn.Module)
    specs: dict[str, QuantSpec] = {}
    left: dict[tuple[str, int], list[str]] = {}
    for path, module in model.named_modules():
        wanted = _wanted(path, module, model, recipe) if hasattr(module, "to_quantized") else None
        if wanted is None:
            continue
        width = module.weight.shape[-1]
        spec = fitted(wanted, width)
        if spec is None:
            left.setdefault((label(wanted), width), []).append(path)
        else:
            specs[path] = spec
    return Plan(specs, [_left_line(kind, width, paths) for (kind, width), paths in left.items()])


def _left_line(kind: str, width: int, paths: Sequence[str]) -> str:
    others = f" and {len(paths) - 1} more" if paths[1:] else ""
    return f"not quantised: {min(paths)}{others}, as no group of {kind} divides {width} inputs"


def _wanted(path: str, module: Any, model: VisionLanguageModel, recipe: Recipe) -> QuantSpec | None:
    paths = model.quant_paths
    inside = re.match(re.escape(paths.decoder) + r"\.layers\.(\d+)\.", path)
    is_router = path.endswith(f".{_ROUTER}")
    entry = recipe.topology.find(path, int(inside[1]) if inside and not is_router else None)
    if entry is not None:
        return entry.spec
    if recipe.spec is None:
        return None
    if path in (f"{paths.decoder}.embed_tokens", paths.head):
        return promoted(recipe.spec)
    in_tower = recipe.tower and paths.tower and isinstance(module, nn.Linear) and path.startswith(f"{paths.tower}.")
    return recipe.spec if in_tower or (inside and not is_router) else None


class Stacks:
    """The experts of a checkpoint, readable one by one: MLX reads a lazy tensor whole, even for a slice of it.

    Relies on `sanitize` treating each expert alike, so that it can be given one.
    """

    def __init__(self, sanitize: Sanitize, files: Sequence[TensorFile], weights: Mapping[str, mx.array]) -> None:
        self._sanitize = sanitize
        self._sources = {
            target: (file, name)
            for file in files
            for name in file.names
            if len(file.shape(name)) == 3
            for target in sanitize({name: weights[name]})
        }

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def targets(self, name: str) -> list[str]:
        """All tensors of the model that come from the same stack as `name`."""
        return [target for target, source in self._sources.items() if source == self._sources[name]]

    def count(self, name: str) -> int:
        """How many experts there are."""
        file, source = self._sources[name]
        return file.shape(source)[0]

    def experts(self, name: str) -> Iterator[Tensors]:
        """For each expert the tensors [1, out, in] of targets(name)."""
        file, source = self._sources[name]
        for index in range(self.count(name)):
            yield self._sanitize({source: file.read_slice(source, index).mlx()})


def stream(
    named: Tensors, dtypes: Mapping[str, mx.Dtype], plan: Plan, stacks: Stacks | None = None
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a bound model, evaluated, in the order of `named`, which is emptied on the way.

    Raises WeightsError for a tensor that can't be read.
    """
    for name in list(named):
        path = name.removesuffix(".weight")
        if name not in named:  # came with its stack
            continue
        if path == name or path not in plan.specs:
            yield name, _read(name, named.pop(name).astype(dtypes[name]))
        elif stacks is not None and name in stacks:
            # Of the same stack some may not fit a group, and be read whole in their turn.
            together = {target for target in stacks.targets(name) if target.removesuffix(".weight") in plan.specs}
            for target in together:
                del named[target]
            yield from _stacked(stacks, together, dtypes, plan)
        else:
            yield from _quantized(path, named.pop(name).astype(dtypes[name]), plan.specs[path]).items()


def _stacked(
    stacks: Stacks, targets: set[str], dtypes: Mapping[str, mx.Dtype], plan: Plan
) -> Iterator[tuple[str, mx.array]]:
    """Each expert is written into its place of the whole: pieces that are joined at the end would be there twice."""
    whole: Tensors = {}
    source = min(targets)
    for index, expert in enumerate(stacks.experts(source)):
        for target in sorted(targets):
            path = target.removesuffix(".weight")
            for leaf, part in _quantized(path, expert.pop(target).astype(dtypes[target]), plan.specs[path]).items():
                if leaf not in whole:
                    whole[leaf] = mx.zeros((stacks.count(source), *part.shape[1:]), part.dtype)
                whole[leaf][index] = part[0]
                mx.eval(whole[leaf])
    yield from whole.items()


def _quantized(path: str, weight: mx.array, spec: QuantSpec) -> Tensors:
    try:
        return quantized(path, weight, spec)
    except RuntimeError as error:
        raise WeightsError(f"tensor {path}.weight can't be read: {error}") from error


def _read(name: str, array: mx.array) -> mx.array:
    try:
        mx.eval(array)
    except RuntimeError as error:
        raise WeightsError(f"tensor {name} can't be read: {error}") from error
    return array
