"""When models are loaded and unloaded."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from mlxvlm.errors import (
    EngineClosedError,
    ModelError,
    OverloadedError,
    UnknownModelError,
    UsageError,
)
from mlxvlm.server.registry import ModelSpec, Registry
from tests.fakes import answer, ask
from tests.server.loaders import FakeLoader, run, states, until
from tests.server.test_leaving import LONG

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_loaded_on_demand_and_once() -> None:
    loader = FakeLoader()

    async def work(registry: Registry) -> None:
        assert states(registry) == {"a": "unloaded", "b": "unloaded"}
        assert not registry.is_ready
        assert registry.memory() == {}
        async with registry.acquire("b") as held:
            assert held.name == "b"
            completion = await asyncio.to_thread(held.engine.generate, ask([1, 2, 3]))
            assert list(completion.token_ids) == answer([1, 2, 3], 10)
        async with registry.acquire("b") as again:
            assert again.engine is held.engine
        assert states(registry) == {"a": "unloaded", "b": "loaded"}
        assert registry.is_ready
        assert set(registry.figures()) == {"b"}
        assert registry.figures()["b"].generated_tokens == 10
        assert set(registry.memory()) == {"active", "peak", "cached"}

    run(work, loader)
    assert loader.loaded == ["b"]


def test_many_wait_for_one_load() -> None:
    loader = FakeLoader()
    loader.gate.clear()

    async def work(registry: Registry) -> None:
        tasks = [asyncio.create_task(registry.load("a")) for _ in range(8)]
        await until(loader.entered.is_set)
        await until(lambda: registry.status()[0]["total_bytes"] == 2)
        assert states(registry)["a"] == "loading"
        tasks[3].cancel()  # who leaves does not end it for the others
        loader.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in found].count(asyncio.CancelledError) == 1
        assert found.count(None) == 7

    run(work, loader)
    assert loader.loaded == ["a"]


def test_a_load_goes_on_when_all_have_left() -> None:
    loader = FakeLoader()
    loader.gate.clear()

    async def work(registry: Registry) -> None:
        task = asyncio.create_task(registry.load("a"))
        await until(loader.entered.is_set)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        loader.gate.set()
        await until(lambda: states(registry)["a"] == "loaded")
        await registry.load("a")

    run(work, loader)
    assert loader.loaded == ["a"]


def test_a_failed_load_fails_for_all_who_wait_and_is_tried_again() -> None:
    loader = FakeLoader(faults=(ModelError("/secret is no model"), ZeroDivisionError("a defect")))
    loader.gate.clear()

    async def work(registry: Registry) -> None:
        tasks = [asyncio.create_task(registry.load("a")) for _ in range(3)]
        await until(loader.entered.is_set)
        loader.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in found] == [ModelError] * 3
        assert registry.status()[0]["status"] == "failed"
        assert not registry.is_ready
        with pytest.raises(ZeroDivisionError):
            await registry.load("a")
        assert registry.status()[0]["error"] == "an internal error"
        await registry.load("a")
        assert registry.status()[0]["error"] is None

    run(work, loader)


def test_one_load_at_a_time() -> None:
    loader = FakeLoader()

    async def work(registry: Registry) -> None:
        await asyncio.gather(*(registry.load(name) for name in "abcabc"))

    run(work, loader, "abc")
    assert sorted(loader.loaded) == ["a", "b", "c"]
    assert loader.most_at_once == 1


def test_the_least_recently_used_makes_room() -> None:
    loader = FakeLoader(room=2)

    async def work(registry: Registry) -> None:
        for name in "aba":
            await registry.load(name)
        await registry.load("c")
        assert states(registry) == {"a": "loaded", "b": "unloaded", "c": "loaded"}

    run(work, loader, "abc")
    assert loader.loaded == ["a", "b", "c"]


def test_a_model_in_use_is_not_unloaded() -> None:
    loader = FakeLoader(room=1)

    async def work(registry: Registry) -> None:
        async with registry.acquire("a") as held:
            with pytest.raises(OverloadedError, match="no memory for b"):
                await registry.load("b")
            assert not held.engine._refusing
            waiting = asyncio.create_task(registry.load("b"))
            await asyncio.sleep(0.02)
            assert states(registry) == {"a": "loaded", "b": "loading"}
        await waiting  # as soon as it is released
        assert states(registry) == {"a": "unloaded", "b": "loaded"}

    run(work, loader, room_wait_s=0.3)


def test_a_model_too_large_for_memory_is_tried_when_it_is_alone() -> None:
    loader = FakeLoader(room=9)
    loader.fits = lambda spec: False  # type: ignore[method-assign]

    async def work(registry: Registry) -> None:
        await registry.load("a")
        await registry.load("b")
        assert states(registry) == {"a": "unloaded", "b": "loaded"}

    run(work, loader)


def test_idle_models_are_unloaded() -> None:
    loader = FakeLoader()
    now = 0.0

    async def work(registry: Registry) -> None:
        nonlocal now
        await registry.load("a")
        async with registry.acquire("b"):
            now = 10.0
            await registry.unload_idle()
            assert states(registry) == {"a": "unloaded", "b": "loaded"}  # b is in use
        now = 19.9
        await registry.unload_idle()
        assert states(registry)["b"] == "loaded"
        now = 20.0
        await registry.unload_idle()
        assert states(registry)["b"] == "unloaded"
        await registry.load("b")
        assert registry.is_ready

    run(work, loader, idle_unload_s=10.0, clock=lambda: now)
    assert loader.loaded == ["a", "b", "b"]


def test_idle_models_are_looked_for() -> None:
    async def work(registry: Registry) -> None:
        await registry.load("a")
        await until(lambda: states(registry)["a"] == "unloaded")

    run(work, FakeLoader(), idle_unload_s=0.02)


def test_unloading_waits_for_requests() -> None:
    loader = FakeLoader()

    async def work(registry: Registry) -> None:
        async with registry.acquire("a") as held:
            leaving = asyncio.create_task(registry.unload("a"))
            await asyncio.sleep(0.01)
            late = asyncio.create_task(registry.load("a"))  # gets the next one
            await asyncio.sleep(0.01)
            assert not leaving.done()
            assert not late.done()
            assert (await asyncio.to_thread(held.engine.generate, ask([1]))).usage.completion_tokens == 10
        await leaving
        await late
        assert states(registry)["a"] == "loaded"

    run(work, loader)
    assert loader.loaded == ["a", "a"]


def test_unloading_does_not_wait_for_ever() -> None:
    async def work(registry: Registry) -> None:
        async with registry.acquire("a") as held:
            stream = held.engine.submit(ask([1], LONG))
            await registry.unload("a")
            with pytest.raises(EngineClosedError, match="the model was unloaded"):
                await asyncio.to_thread(stream.result)
            with pytest.raises(EngineClosedError, match="the model was unloaded"):
                held.engine.submit(ask([1]))
        await registry.load("a")

    run(work, FakeLoader(), drain_s=0.05)


def test_another_recipe() -> None:
    loader = FakeLoader()

    async def work(registry: Registry) -> None:
        await registry.load("a")
        async with registry.acquire("a"):
            change = asyncio.create_task(registry.re_isq("a", "8"))
            await asyncio.sleep(0.02)
            assert not change.done()
        await change
        assert registry.status()[0]["isq"] == "8"
        with pytest.raises(UsageError):
            await registry.re_isq("a", "nonsense")  # before anything is given up
        assert states(registry)["a"] == "loaded"
        loader.faults = [ModelError("no memory")]
        with pytest.raises(ModelError):
            await registry.re_isq("a", "4")
        assert registry.status()[0]["isq"] == "8"
        await registry.load("a")

    run(work, loader)
    assert loader.recipes == [None, "8", "8"]


def test_a_client_that_leaves_a_change_half_way() -> None:
    loader = FakeLoader()

    async def work(registry: Registry) -> None:
        await registry.load("a")
        loader.gate.clear()
        loader.entered.clear()
        change = asyncio.create_task(registry.re_isq("a", "4"))
        await until(loader.entered.is_set)
        change.cancel()
        with suppress(asyncio.CancelledError):
            await change
        loader.gate.set()
        await registry.load("a")
        assert registry.status()[0]["isq"] == "4"

    run(work, loader)
    assert loader.recipes == [None, "4"]


def test_names() -> None:
    specs = [ModelSpec("org/first", "x", ("gpt",)), ModelSpec("second", "y")]

    async def work() -> None:
        registry = Registry(specs, FakeLoader())
        assert registry.names == ["org/first", "second"]
        assert [registry.resolve(name) for name in ("org/first", "gpt", "default")] == ["org/first"] * 3
        assert registry.status()[0]["aliases"] == ["default", "gpt"]
        with pytest.raises(
            UnknownModelError, match=r"no model 'gpt-5' here: .*org/first, gpt, second, default"
        ) as caught:
            registry.resolve("gpt-5")
        assert (caught.value.http_status, caught.value.code) == (404, "model_not_found")
        with pytest.raises(UnknownModelError) as caught:
            registry.resolve("x" * 10_000)
        assert len(str(caught.value)) < 300
        with pytest.raises(UsageError, match="two models are called x"):
            Registry([ModelSpec("x", "1"), ModelSpec("x", "2")], FakeLoader())
        with pytest.raises(UsageError, match="no model to serve"):
            Registry([], FakeLoader())
        own = Registry([ModelSpec("x", "1"), ModelSpec("default", "2")], FakeLoader())
        assert own.resolve("default") == "default"
        for each in (registry, own):
            await each.close()

    asyncio.run(work())
