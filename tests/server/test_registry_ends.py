"""How a registry ends, with loads that hang, and that nothing is left after races."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxvlm.engine.engine import Engine
from mlxvlm.errors import (
    EngineClosedError,
    ModelError,
)
from mlxvlm.server.registry import ModelSpec, Progress, Registry
from tests.fakes import answer, ask
from tests.server.loaders import FakeLoader, run, until

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_closing_ends_a_load() -> None:
    loader = FakeLoader()
    loader.gate.clear()

    async def main() -> None:
        registry = Registry([ModelSpec("a", "a")], loader)
        task = asyncio.create_task(registry.load())
        await until(loader.entered.is_set)
        await registry.close()
        with pytest.raises(EngineClosedError):
            await task
        with pytest.raises(EngineClosedError):
            await registry.load()
        assert not registry.is_stuck

    asyncio.run(main())
    assert loader.loaded == []


def test_closing_does_not_wait_for_a_load_that_hangs() -> None:
    hanging = threading.Event()

    class Hanging(FakeLoader):
        def load(self, spec: ModelSpec, progress: Progress) -> Engine:
            self.entered.set()
            assert hanging.wait(20)
            raise ModelError("late")

    loader = Hanging()

    async def main() -> None:
        registry = Registry([ModelSpec("a", "a")], loader, drain_s=0.05)
        task = asyncio.create_task(registry.load())
        await until(loader.entered.is_set)
        begun = time.monotonic()
        await registry.close()
        assert time.monotonic() - begun < 10
        assert registry.is_stuck
        hanging.set()
        with pytest.raises(ModelError):
            await task

    asyncio.run(main())


def test_closing_gives_requests_time() -> None:
    loader = FakeLoader()

    async def main() -> None:
        registry = Registry([ModelSpec("a", "a")], loader)
        async with registry.acquire() as held:
            stream = held.engine.submit(ask([1, 2], 50))
            await registry.close()
        assert list((await asyncio.to_thread(stream.result)).token_ids) == answer([1, 2], 50)

    asyncio.run(main())


def test_closing_while_an_idle_model_is_unloaded() -> None:
    """The thread that is to close the engine has not begun when the registry ends."""
    loader, busy = FakeLoader(), threading.Event()

    async def work(registry: Registry) -> None:
        await registry.load()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        loop.run_in_executor(None, busy.wait, 20)
        await until(lambda: registry.status()[0]["status"] == "unloaded")
        loop.call_later(0.05, busy.set)

    run(work, loader, idle_unload_s=0.01)
    assert loader.alive == 0


@pytest.mark.parametrize("seed", range(6))
def test_races(seed: int) -> None:
    """Requests, unloads, new recipes and faults in any order: every answer is right, and nothing is left."""
    chance = random.Random(seed)
    faults = tuple(chance.choice([None, None, ModelError("fault")]) for _ in range(20))
    loader = FakeLoader(room=2, faults=faults)

    async def client(registry: Registry, number: int) -> int:
        await asyncio.sleep(chance.random() / 20)
        name = chance.choice("abc")
        if number % 7 == 0:
            await registry.unload(name)
        elif number % 11 == 0:
            await registry.re_isq(name, chance.choice(["4", "8"]))
        else:
            async with registry.acquire(name) as held:
                assert held.name == name
                await asyncio.sleep(chance.random() / 100)
                completion = await asyncio.to_thread(held.engine.generate, ask([number % 50], 5))
                assert list(completion.token_ids) == answer([number % 50], 5)
                return 1
        return 0

    async def work(registry: Registry) -> None:
        tasks = [asyncio.create_task(client(registry, number)) for number in range(60)]
        for task in chance.sample(tasks, 6):
            asyncio.get_running_loop().call_later(chance.random() / 10, task.cancel)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        strange = [each for each in found if not isinstance(each, int | ModelError | asyncio.CancelledError)]
        assert strange == []
        assert sum(each for each in found if isinstance(each, int)) > 10
        slots = registry._slots
        assert [(slot.holders, slot.waiting, slot.leaving) for slot in slots] == [(0, 0, False)] * 3
        assert loader.alive <= 2

    run(work, loader, "abc", idle_unload_s=0.01, room_wait_s=20)
    assert loader.alive == 0
