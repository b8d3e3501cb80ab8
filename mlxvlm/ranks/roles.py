"""What rank 0 does and what the others do with a model that they run together. Knows how ranks' parts fit together."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol, cast

import mlx.core as mx

from mlxvlm import __version__
from mlxvlm.engine import device
from mlxvlm.engine.failures import failure_of
from mlxvlm.engine.kv_layout import quantised
from mlxvlm.engine.rows import Rows
from mlxvlm.errors import EngineClosedError, InternalError, MlxvlmError, RanksError
from mlxvlm.models.base import KVSpec, VisionLanguageModel
from mlxvlm.models.shares import Rank, Share
from mlxvlm.ranks.control import Link, Wire
from mlxvlm.ranks.endings import end_process
from mlxvlm.ranks.follower import FollowerRows, follow
from mlxvlm.ranks.group import Group, join
from mlxvlm.ranks.leader import LeaderRows
from mlxvlm.ranks.place import Member
from mlxvlm.ranks.shard import Shard

_LONGEST_REST_S = 5.0  # between looks at whether a step goes on
_SETTLE_S = 1.0  # MLX notices a lost rank first, the control plane knows which one
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class Build(Protocol):
    """A model's weights, narrowed and evaluated."""

    def __call__(self, progress: Progress, share: Share) -> VisionLanguageModel: ...


class Lead:
    """Rank 0's way to the others: builds the model for an Engine, and is its `ranks`."""

    def __init__(self, member: Member, build: Build, terms: Mapping[str, str]) -> None:
        self._member, self._build, self._terms = member, build, terms
        self._on_loss: Callable[[MlxvlmError], None] = lambda error: None
        self._link: Link | None = None
        self._is_closed = threading.Event()
        self._free_bytes = 0.0
        self._busy_since: float | None = None

    def build(self, progress: Progress) -> VisionLanguageModel:
        """When all others have theirs too. Raises RanksError, and what building raises, which the others are told."""
        member = self._member

        def check() -> None:
            progress(0, 0)  # raises where loading was interrupted
            member.check()

        group = join(member.place, self._terms, member.start_timeout_s, check)
        member.connected()
        self._link = link = Link(group.place, group.connections, member.timeout_s)
        link.on_loss = lambda text: self._on_loss(RanksError(text))
        try:
            shard = _shard(group, self._build, progress)
            heads, reports = shard.kv_specs[0].num_kv_heads, link.reports(partial(progress, 0, 0))
            # Where heads don't divide evenly, another's row may take more than this one's.
            self._free_bytes = min(report["free_bytes"] * heads / report["kv_heads"] for report in reports)
        except EngineClosedError:
            link.close()  # somebody changed their mind, which is no failure
            raise
        except BaseException as error:
            link.close(str(error) or type(error).__name__)
            raise
        threading.Thread(target=self._guard, args=(link,), name="mlxvlm-ranks-stall", daemon=True).start()
        return shard

    def rows(self, model: VisionLanguageModel, specs: Sequence[KVSpec]) -> Rows:
        assert self._link is not None
        return LeaderRows(cast(Shard, model), specs, self._link.tell)

    def free_bytes(self) -> float:
        return self._free_bytes

    def watch(self, on_loss: Callable[[MlxvlmError], None]) -> None:
        self._on_loss = on_loss

    def pulse(self, is_idle: bool) -> None:
        self._busy_since = None if is_idle else time.monotonic()

    def _guard(self, link: Link) -> None:
        """A cable between two others can be out while both are heard of here: sums then never come."""
        limit_s = self._member.stall_timeout_s
        while not self._is_closed.wait(min(limit_s / 4, _LONGEST_REST_S)):
            since = self._busy_since
            if since is not None and time.monotonic() - since > limit_s:
                link.fail(f"a step took longer than {limit_s:g} s, so some rank's part of it did not come")
                return

    def doubt(self, failure: MlxvlmError) -> None:
        if self._link is not None and _is_of_all(failure):
            self._link.fail(str(failure), _SETTLE_S)

    def close(self) -> None:
        self._is_closed.set()
        if self._link is not None:
            self._link.close()


def take_part(
    member: Member, build: Build, terms: Mapping[str, str], budget: int | None, layout: tuple[int | None, int]
) -> NoReturn:
    """What a rank after the first does until rank 0 is done. Raises SystemExit.

    budget: bytes for weights and rows, None for what the device recommends. layout: see kv_layout.quantised().
    """
    name = member.place.name()
    _log.info("%s waits for the others", name)
    try:
        group = join(member.place, terms, member.start_timeout_s, member.check)
    except EngineClosedError as interrupted:
        raise SystemExit(0) from interrupted
    wire = Wire(group.place, group.connections[0], member.timeout_s)

    def progress(done: int, total: int) -> None:
        if wire.is_ended:
            raise EngineClosedError("rank 0 was interrupted while it loaded")

    def work() -> None:
        device.configure()
        shard = _shard(group, build, progress)
        rows = FollowerRows(shard, quantised(shard.kv_specs, *layout))
        bytes_ = (device.default_budget() if budget is None else budget) - device.memory().active_bytes
        wire.ready({"free_bytes": bytes_, "kv_heads": shard.kv_specs[0].num_kv_heads})
        _log.info("%s has its share, %.2f GB", name, device.memory().active_bytes / 1e9)
        follow(rows, wire)
        mx.synchronize()

    failure = failure_of(work)
    if failure is not None and not isinstance(failure, EngineClosedError):
        if _is_of_all(failure):
            time.sleep(_SETTLE_S)  # rank 0 may know better what it was, and end this process
        wire.failed(str(failure))
        end_process(f"{name}: {failure}")
    wire.close()
    raise SystemExit(0)


def terms_of(config: Mapping[str, Any], files: Sequence[tuple[str, int]], options: Sequence[Any]) -> dict[str, str]:
    """What all ranks must be asked for alike. files: names and sizes of the weights."""
    return {
        "mlxvlm": __version__,
        "the model": _digest([config, sorted(files)]),
        "options": _digest([str(each) for each in options]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _shard(group: Group, build: Build, progress: Progress) -> Shard:
    rank = Rank(group.place.index, group.place.count)
    return Shard(build(progress, Share(rank, group.add)), rank, group.distributed)


def _is_of_all(failure: MlxvlmError) -> bool:
    """Whether ranks may have come apart: MLX raises RuntimeError for a lost rank, and where a device fails."""
    return isinstance(failure, RanksError) or (
        isinstance(failure, InternalError) and str(failure).startswith(f"{RuntimeError.__name__}:")
    )
