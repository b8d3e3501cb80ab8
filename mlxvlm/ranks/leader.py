"""Rank 0's rows: what is done with them is told to the others. Knows tensors and messages, not sockets."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlxvlm.engine.kv_cache import KVBlock
from mlxvlm.engine.rows import Rows
from mlxvlm.errors import RanksError
from mlxvlm.models.base import Inputs, KVSpec
from mlxvlm.ranks.shard import Shard

Tell = Callable[[list[Any]], None]


class LeaderRows(Rows):
    """Rows whose passes all ranks run."""

    def __init__(self, shard: Shard, specs: Sequence[KVSpec], tell: Tell) -> None:
        super().__init__(shard, specs)
        self._shard = shard
        self._send = tell
        self._unused: deque[int] = deque()  # blocks that are gone here, and not yet elsewhere

    def copy(self, owner: int, start: int, end: int) -> KVBlock:
        """As Rows.copy; when it is not used any more, the others drop theirs too."""
        block = super().copy(owner, start, end)
        # Told later: the garbage collector calls this in the middle of anything.
        weakref.finalize(block, self._unused.append, block.number).atexit = False
        return block

    def _tell(self, name: str, *args: Any, arrays: Sequence[mx.array] = ()) -> None:
        while self._unused:
            self._send(["free", self._unused.popleft()])
        self._send([name, *args])
        # Now, as the others do: what comes next has collectives too.
        try:
            mx.async_eval(*arrays)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise RanksError(f"what the others compute could not be started here: {error}") from error

    def _share(self, owner: int, inputs: Inputs) -> Inputs:
        self._send(["keep", owner, self._shard.outline(inputs)])
        return self._shard.shared(inputs)
