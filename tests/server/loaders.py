"""A loader of fake engines, and how tests use a registry with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from mlxvlm.engine.engine import Engine
from mlxvlm.errors import (
    UsageError,
)
from mlxvlm.server.registry import LoadedModel, ModelSpec, Progress, Registry
from tests.fakes import fake_engine


class FakeLoader:
    """Fake engines, at most `room` of them; `faults` are raised by the next loads, a None lets one pass."""

    def __init__(self, room: int = 9, faults: tuple[Exception | None, ...] = ()) -> None:
        self.room, self.faults = room, list(faults)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.loaded: list[str] = []
        self.recipes: list[Any] = []
        self.engines: list[Engine] = []
        self.tools: Any = None
        self.at_once = self.most_at_once = 0

    def check(self, spec: ModelSpec) -> None:
        if spec.options.isq == "nonsense":
            raise UsageError("no such type")

    @property
    def alive(self) -> int:
        return sum(not engine._refusing for engine in self.engines)

    def fits(self, spec: ModelSpec) -> bool:
        return self.alive < self.room

    def load(self, spec: ModelSpec, progress: Progress) -> LoadedModel:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.entered.set()
            while not self.gate.wait(0.005):
                progress(1, 2)
            fault = self.faults.pop(0) if self.faults else None
            if fault is not None:
                raise fault
            self.loaded.append(spec.name)
            self.recipes.append(spec.options.isq)
            assert self.alive < self.room or self.room == 9
            self.engines.append(fake_engine())
            return LoadedModel(spec.name, self.engines[-1], self.tools)
        finally:
            self.at_once -= 1


def run(work: Callable[[Registry], Awaitable[Any]], loader: FakeLoader, names: str = "ab", **settings: Any) -> Any:
    """Runs `work` with a registry of models called by letters, and closes it."""

    async def main() -> Any:
        registry = Registry([ModelSpec(name, name) for name in names], loader, **settings)
        registry.start()
        try:
            async with asyncio.timeout(30):
                return await work(registry)
        finally:
            loader.gate.set()
            await registry.close()

    return asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def states(registry: Registry) -> dict[str, str]:
    return {each["id"]: each["status"] for each in registry.status()}
