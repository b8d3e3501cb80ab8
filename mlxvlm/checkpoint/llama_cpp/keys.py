"""A GGUF file's metadata and shapes, every value checked for its type. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from mlxvlm.errors import ModelError, WeightsError

T = TypeVar("T")
Shape: TypeAlias = tuple[int, ...]  # as NumPy has it, the input dimension last

_LEAST = 1e-30
_LONGEST_SHOWN = 40  # characters of a wrong value in an error


@dataclass(frozen=True)
class Keys:
    """`file` is for errors; `prefix`, once chosen, goes before every key. Getters raise ModelError."""

    file: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    prefix: str = ""

    def within(self, prefix: str) -> Keys:
        """The same file, keys counted from `prefix`."""
        return Keys(self.file, self.metadata, self.shapes, prefix)

    def _get(self, key: str, kinds: tuple[type[T], ...], default: T | None) -> T:
        name = self.prefix + key
        value = self.metadata.get(name)
        if value is None:
            if default is None:
                raise ModelError(f"{self.file} has no {name}: it is no model that can be run, or of an old converter")
            return default
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(key, value)
        return value

    def wrong(self, key: str, value: object) -> ModelError:
        """The error for a value that makes no sense."""
        shown = repr(value)
        shown = shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
        return ModelError(f"{self.file}: {self.prefix}{key} is {shown}, which makes no sense; fetch the file again")

    def integer(self, key: str, default: int | None = None) -> int:
        """A count or an id; never negative."""
        value = self._get(key, (int,), default)
        if value < 0:
            raise self.wrong(key, value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """An integer above 0."""
        value = self.integer(key, default)
        if not value:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number with a reciprocal in float32."""
        value = self._get(key, (float, int), default)
        if not _LEAST <= value <= 1 / _LEAST:
            raise self.wrong(key, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._get(key, (bool,), default)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self._get(key, (str,), default)

    def _array(self, key: str, kinds: tuple[type, ...], default: Sequence[Any] | None) -> list[Any]:
        name = self.prefix + key
        value = self.metadata.get(name)
        if value is None and default is not None:
            return list(default)
        found = self._get(key, (list, tuple, np.ndarray), None)
        items: list[Any] = found.tolist() if isinstance(found, np.ndarray) else list(found)
        for item in items:
            if not isinstance(item, kinds) or isinstance(item, bool):
                raise self.wrong(key, item)
        return items

    def texts(self, key: str, default: Sequence[str] | None = None) -> list[str]:
        """An array of strings."""
        return self._array(key, (str,), default)

    def integers(self, key: str, default: Sequence[int] | None = None) -> list[int]:
        """An array of integers."""
        return self._array(key, (int,), default)

    def numbers(self, key: str, default: Sequence[float] | None = None) -> list[float]:
        """An array of finite numbers."""
        numbers = self._array(key, (float, int), default)
        for number in numbers:
            if not math.isfinite(number):
                raise self.wrong(key, number)
        return [float(number) for number in numbers]

    def shape(self, tensor: str, dimensions: int) -> Shape:
        """Of a tensor that must be there. Raises WeightsError."""
        found = self.shapes.get(tensor)
        if found is None:
            raise WeightsError(f"{self.file} lacks the tensor {tensor}: convert the model again, or fetch another file")
        if len(found) != dimensions:
            raise WeightsError(f"{self.file}: tensor {tensor} has the shape {list(found)}, {dimensions} sides are due")
        return found

    def blocks(self, key: str, stem: str) -> int:
        """A number of layers, which can't be more than the file has tensors `stem`N.*."""
        declared = self.integer(key)
        # Counted in the file: a damaged number must not make us build a billion layers.
        stored = {name[len(stem) :].split(".", 1)[0] for name in self.shapes if name.startswith(stem)}
        if declared != len(stored):
            raise WeightsError(
                f"{self.file}: {self.prefix}{key} is {declared}, but it has {len(stored)} layers {stem}*"
            )
        return declared
