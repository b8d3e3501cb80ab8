"""Several ranks run one model: what each does from the meeting to the end. Knows the order, not sockets or tensors."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import cast

from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.load import LoadOptions, ModelSource, Progress
from mlxvlm.engine import device
from mlxvlm.engine.kv_layout import quantised
from mlxvlm.engine.rows import Rows
from mlxvlm.errors import MlxvlmError
from mlxvlm.models.base import KVSpec, VisionLanguageModel
from mlxvlm.models.shares import Rank, Share
from mlxvlm.ranks.control import TIMEOUT_S, Link, Wire
from mlxvlm.ranks.follower import FollowerRows, follow
from mlxvlm.ranks.group import START_TIMEOUT_S, Group, join
from mlxvlm.ranks.leader import LeaderRows
from mlxvlm.ranks.meeting import Terms
from mlxvlm.ranks.place import Place
from mlxvlm.ranks.shard import Shard

_LOSS_S = 1.0  # MLX notices a rank's end a moment before the control plane does

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """What all ranks load, and how they hold keys and values. Seconds: for all to come, and of silence."""

    source: ModelSource
    options: LoadOptions
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_memory_bytes: int | None = None
    start_timeout_s: float = START_TIMEOUT_S
    timeout_s: float = TIMEOUT_S

    @property
    def terms(self) -> Terms:
        """What must be alike on all ranks; paths and times of files need not be."""
        config = json.dumps(self.source.config, sort_keys=True).encode()
        return {
            "mlxvlm": version("mlxvlm"),
            "a model with the config": hashlib.sha256(config).hexdigest()[:12],
            "the types": f"{self.options.dtype}, {recipe_of(self.options).facts}",
            "keys and values in": f"{self.kv_bits or 'all'} bits by {self.kv_group_size}",
        }

    def shard(self, group: Group, progress: Progress) -> Shard:
        """A rank's part of the model."""
        rank = Rank(group.place.index, group.place.count)
        return Shard(self.source.build(self.options, progress, Share(rank, group.add)), rank, group.distributed)


class Leader:
    """Rank 0's Ranks."""

    def __init__(self, place: Place, work: Work) -> None:
        self.on_loss: Callable[[str], None] = lambda text: None  # as Link's
        self._place, self._work = place, work
        self._link: Link | None = None
        self._free: float = math.inf

    def build(self, progress: Progress) -> VisionLanguageModel:
        """An Engine's Build: meets the others and loads this rank's part. Raises RanksError beside what loading does."""
        group = join(self._place, self._work.terms, self._work.start_timeout_s, lambda: progress(0, 1))
        self._link = Link(group.place, group.connections, self._work.timeout_s)
        self._link.on_loss = self.on_loss
        return self._work.shard(group, progress)

    def rows(self, model: VisionLanguageModel, specs: Sequence[KVSpec]) -> Rows:
        """Waits until all others have loaded their parts. Raises RanksError."""
        assert self._link is not None
        heads = specs[0].num_kv_heads
        self._free = min(report["free_bytes"] * heads / report["kv_heads"] for report in self._link.reports())
        return LeaderRows(cast(Shard, model), specs, self._link.tell)

    def free_bytes(self) -> float:
        return self._free

    def fail(self, failure: MlxvlmError) -> None:
        """Ends all ranks, and tells why; with the loss of another, where that is what has failed."""
        assert self._link is not None
        self._link.fail(str(failure), _LOSS_S)

    def close(self, failure: str | None = None) -> None:
        """The others end too: well, or telling why not."""
        if self._link is not None:
            self._link.close(failure)


def serve_leader(place: Place, work: Work) -> None:
    """All that a rank after the first does, on a thread that may use MLX. Raises what ends it but for rank 0's wish."""
    device.configure()
    group = join(place, work.terms, work.start_timeout_s)
    wire = Wire(group.place, group.connections[0], work.timeout_s)
    try:
        shard = work.shard(group, lambda done, total: None)
        rows = FollowerRows(shard, quantised(shard.kv_specs, work.kv_bits, work.kv_group_size))
        budget = device.default_budget() if work.max_memory_bytes is None else work.max_memory_bytes
        free = budget - device.memory().active_bytes
        wire.ready({"free_bytes": free, "kv_heads": shard.kv_specs[0].num_kv_heads})
        log.info("%s is ready", place.name())
        follow(rows, wire)
    except BaseException as error:
        wire.failed(f"{type(error).__name__}: {error}")
        raise
    finally:
        wire.close()
