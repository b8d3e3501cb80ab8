"""Tensors of a checkpoint that are read piece by piece: a rank's rows or columns, experts one by one. Knows no ranks.

MLX reads a lazy tensor whole, even for a slice of it. Which part of a stored tensor becomes which part of the model's
is asked of `sanitize`, by giving it numbers that count along one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.models.shares import Cut, Place

Tensors: TypeAlias = dict[str, mx.array]
Sanitize: TypeAlias = Callable[[Tensors], Tensors]


@dataclass(frozen=True, slots=True)
class _Source:
    """A stored tensor of which all `targets` are made, and what is wanted of it."""

    file: TensorFile
    name: str
    targets: Sequence[str]
    ranges: Mapping[int, Sequence[range]]  # by axis; all of an axis that is not there

    @property
    def num_pieces(self) -> int:
        """Experts of a stack; other tensors come at once."""
        shape = self.file.shape(self.name)
        return shape[0] if len(shape) == 3 else 1

    def pieces(self) -> Iterator[mx.array]:
        if self.num_pieces == 1:
            yield self.file.read_part(self.name, self.ranges).mlx()
            return
        for index in range(self.num_pieces):
            yield self.file.read_part(self.name, {0: [range(index, index + 1)], **self.ranges}).mlx()


class Parts:
    """The tensors of a model that are cut, or quantised and come from a stack of experts.

    Relies on `sanitize` treating each tensor on its own, each expert alike, and a part of a tensor as the whole.
    """

    def __init__(
        self,
        sanitize: Sanitize,
        files: Sequence[TensorFile],
        weights: Mapping[str, mx.array],
        quantised: Container[str],
        cuts: Mapping[str, Cut],
    ) -> None:
        self._sanitize, self._files = sanitize, files
        self._sources: dict[str, _Source] = {}
        for file in files:
            for name in file.names:
                targets = sanitize({name: weights[name]})
                ranges = self._ranges(name, targets, file.shape(name), cuts)
                is_stack = len(file.shape(name)) == 3 and any(target in quantised for target in targets)
                if ranges or is_stack:
                    source = _Source(file, name, list(targets), ranges)
                    self._sources |= dict.fromkeys(targets, source)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files)

    def targets(self, name: str) -> Sequence[str]:
        """All tensors of the model that come from the same stored one as `name`."""
        return self._sources[name].targets

    def num_pieces(self, name: str) -> int:
        """How many there are of each of targets(name), joined along the first axis."""
        return self._sources[name].num_pieces

    def pieces(self, name: str) -> Iterator[Tensors]:
        """The next piece of each of targets(name)."""
        source = self._sources[name]
        for piece in source.pieces():
            yield self._sanitize({source.name: piece})

    def _ranges(
        self, name: str, targets: Tensors, shape: Sequence[int], cuts: Mapping[str, Cut]
    ) -> Mapping[int, Sequence[range]]:
        """What is read of a stored tensor so that its targets are cut."""
        wanted = {target: cut_place(target, array.shape, cuts) for target, array in targets.items()}
        places = {target: place for target, place in wanted.items() if place is not None}
        if not places:
            return {}
        assert len(places) == len(targets), f"only some of what is made of {name} is cut"
        for axis, size in enumerate(shape):
            lines = self._lines(name, shape, axis, np.arange(size), places)
            if any(line[0] != line[-1] for line in lines.values()):
                own = {target: lines[target][place[1].start : place[1].stop] for target, place in places.items()}
                indices = np.unique(np.concatenate(list(own.values())))
                found = self._lines(name, shape, axis, indices, places)
                assert all(np.array_equal(found[target], own[target]) for target in own), name
                return {axis: _as_ranges(indices)}
        raise AssertionError(f"{name} has no axis along which {', '.join(places)} could be cut")

    def _lines(
        self, name: str, shape: Sequence[int], axis: int, numbers: NDArray[Any], places: Mapping[str, Place]
    ) -> Mapping[str, NDArray[Any]]:
        """What `sanitize` makes of numbers along an axis: their order along each target's axis."""
        # Two of all else are enough to be split, and cost nothing.
        small = [len(numbers) if index == axis else min(size, 2) for index, size in enumerate(shape)]
        column = mx.array(numbers.astype(np.int32)).reshape([-1 if index == axis else 1 for index in range(len(shape))])
        probes = self._sanitize({name: mx.broadcast_to(column, small)})
        return {
            target: np.array(probes[target][tuple(slice(None) if index == along else 0 for index in range(len(shape)))])
            for target, (along, _) in places.items()
        }


def cut_place(name: str, shape: Sequence[int], cuts: Mapping[str, Cut]) -> Place | None:
    """Axis and range of a rank's share of a model's tensor, None where all of it is read."""
    path, _, leaf = name.rpartition(".")
    return cuts[path].place(leaf, shape) if path in cuts else None


def _as_ranges(indices: NDArray[Any]) -> list[range]:
    """Of rising numbers, those that follow each other."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return [range(int(run[0]), int(run[-1]) + 1) for run in runs]
