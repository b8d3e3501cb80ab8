"""What several ranks send each other, and how long that takes: counted from graphs, and as formulas.

Sources of how MLX sends: mlx/distributed/ring/ring.cpp and mlx/distributed/jaccl/lib/jaccl/mesh_impl.h of MLX 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal
from unittest import mock

import mlx.core as mx


@dataclass(frozen=True)
class Message:
    """One collective. nbytes: what each rank gives."""

    kind: Literal["sum", "gather"]
    nbytes: int


@dataclass(frozen=True)
class Link:
    """Between neighbours. step_s: of one exchange between two; bandwidth: bytes/s each way; fixed_s: of a collective.

    is_mesh: each rank has a cable to each other.
    """

    name: str
    step_s: float
    bandwidth: float
    fixed_s: float = 0.0
    is_mesh: bool = False

    def seconds(self, message: Message, count: int) -> float:
        """Of one collective. A ring's sum is 2 (N - 1) exchanges of 1/N of it each, a gathering N - 1 of all of it."""
        rounds = 2 * (count - 1) if message.kind == "sum" else count - 1
        part = message.nbytes / count if message.kind == "sum" else message.nbytes
        if self.is_mesh:
            # Small ones go to all others at once; what passes a cable is at most what passes a ring's.
            return self.fixed_s + self.step_s + rounds * part / self.bandwidth
        return self.fixed_s + rounds * (self.step_s + part / self.bandwidth)


@dataclass(frozen=True)
class Shape:
    """What of a model decides its messages. itemsize: bytes of an activation."""

    layers: int
    hidden: int
    vocabulary: int
    has_head: bool  # of its own; else the embeddings are it, on rank 0
    itemsize: int

    def step(self, rows: int, count: int) -> list[Message]:
        """Of a decode step: the embeddings, two sums a layer, and the logits where the vocabulary is shared."""
        sums = [Message("sum", rows * self.hidden * self.itemsize)] * (2 * self.layers + 1)
        part = Message("gather", rows * ceil(self.vocabulary / count) * self.itemsize)
        return sums + [part] * self.has_head

    def chunk(self, tokens: int) -> list[Message]:
        """Of a part of a prompt: no logits, and of the last layer keys and values only."""
        return [Message("sum", tokens * self.hidden * self.itemsize)] * (2 * self.layers - 1)


def seconds(messages: Sequence[Message], link: Link, count: int) -> float:
    """Of all, one after the other: each needs what the one before gave."""
    return sum(link.seconds(message, count) for message in messages)


def fitted(name: str, count: int, small: tuple[int, float], large: tuple[int, float]) -> Link:
    """The ring whose sums of two sizes take so long: bytes, seconds."""
    (few, short), (many, long) = small, large
    rounds = 2 * (count - 1)
    bandwidth = rounds / count * (many - few) / max(long - short, 1e-9)
    return Link(name, max(short / rounds - few / count / bandwidth, 0.0), bandwidth)


@contextmanager
def recorded(alone: int | None = None) -> Iterator[list[Message]]:
    """What is sent within the block, as graphs are built. alone: nothing is; this rank's is put in each one's place."""
    found: list[Message] = []

    def recording(kind: Literal["sum", "gather"], real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def send(array: mx.array, *args: Any, **options: Any) -> mx.array:
            found.append(Message(kind, array.nbytes))
            if alone is None:
                return real(array, *args, **options)
            return array if kind == "sum" else mx.concatenate([array] * alone)

        return send

    distributed = mx.distributed
    with (
        mock.patch.object(distributed, "all_sum", recording("sum", distributed.all_sum)),
        mock.patch.object(distributed, "all_gather", recording("gather", distributed.all_gather)),
    ):
        yield found
