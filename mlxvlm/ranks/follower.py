"""What ranks after the first do: the leader's rows, from its messages. Knows tensors and messages, not sockets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from mlxvlm.engine.kv_cache import KVBlock
from mlxvlm.engine.rows import Rows
from mlxvlm.errors import RanksError
from mlxvlm.models.base import Inputs, KVSpec
from mlxvlm.ranks.shard import Shard

_ALIKE = ("fill", "join", "order", "commit", "drop")  # which need nothing but what was told


class FollowerRows(Rows):
    """Rows of shapes: what they compute with comes from rank 0."""

    def __init__(self, shard: Shard, specs: Sequence[KVSpec]) -> None:
        super().__init__(shard, specs)
        self._shard = shard
        self._blocks: dict[int, KVBlock] = {}  # by rank 0's numbers

    def do(self, name: str, *args: Any) -> None:
        """One thing that rank 0 has told. Raises RanksError where the two have come apart."""
        if name == "keep":
            owner, outline = args
            self.keep(owner, self._shard.unfilled(outline))
        elif name == "begin":
            owner, numbers, length = args
            self.begin(owner, [self._blocks[number] for number in numbers], length)
        elif name == "run":
            shape, places, lengths = args
            if lengths != self._lengths:
                raise RanksError(f"rank {self._shard.rank.index} has rows of {self._lengths} tokens, not {lengths}")
            self.run(mx.zeros(shape, mx.uint32), places)
        elif name == "attempt":
            self.attempt(args[0], mx.zeros((1, 1), mx.uint32))
        elif name == "copy":
            owner, start, end, number = args
            self._blocks[number] = self.copy(owner, start, end)
        elif name == "free":
            del self._blocks[args[0]]
        elif name in _ALIKE:
            getattr(self, name)(*args)
        else:
            raise RanksError(f"rank 0 tells of {name!r}, which is unknown: do all ranks run the same version?")

    def _tell(self, name: str, *args: Any, arrays: Sequence[mx.array] = ()) -> None:
        mx.async_eval(*arrays)

    def _share(self, owner: int, inputs: Inputs) -> Inputs:
        return self._shard.shared(inputs)


def follow(rows: FollowerRows, messages: Iterable[list[Any]]) -> None:
    """Does what is told until there is no more."""
    for message in messages:
        rows.do(*message)
