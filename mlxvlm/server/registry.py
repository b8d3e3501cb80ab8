"""Several models, each loaded when it is asked for. Knows when to load and unload, not how.

Everything here runs on one event loop; loading and closing happen in threads. Changes to what is loaded come one at a
time. A request holds its model with `acquire`, and a model that is held is not unloaded to make room.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mlxvlm.agent.formats import ToolFormat
from mlxvlm.api.operations import ModelState
from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.stats import EngineStats
from mlxvlm.errors import EngineClosedError, MlxvlmError, OverloadedError, UnknownModelError, UsageError
from mlxvlm.server.refusals import SHUTTING_DOWN, UNLOADED

DEFAULT = "default"  # the first model's other name
_SHOWN_CHARS = 100  # of a name that is unknown
_ROOM_WAIT_S = 60.0  # for a model that is busy to be done, when another needs its memory
_LONGEST_REST_S = 30.0  # between looks for idle models
_log = logging.getLogger("mlxvlm.server.models")

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as it was asked for. `source`: keywords of open_model; `limits`: fields of EngineConfig."""

    name: str
    model: str
    aliases: tuple[str, ...] = ()
    options: LoadOptions = field(default_factory=LoadOptions)
    source: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    draft_model: str | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What loading gives and a request holds. `tools`: how the model writes tool calls, None if that is not known."""

    name: str
    engine: Engine
    tools: ToolFormat | None = None


class Loader(Protocol):
    """How models are loaded; all of it is called in threads and raises MlxvlmError."""

    def check(self, spec: ModelSpec) -> None:
        """Whether the options have a meaning, before a model is given up for them."""

    def fits(self, spec: ModelSpec) -> bool:
        """Whether there is memory for one more model now."""

    def load(self, spec: ModelSpec, progress: Progress) -> LoadedModel:
        """Raises what `progress` raises: that ends it early."""


@dataclass(slots=True)
class _Slot:
    """One served model and what has become of it."""

    spec: ModelSpec
    engine: Engine | None = None
    tools: ToolFormat | None = None  # the engine's
    holders: int = 0  # requests that run on it
    waiting: int = 0  # requests that wait for it to be loaded
    leaving: bool = False  # it is about to be unloaded: no new holders
    loading: asyncio.Task[None] | None = None
    done: tuple[int, int] = (0, 0)  # bytes of loading
    last_used: float = 0.0
    error: str | None = None

    @property
    def is_idle(self) -> bool:
        return self.engine is not None and not self.holders and not self.waiting

    @property
    def status(self) -> str:
        if self.loading is not None:
            return "loading"
        if self.engine is not None:
            return "loaded"
        return "failed" if self.error else "unloaded"


class Registry:
    """The models by name; start() it inside the event loop and close() it there."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        loader: Loader,
        *,
        idle_unload_s: float | None = None,
        drain_s: float = 30.0,
        room_wait_s: float = _ROOM_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = [_Slot(spec) for spec in specs]
        self._by_name = _names(self._slots)
        self._loader, self._clock = loader, clock
        self._idle_unload_s, self._drain_s, self._room_wait_s = idle_unload_s, drain_s, room_wait_s
        self._changing = asyncio.Lock()
        self._released = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlxvlm-load")
        self._changes: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.Task[None] | None = None
        self._closed = False
        self._created = int(time.time())
        self.is_ready = False  # whether the first load has succeeded
        self.is_stuck = False  # after close(): a load did not end in time

    def start(self) -> None:
        """Unloads idle models from now on."""
        if self._idle_unload_s is not None and self._reaper is None:
            self._reaper = asyncio.create_task(self._reap(self._idle_unload_s))

    @property
    def names(self) -> list[str]:
        """Served names in order, without aliases."""
        return [slot.spec.name for slot in self._slots]

    def resolve(self, name: str) -> str:
        """The served name behind a name or alias. Raises UnknownModelError."""
        return self._slot(name).spec.name

    def status(self) -> list[dict[str, Any]]:
        """What is served and what has become of it, as JSON values."""
        return [
            {
                "id": slot.spec.name,
                "aliases": sorted(
                    name for name, other in self._by_name.items() if other is slot and name != slot.spec.name
                ),
                "status": slot.status,
                "loaded_bytes": slot.done[0],
                "total_bytes": slot.done[1],
                "running": slot.holders,
                "isq": None if slot.spec.options.isq is None else str(slot.spec.options.isq),
                "error": slot.error,
            }
            for slot in self._slots
        ]

    def state(self, name: str) -> ModelState:
        """What has become of a model. Raises UnknownModelError."""
        slot = self._slot(name)
        isq = slot.spec.options.isq
        return ModelState(id=slot.spec.name, status=slot.status, isq=None if isq is None else str(isq))

    def figures(self) -> dict[str, EngineStats]:
        """Of the loaded models."""
        return {slot.spec.name: slot.engine.stats() for slot in self._slots if slot.engine is not None}

    def memory(self) -> dict[str, int]:
        """MLX's counters of this process; nothing while no model is loaded."""
        for slot in self._slots:
            if slot.engine is not None:
                report = slot.engine.memory()
                return {"active": report.active_bytes, "peak": report.peak_bytes, "cached": report.cached_bytes}
        return {}

    def cards(self) -> list[Any]:
        """The models as GET /v1/models shows them."""
        from mlxvlm.api.answers import ModelCard

        return [
            ModelCard(
                id=slot.spec.name,
                created=self._created,
                status=slot.status if slot.status in ("loaded", "loading") else "unloaded",
            )
            for slot in self._slots
        ]

    @asynccontextmanager
    async def acquire(self, name: str | None = None) -> AsyncIterator[LoadedModel]:
        """A model, loaded if need be, and not unloaded inside the block unless someone insists. None: the first.

        Raises UnknownModelError, the loader's errors, OverloadedError, EngineClosedError.
        """
        slot = self._slot(name)
        slot.waiting += 1
        try:
            while (engine := slot.engine) is None or slot.leaving:
                await self._wait_for_load(slot)
        finally:
            slot.waiting -= 1
            self._tell()
        slot.holders += 1  # no await since it was looked at
        try:
            yield LoadedModel(slot.spec.name, engine, slot.tools)
        finally:
            slot.holders -= 1
            slot.last_used = self._clock()
            self._tell()

    async def load(self, name: str | None = None) -> None:
        """Returns when the model is loaded. Raises as acquire()."""
        async with self.acquire(name):
            pass

    async def unload(self, name: str) -> None:
        """Waits for running requests (drain_s at most), then frees the model's memory."""
        await self._change(self._unload_drained(self._slot(name)))

    async def re_isq(self, name: str, isq: str | int | None) -> None:
        """The same model quantised otherwise. If that fails, the recipe stays what it was.

        Running requests end first (drain_s at most), new ones wait. Raises UsageError for an unknown type.
        """
        slot = self._slot(name)
        spec = replace(slot.spec, options=replace(slot.spec.options, isq=isq))
        await self._in_pool(self._loader.check, spec)
        await self._change(self._rebuild(slot, spec))

    async def unload_idle(self) -> None:
        """Unloads what nobody has used for idle_unload_s."""
        async with self._changing:
            for slot in self._slots:
                if slot.is_idle and self._clock() - slot.last_used >= (self._idle_unload_s or 0):
                    _log.info("%s was idle and is unloaded", slot.spec.name)
                    await self._unload(slot)

    def refuse(self) -> None:
        """Ends loading where it is, and who waits for it gets EngineClosedError; what runs goes on."""
        self._closed = True
        self._tell()

    async def close(self) -> None:
        """refuse(); gives requests drain_s, then frees all models."""
        self.refuse()
        if self._reaper is not None:
            self._reaper.cancel()
            with suppress(asyncio.CancelledError):
                await self._reaper
        loading = [*self._changes, *(slot.loading for slot in self._slots if slot.loading is not None)]
        if loading:
            _, late = await asyncio.wait(loading, timeout=self._drain_s)
            self.is_stuck = bool(late)
        engines = [slot.engine for slot in self._slots if slot.engine is not None]
        for slot in self._slots:
            slot.engine = None
        await asyncio.gather(*(asyncio.to_thread(engine.close, self._drain_s, SHUTTING_DOWN) for engine in engines))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _slot(self, name: str | None) -> _Slot:
        slot = self._by_name.get(DEFAULT if name is None else name)
        if slot is None:
            raise UnknownModelError(
                f"there is no model {str(name)[:_SHOWN_CHARS]!r} here: this server has {', '.join(self._by_name)}"
            )
        return slot

    async def _wait_for_load(self, slot: _Slot) -> None:
        """One load for all who wait; who leaves does not end it."""
        self._check_open()
        if slot.loading is None:
            slot.loading = asyncio.create_task(self._load(slot))
            slot.loading.add_done_callback(lambda task: _loaded(slot, task))
        await asyncio.shield(slot.loading)

    async def _change(self, work: Coroutine[Any, Any, None]) -> None:
        """Goes on to its end also where who wanted it leaves: half a change would lose an engine."""
        task = asyncio.create_task(work)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _unload_drained(self, slot: _Slot) -> None:
        async with self._changing:
            await self._drain(slot)

    async def _rebuild(self, slot: _Slot, spec: ModelSpec) -> None:
        async with self._changing:
            self._check_open()
            await self._drain(slot)
            former, slot.spec = slot.spec, spec
            try:
                await self._build(slot)
            except BaseException:
                slot.spec = former
                raise

    async def _load(self, slot: _Slot) -> None:
        async with self._changing:
            if slot.engine is None:
                await self._build(slot)

    async def _build(self, slot: _Slot) -> None:
        """Inside of _changing."""
        self._check_open()
        await self._make_room(slot)
        begun = self._clock()
        _log.info("%s is being loaded", slot.spec.name)

        def report(done: int, total: int) -> None:
            slot.done = (done, total)
            self._check_open()

        loaded: LoadedModel = await self._in_pool(self._loader.load, slot.spec, report)
        if self._closed:
            await asyncio.to_thread(loaded.engine.close)
            self._check_open()
        slot.engine, slot.tools = loaded.engine, loaded.tools
        slot.error, slot.last_used = None, self._clock()
        self.is_ready = True
        _log.info("%s is loaded after %.1f s", slot.spec.name, slot.last_used - begun)

    async def _make_room(self, slot: _Slot) -> None:
        """Unloads others, least recently used first, until this one fits or is alone."""
        deadline = self._clock() + self._room_wait_s
        while loaded := [other for other in self._slots if other.engine is not None]:
            if await self._in_pool(self._loader.fits, slot.spec):
                return
            idle = [other for other in loaded if other.is_idle]
            if idle:
                victim = min(idle, key=lambda other: other.last_used)
                _log.info("%s is unloaded to make room", victim.spec.name)
                await self._unload(victim)
            else:
                await self._await_release(deadline, slot.spec.name)
            self._check_open()

    async def _await_release(self, deadline: float, name: str) -> None:
        released = self._released
        try:
            await asyncio.wait_for(released.wait(), max(deadline - self._clock(), 0))
        except TimeoutError as error:
            raise OverloadedError(f"there is no memory for {name} while other models are in use: try again") from error

    async def _drain(self, slot: _Slot) -> None:
        """Inside of _changing: no new holders, the old ones are waited for, then it is unloaded."""
        slot.leaving = True
        deadline = self._clock() + self._drain_s
        try:
            while slot.holders and self._clock() < deadline and not self._closed:
                released = self._released
                with suppress(TimeoutError):
                    await asyncio.wait_for(released.wait(), max(deadline - self._clock(), 0))
            await self._unload(slot)
        finally:
            slot.leaving = False

    async def _unload(self, slot: _Slot) -> None:
        """Inside of _changing. Requests that still run get EngineClosedError."""
        engine, slot.engine, slot.done = slot.engine, None, (0, 0)
        if engine is not None:
            await asyncio.to_thread(engine.close, why=SHUTTING_DOWN if self._closed else UNLOADED)

    async def _reap(self, idle_s: float) -> None:
        while True:
            await asyncio.sleep(min(idle_s / 2, _LONGEST_REST_S))
            await self._change(self.unload_idle())

    async def _in_pool(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def _tell(self) -> None:
        """Wakes those who wait for a model to be released."""
        self._released.set()
        self._released = asyncio.Event()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(SHUTTING_DOWN)


def _loaded(slot: _Slot, task: asyncio.Task[None]) -> None:
    slot.loading = None
    error = None if task.cancelled() else task.exception()  # looked at also where nobody waits any more
    if error is not None:
        # What a defect says may hold paths of this machine.
        slot.error = str(error) if isinstance(error, MlxvlmError) else "an internal error"
        _log.error("%s can't be loaded: %s", slot.spec.name, error)


def _names(slots: Sequence[_Slot]) -> dict[str, _Slot]:
    """Names, then aliases, then `default`. Raises UsageError for a name that two have."""
    if not slots:
        raise UsageError("there is no model to serve: give one with -m")
    found: dict[str, _Slot] = {}
    for slot in slots:
        for name in (slot.spec.name, *slot.spec.aliases):
            if found.setdefault(name, slot) is not slot:
                raise UsageError(f"two models are called {name}: tell them apart with -m NAME=MODEL")
    found.setdefault(DEFAULT, slots[0])
    return found
