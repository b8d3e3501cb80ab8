"""Ways to ask an engine, against a model whose answers can be worked out on paper."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import fields

import pytest

import mlxvlm
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingOptions, SamplingParams
from mlxvlm.errors import InputError, UsageError
from mlxvlm.messages import user
from tests.fakes import FakeTokenizer, answer, ask, eventually, fake_engine, looked

TEXT = "12345"
IDS = FakeTokenizer().encode(TEXT)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with fake_engine(max_rows=2) as engine:
        yield engine


def test_options_are_the_fields_of_sampling() -> None:
    assert list(SamplingOptions.__annotations__) == [each.name for each in fields(SamplingParams)]


def test_all_ways_give_one_answer(engine: Engine) -> None:
    wanted = FakeTokenizer().decode(answer(IDS, 6))

    async def awaited() -> list[str]:
        whole = await engine.agenerate(TEXT, max_tokens=6)
        return [whole.text, "".join([delta.text async for delta in engine.astream(TEXT, max_tokens=6)])]

    texts = [
        engine.generate(TEXT, max_tokens=6).text,
        engine.generate([user(TEXT)], max_tokens=6).text,
        engine.generate(user(TEXT), max_tokens=6).text,
        engine.generate(ask(IDS, 6)).text,
        "".join(delta.text for delta in engine.stream(TEXT, max_tokens=6)),
        next(engine.batch([TEXT], max_tokens=6)).text,
        *asyncio.run(awaited()),
    ]
    assert texts == [wanted] * len(texts)


def test_pictures(engine: Engine) -> None:
    wanted = FakeTokenizer().decode(looked(7, [1, 2], 5))
    for images in (7, [7], (7,)):
        assert engine.generate("12", images, max_tokens=5).text == wanted
    assert engine.generate(user("12", [7]), max_tokens=5).text == wanted


def test_what_is_given_twice(engine: Engine) -> None:
    with pytest.raises(UsageError, match="nothing beside it"):
        engine.generate(ask(IDS, 3), max_tokens=3)
    with pytest.raises(UsageError, match="nothing beside it"):
        engine.generate(ask(IDS, 3), [7])
    with pytest.raises(UsageError, match="pictures in them"):
        engine.generate([user("12")], [7])
    with pytest.raises(TypeError, match="max_token"):
        engine.generate(TEXT, max_token=3)  # type: ignore[call-arg]


def test_a_timeout_is_the_requests(engine: Engine) -> None:
    assert engine.generate(TEXT, timeout_s=1e-6).finish_reason == "timeout"


def test_a_batch_draws_questions_as_room_comes_free(engine: Engine) -> None:
    drawn = 0

    def questions() -> Iterator[str]:
        nonlocal drawn
        for number in range(1, 20):
            drawn += 1
            yield str(number % 10)

    answers = engine.batch(questions(), max_tokens=3)
    assert next(answers).text == FakeTokenizer().decode(answer([1], 3))
    assert drawn == 4  # twice max_rows
    rest = [each.text for each in answers]
    assert rest == [FakeTokenizer().decode(answer([number % 10], 3)) for number in range(2, 20)]


def test_errors_in_a_batch(engine: Engine) -> None:
    mixed = list(engine.batch(["1", "refuse", user("2")], return_errors=True, max_tokens=2))
    assert [type(each) for each in mixed] == [mlxvlm.Completion, InputError, mlxvlm.Completion]
    wrong = list(engine.batch([ask(IDS, 2, temperature=-1.0), ask(IDS, 2)], return_errors=True))
    assert [type(each) for each in wrong] == [UsageError, mlxvlm.Completion]
    with pytest.raises(InputError, match="refused"):
        list(engine.batch(["1", "refuse", "2"], max_tokens=2))


@pytest.mark.parametrize("first", ["refuse", ask(IDS, 1)])
def test_a_batch_that_is_left_ends_the_others(engine: Engine, first: str | mlxvlm.Request) -> None:
    answers = engine.batch([first, ask(IDS, None), ask(IDS, None), ask(IDS, None)])
    if first == "refuse":
        with pytest.raises(InputError):
            next(answers)
    else:
        next(answers)
        answers.close()
    assert eventually(lambda: (engine.stats().running, engine.stats().waiting) == (0, 0))
    assert engine.stats().generated_tokens < 3 * 4000  # which they would say


def test_a_cancelled_task_ends_its_answer(engine: Engine) -> None:
    async def leave() -> None:
        task = asyncio.create_task(engine.agenerate(TEXT))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert eventually(lambda: engine.stats().running == 0)
