"""Streams in threads and in event loops."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mlxvlm.engine.request import Delta, Request, Usage
from mlxvlm.engine.stream import Stream, collect
from mlxvlm.errors import InputError, InternalError
from mlxvlm.messages import Message, TextPart
from tests.fakes import FakeModel, Gate, answer, ask, eventually, fake_engine

USAGE = Usage(1, 1, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
LAST = Delta("c", (3,), (), "stop", USAGE)


def test_deltas_come_in_order_and_once() -> None:
    stream = Stream(lambda: None)
    for delta in (Delta("a", (1,)), Delta("b", (2,)), LAST):
        stream.put(delta)
    assert [delta.text for delta in stream] == ["a", "b", "c"]
    assert list(stream) == []


def test_a_thread_that_waits_is_woken() -> None:
    stream = Stream(lambda: None)
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(delta.text for delta in stream))
    reader.start()
    stream.put(Delta("a"))
    stream.put(LAST)
    reader.join(10)
    assert seen == ["a", "c"]


def test_an_error_is_raised_after_what_came_before() -> None:
    stream = Stream(lambda: None)
    stream.put(Delta("a"))
    stream.put(InputError("no"))
    iterator = iter(stream)
    assert next(iterator).text == "a"
    with pytest.raises(InputError):
        next(iterator)


def test_a_result_is_the_joined_deltas() -> None:
    completion = collect([Delta("a", (1,)), LAST])
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("ac", (1, 3), "stop")
    with pytest.raises(InternalError):
        collect([Delta("a")])


def test_coroutines_read_side_by_side() -> None:
    async def read(engine, number: int) -> list[int]:
        return [token async for delta in engine.submit(ask([number], 9)) for token in delta.token_ids]

    async def main() -> list[list[int]]:
        with fake_engine() as engine:
            return await asyncio.gather(*(read(engine, number) for number in range(1, 6)))

    assert asyncio.run(main()) == [answer([number], 9) for number in range(1, 6)]


def test_a_coroutine_that_leaves_cancels_its_request() -> None:
    async def main() -> None:
        with fake_engine() as engine:
            stream = engine.submit(ask([1], 4000))
            deltas = aiter(stream)
            await anext(deltas)
            await deltas.aclose()
            # The next one has to wait for nothing: the row is gone.
            assert [token async for delta in engine.submit(ask([2], 3)) for token in delta.token_ids] == answer([2], 3)
            assert eventually(lambda: not engine._open)

    asyncio.run(main())


def test_leaving_early_cancels() -> None:
    cancelled: list[bool] = []
    stream = Stream(lambda: cancelled.append(True))
    stream.put(Delta("a"))

    async def main() -> None:
        async for _ in stream:
            break

    asyncio.run(main())
    assert cancelled == [True]


def test_reading_to_the_end_does_not_cancel() -> None:
    cancelled: list[bool] = []
    stream = Stream(lambda: cancelled.append(True))
    stream.put(LAST)

    async def main() -> list[str]:
        return [delta.text async for delta in stream]

    assert asyncio.run(main()) == ["c"]
    assert cancelled == []


def test_the_event_loop_runs_while_the_model_does() -> None:
    gate = Gate()

    async def main() -> None:
        with fake_engine(FakeModel(on_call=gate)) as engine:
            task = asyncio.ensure_future(anext(aiter(engine.submit(ask([1], 2)))))
            while not gate.entered.is_set():
                await asyncio.sleep(0.001)
            assert not task.done()
            gate.opened.set()
            assert (await task).token_ids == (2,)

    asyncio.run(main())


def test_a_loop_that_closes_meanwhile_does_no_harm() -> None:
    class ClosingLoop:
        def call_soon_threadsafe(self, callback: object) -> None:
            raise RuntimeError("Event loop is closed")

    stream = Stream(lambda: None)
    stream._waiter = (ClosingLoop(), asyncio.Event())  # type: ignore[assignment]
    stream.put(LAST)
    assert [delta.text for delta in stream] == ["c"]


def test_a_reader_whose_loop_is_gone_does_no_harm() -> None:
    stream = Stream(lambda: None)

    async def wait_once() -> None:
        reader = asyncio.ensure_future(anext(aiter(stream)))
        await asyncio.sleep(0)
        reader.cancel()

    asyncio.run(wait_once())
    stream.put(LAST)
    assert [delta.text for delta in stream] == ["c"]


def test_the_prompts_ids_are_known_before_the_first_delta() -> None:
    gate = Gate()

    async def main() -> None:
        with fake_engine(FakeModel(on_call=gate)) as engine:
            stream = engine.submit(ask([1, 2], 3))
            await asyncio.wait_for(stream.prepared(), 20)
            assert stream.prompt_token_ids == (1, 2)
            gate.opened.set()
            tokens = [token async for delta in stream for token in delta.token_ids]
            assert tokens == answer([1, 2], 3)

    asyncio.run(main())


def test_what_ends_before_it_is_prepared_has_no_ids() -> None:
    async def main() -> None:
        with fake_engine() as engine:
            stream = engine.submit(Request([Message("user", (TextPart("refuse"),))]))
            await asyncio.wait_for(stream.prepared(), 20)
            assert stream.prompt_token_ids is None
            with pytest.raises(InputError):
                [delta async for delta in stream]

    asyncio.run(main())
