"""A rank's share of a decoder: some heads, some of each MLP's width, some of the head's vocabulary. Knows no network.

A share is a narrower model: the same modules with fewer rows or columns, whose blocks give partial sums that all ranks
add up. Embeddings, norms and routers stay whole. Source: Shoeybi et al. 2019 (arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.models.experts import Experts
from mlxvlm.models.layers import GatedMLP

# MLPs are cut at multiples of the largest of these that leaves each rank one: groups of quantised layers stay whole.
_UNITS = (128, 64, 32, 1)
_ROWS, _COLUMNS = -2, -1  # axes of a weight [..., out, in]

Place: TypeAlias = tuple[int, range]  # an axis, and what is taken along it


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `count` machines."""

    index: int
    count: int

    def range(self, size: int) -> range:
        """This rank's of `size` things: contiguous, sizes differ by one at most."""
        return range(size * self.index // self.count, size * (self.index + 1) // self.count)


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank needs to know of its place. add: partial sums of this rank -> the whole, the same on every rank."""

    rank: Rank
    add: Callable[[mx.array], mx.array]


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank has of a layer: `range` of the `full` rows or columns of its weight [..., out, in]."""

    axis: int
    range: range
    full: int
    has_bias: bool  # a bias of a sum is added by the first rank alone

    def place(self, leaf: str, shape: Sequence[int]) -> Place | None:
        """Axis and range of a share in a layer's `weight`, `bias`, `scales` or `biases`, packed or not.

        None for the bias of a sum. Raises ValueError where a group of quantised values would be cut.
        """
        if leaf == "bias":
            return (0, self.range) if self.axis == _ROWS else None
        size = shape[self.axis]  # of columns fewer than `full` where they are packed
        start, first = divmod(self.range.start * size, self.full)
        stop, last = divmod(self.range.stop * size, self.full)
        if first or last:
            raise ValueError(f"columns {self.range.start} to {self.range.stop} of {self.full} cut a quantised group")
        return len(shape) + self.axis, range(start, stop)

    def of(self, leaf: str, array: mx.array) -> mx.array:
        """A rank's share of a leaf, see `place`."""
        place = self.place(leaf, array.shape)
        if place is None:
            return array if self.has_bias else mx.zeros_like(array)
        axis, own = place
        return array[(*[slice(None)] * axis, slice(own.start, own.stop))]


class HeadShare(NamedTuple):
    """A rank's query heads, and the key and value heads that they read."""

    heads: range
    kv_heads: range


def head_share(num_heads: int, num_kv_heads: int, rank: Rank) -> HeadShare:
    """Each rank's heads share whole kv heads evenly, or one of them; a kv head may be on several ranks.

    Raises ValueError where there are too few heads.
    """
    if num_heads < rank.count:
        raise ValueError(f"{num_heads} attention heads can't be shared by {rank.count} ranks: use {num_heads} at most")
    group = num_heads // num_kv_heads
    if rank.count <= num_kv_heads:
        kv_heads = rank.range(num_kv_heads)
        return HeadShare(range(kv_heads.start * group, kv_heads.stop * group), kv_heads)
    owners = [index * num_kv_heads // rank.count for index in range(rank.count)]
    kv_head = owners[rank.index]
    beside = Rank(rank.index - owners.index(kv_head), owners.count(kv_head))
    if group < beside.count:
        raise ValueError(
            f"{num_heads} attention heads over {num_kv_heads} kv heads can't be shared by {rank.count} ranks: use "
            f"{num_kv_heads} at most"
        )
    heads = beside.range(group)
    first = kv_head * group
    return HeadShare(range(first + heads.start, first + heads.stop), range(kv_head, kv_head + 1))


def width_share(width: int, rank: Rank) -> range:
    """A rank's part of an MLP's width, in whole quantisation groups. Raises ValueError where it is too narrow."""
    if width < rank.count:
        raise ValueError(f"an MLP {width} wide can't be shared by {rank.count} ranks: use {width} at most")
    unit = next(unit for unit in _UNITS if width % unit == 0 and width // unit >= rank.count)
    units = rank.range(width // unit)
    return range(units.start * unit, units.stop * unit)


def narrow(model: VisionLanguageModel, rank: Rank, add: Callable[[mx.array], mx.array]) -> Mapping[str, Cut]:
    """Leaves of a model what is a rank's share, evaluated or not; what was cut, by module path.

    add: partial sums of this rank -> the whole, the same on every rank. Afterwards `logits` gives the rank's part of
    the vocabulary, where the head is no embedding, and its caches must be made for `head_share().kv_heads`.
    Raises ValueError, before anything is changed, where the model can't be shared by so many.
    """
    assert isinstance(model, nn.Module)
    found = list(_shared(model, rank))
    for each in found:
        for name, cut in each.cuts.items():
            layer = each.module[name] if name else each.module
            for leaf in ("weight", "bias", "scales", "biases"):
                if layer.get(leaf) is not None:
                    layer[leaf] = cut.of(leaf, layer[leaf])
        for name, count in each.counts.items():
            setattr(each.module, name, count)
        if each.is_summed:
            each.module._sum = add
    return _cuts(found)


def column_units(model: VisionLanguageModel, count: int) -> Mapping[str, int]:
    """Of each layer whose columns `count` ranks cut, by path: the largest number at whose multiples all cuts lie.

    Raises ValueError as `narrow`.
    """
    assert isinstance(model, nn.Module)
    units: dict[str, int] = {}
    for index in range(count):
        for path, cut in _cuts(_shared(model, Rank(index, count))).items():
            if cut.axis == _COLUMNS:
                units[path] = gcd(units.get(path, cut.full), cut.range.start, cut.range.stop)
    return units


def most_ranks(model: VisionLanguageModel) -> int:
    """How many can share a model that is not quantised: as many as its heads, or as its narrowest MLP has columns."""
    assert isinstance(model, nn.Module)
    sizes: list[int] = []
    for each in _shared(model, Rank(0, 1)):
        sizes += [each.counts["_heads"]] if each.counts else [cut.full for cut in each.cuts.values()]
    return min(sizes)


def keep_decoder(model: VisionLanguageModel) -> None:
    """Takes all out of a model but what ranks other than the first run: decoder layers, last norm, untied head."""
    assert isinstance(model, nn.Module)
    paths = model.quant_paths
    kept = (f"{paths.decoder}.layers", f"{paths.decoder}.norm", paths.head)

    def prune(module: Any, path: str) -> None:
        for name in [name for name in module if not name.startswith("_")]:
            child = _path(path, name)
            if any(each.startswith(f"{child}.") for each in kept):
                prune(module[name], child)
            elif child not in kept:
                del module[name]

    prune(model, "")


@dataclass(frozen=True, slots=True)
class _Share:
    """What becomes of one module: cuts by the names of its layers, "" for itself, and attributes that count."""

    path: str
    module: Any
    cuts: Mapping[str, Cut]
    counts: Mapping[str, int]
    is_summed: bool


def _shared(model: nn.Module, rank: Rank) -> Iterator[_Share]:
    paths = model.quant_paths
    within_sums = {
        f"{path}.{child}"
        for path, module in model.named_modules()
        if hasattr(module, "experts")
        for child in ("experts", "shared_expert")
    }
    for path, module in model.named_modules():
        if path == paths.head and hasattr(module, "weight"):
            vocabulary = module.weight.shape[0]
            yield _Share(path, module, {"": Cut(_ROWS, rank.range(vocabulary), vocabulary, True)}, {}, False)
        elif not path.startswith(f"{paths.decoder}.layers."):
            continue
        elif hasattr(module, "_kv_heads"):
            yield _attention_share(path, module, rank)
        elif isinstance(module, GatedMLP | Experts):
            width = module.gate_proj.weight.shape[-2]
            own = width_share(width, rank)
            rows, columns = Cut(_ROWS, own, width, True), Cut(_COLUMNS, own, width, rank.index == 0)
            cuts = {"gate_proj": rows, "up_proj": rows, "down_proj": columns}
            yield _Share(path, module, cuts, {}, path not in within_sums)
        elif hasattr(module, "experts"):
            yield _Share(path, module, {}, {}, True)


def _attention_share(path: str, module: Any, rank: Rank) -> _Share:
    heads, kv_heads = module._heads, module._kv_heads
    share, head_dim = head_share(heads, kv_heads, rank), module.q_proj.weight.shape[0] // heads

    def cut(axis: int, part: range, count: int) -> Cut:
        own = range(part.start * head_dim, part.stop * head_dim)
        return Cut(axis, own, count * head_dim, axis == _ROWS or rank.index == 0)

    keys = cut(_ROWS, share.kv_heads, kv_heads)
    cuts = {"q_proj": cut(_ROWS, share.heads, heads), "k_proj": keys, "v_proj": keys}
    cuts["o_proj"] = cut(_COLUMNS, share.heads, heads)
    return _Share(path, module, cuts, {"_heads": len(share.heads), "_kv_heads": len(share.kv_heads)}, True)


def _cuts(shares: Iterable[_Share]) -> Mapping[str, Cut]:
    return {_path(each.path, name): cut for each in shares for name, cut in each.cuts.items()}


def _path(*names: str) -> str:
    return ".".join(name for name in names if name)
