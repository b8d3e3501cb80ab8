"""In-situ quantisation: full tensors in, MLX's quantised ones out, one at a time. Knows modules, not files' formats.

A tensor is read, quantised, evaluated and dropped before the next one is read, so the peak is the quantised model and
one tensor. Stacks of experts are larger than all else together; they come expert by expert. What stays as it is stored
is read some tensors at a time, which MLX does in several threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.checkpoint.packed import QuantSpec, quantized
from mlxvlm.checkpoint.parts import Parts, Tensors
from mlxvlm.checkpoint.recipe import fitted, label, promoted
from mlxvlm.checkpoint.topology import Topology
from mlxvlm.errors import WeightsError
from mlxvlm.models.base import VisionLanguageModel

_NO_TOPOLOGY = Topology()
_NO_UNITS: Mapping[str, int] = {}
# Decides where each token goes: a few kilobytes, and an error there is a wrong expert.
_ROUTER = "router"
_BATCH_BYTES = 256 << 20  # that are read together: enough for all threads, little beside a model


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


def make_plan(model: VisionLanguageModel, recipe: Recipe, units: Mapping[str, int] = _NO_UNITS) -> Plan:
    """Of the modules that are not quantised yet. Evaluates nothing.

    units: of layers whose columns are cut, by path; groups stay whole at all their multiples (`column_units`).
    """
    assert isinstance(model, nn.Module)
    specs: dict[str, QuantSpec] = {}
    left: dict[tuple[str, int], list[str]] = {}
    for path, module in model.named_modules():
        wanted = _wanted(path, module, model, recipe) if hasattr(module, "to_quantized") else None
        if wanted is None:
            continue
        width = units.get(path, module.weight.shape[-1])
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


def stream(
    named: Tensors, dtypes: Mapping[str, mx.Dtype], plan: Plan, parts: Parts | None = None
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a bound model, evaluated, in the order of `named`, which is emptied on the way.

    Raises WeightsError for a tensor that can't be read.
    """
    batch: Tensors = {}
    batch_bytes = 0
    for name in list(named):
        if name not in named:  # came with another from the same source
            continue
        is_cut = parts is not None and name in parts
        if not is_cut and _spec(name, plan) is None and named[name].dtype == dtypes[name]:
            batch[name] = named.pop(name)
            batch_bytes += batch[name].nbytes
            if batch_bytes >= _BATCH_BYTES:
                yield from _read(batch)
                batch_bytes = 0
            continue
        yield from _read(batch)
        batch_bytes = 0
        if parts is not None and is_cut:
            targets = [target for target in parts.targets(name) if named.pop(target, None) is not None]
            yield from _joined(parts, targets, dtypes, plan)
        else:
            yield from _finished(name, named.pop(name).astype(dtypes[name]), plan).items()
    yield from _read(batch)


def _read(batch: Tensors) -> Iterator[tuple[str, mx.array]]:
    """Tensors that stay as they are, evaluated together; `batch` is emptied."""
    tensors = dict(batch)
    batch.clear()
    try:
        mx.eval(tensors)
    except RuntimeError as error:
        with suppress(RuntimeError):  # of the others, which would come up in the next evaluation
            mx.synchronize()
        # MLX does not say whose it is, and takes some that were under way for evaluated.
        names = list(tensors)
        others = f" or one up to {names[-1]}" if len(names) > 1 else ""
        raise WeightsError(f"tensor {names[0]}{others} can't be read: {error}") from error
    yield from tensors.items()


def _joined(
    parts: Parts, targets: Sequence[str], dtypes: Mapping[str, mx.Dtype], plan: Plan
) -> Iterator[tuple[str, mx.array]]:
    """Each piece is written into its place of the whole: pieces that are joined at the end would be there twice."""
    whole: Tensors = {}
    count = parts.num_pieces(targets[0])
    for index, piece in enumerate(parts.pieces(targets[0])):
        for target in targets:
            for leaf, part in _finished(target, piece.pop(target).astype(dtypes[target]), plan).items():
                if count == 1:
                    yield leaf, part
                    continue
                if leaf not in whole:
                    whole[leaf] = mx.zeros((count, *part.shape[1:]), part.dtype)
                whole[leaf][index] = part[0]
                mx.eval(whole[leaf])
    yield from whole.items()


def _finished(name: str, array: mx.array, plan: Plan) -> Tensors:
    """What a tensor becomes, evaluated."""
    spec = _spec(name, plan)
    try:
        if spec is not None:
            return quantized(name.removesuffix(".weight"), array, spec)
        mx.eval(array)
    except RuntimeError as error:
        raise WeightsError(f"tensor {name} can't be read: {error}") from error
    return {name: array}


def _spec(name: str, plan: Plan) -> QuantSpec | None:
    """What a tensor is to become; only weights become anything."""
    path = name.removesuffix(".weight")
    return plan.specs.get(path) if path != name else None
