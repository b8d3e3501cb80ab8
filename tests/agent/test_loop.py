"""The bounded loop over calls."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from mlxvlm.agent.loop import (
    MAX_CALLS,
    MAX_RESULT_CHARS,
    Answer,
    BoundTool,
    Outcome,
    run_in_thread,
    run_tools,
    with_callbacks,
    without_special_tokens,
)
from mlxvlm.agent.tools import Tool
from mlxvlm.errors import UsageError
from mlxvlm.messages import Message, ToolCall, user

QUESTION = [user("?")]


def calling(*calls: tuple[str, str], text: str = "") -> Answer:
    return Answer(text, tuple(ToolCall(f"id{i}", name, arguments) for i, (name, arguments) in enumerate(calls)))


class Script:
    """A model that answers from a list; keeps what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[list[Message], bool]] = []

    def __call__(self, messages: Sequence[Message], more: bool) -> Answer:
        self.asked.append((list(messages), more))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def go(script: Any, function: Callable[..., Any], timeout_s: float = 5.0, **options: Any) -> Outcome:
    tools = [BoundTool(Tool("f"), function, timeout_s)]
    return run_in_thread(lambda: run_tools(QUESTION, tools, script, **options))


def result_of(function: Callable[..., Any], arguments: str = "{}", **options: Any) -> str:
    outcome = go(Script(calling(("f", arguments)), Answer("done")), function, **options)
    assert outcome.answer == Answer("done")
    return outcome.turns[-1].text


def test_calls_are_answered_in_order() -> None:
    script = Script(calling(("f", '{"a": 1}'), ("f", '{"a": 2}'), text="Well."), Answer("done"))
    outcome = go(script, lambda arguments: arguments["a"] * 10)
    assert outcome.answer == Answer("done")
    assert [(turn.role, turn.text, turn.tool_call_id) for turn in outcome.turns] == [
        ("assistant", "Well.", None),
        ("tool", "10", "id0"),
        ("tool", "20", "id1"),
    ]
    assert outcome.turns[0].tool_calls == calling(("f", '{"a": 1}'), ("f", '{"a": 2}')).calls
    assert script.asked[1][0] == [*QUESTION, *outcome.turns]


def test_both_kinds_of_functions() -> None:
    async def slow(arguments: dict[str, Any]) -> str:
        await asyncio.sleep(0)
        return "slow"

    class Callable_:  # noqa: N801
        async def __call__(self, arguments: dict[str, Any]) -> str:
            return "object"

    assert result_of(slow) == "slow"
    assert result_of(partial(slow)) == "slow"
    assert result_of(Callable_()) == "object"
    assert result_of(lambda arguments: slow(arguments)) == "slow"
    assert result_of(lambda arguments: threading.current_thread().name) == "mlxvlm-tool"


def test_an_async_model() -> None:
    async def ask(messages: Sequence[Message], more: bool) -> Answer:
        return Answer(str(len(messages)))

    assert go(ask, str).answer.text == "1"


SHOWN = [
    ("text", "text"),
    (None, ""),
    ({"é": [1, None]}, '{"é": [1, null]}'),
    (True, "true"),
    ("\ud800", "?"),
    ({1}, '"{1}"'),
]


@pytest.mark.parametrize(("value", "shown"), SHOWN, ids=[shown for _, shown in SHOWN])
def test_what_the_model_reads(value: Any, shown: str) -> None:
    assert result_of(lambda arguments: value) == shown


def test_long_results_are_cut() -> None:
    text = result_of(lambda arguments: "x" * (MAX_RESULT_CHARS + 7))
    assert text.endswith("x\n(cut: 7 characters more)")
    assert len(text) < MAX_RESULT_CHARS + 50


def raises(error: BaseException) -> Callable[..., Any]:
    def function(arguments: dict[str, Any]) -> Any:
        raise error

    return function


def test_errors_are_results() -> None:
    assert result_of(raises(ValueError("two\nlines"))) == "Error: ValueError: two lines"
    assert result_of(raises(StopIteration())) == "Error: RuntimeError: StopIteration"
    assert len(result_of(raises(ValueError("x" * 9999)))) == 500
    assert result_of(str, "{") == "Error: the arguments of the call of 'f' are no JSON object"
    assert result_of(str, "[]") == "Error: the arguments of the call of 'f' are no JSON object"
    assert result_of(lambda arguments: json.dumps(arguments), "") == "{}"


def test_what_hangs_is_left_alone() -> None:
    forever = threading.Event()

    async def sleep(arguments: dict[str, Any]) -> None:
        await asyncio.sleep(1000)

    assert result_of(sleep, timeout_s=0.01) == "Error: f took more than 0.01 s"
    assert result_of(lambda arguments: forever.wait(), timeout_s=0.01) == "Error: f took more than 0.01 s"
    forever.set()


def test_rounds_are_bounded() -> None:
    script = Script(calling(("f", "{}")))
    outcome = go(script, lambda arguments: "x", max_rounds=3)
    assert [more for _, more in script.asked] == [True, True, True, False]
    assert len(outcome.turns) == 6
    assert not outcome.answer.calls
    assert not go(Script(calling(("f", "{}"))), str, max_rounds=0).turns


def test_calls_of_a_round_are_bounded() -> None:
    outcome = go(Script(calling(*[("f", "{}")] * 99), Answer()), lambda arguments: "x")
    assert len(outcome.turns) == 1 + MAX_CALLS
    assert len(outcome.turns[0].tool_calls) == MAX_CALLS


def test_calls_of_other_tools_are_the_callers() -> None:
    outcome = go(Script(calling(("f", "{}"), ("theirs", "{}"))), raises(AssertionError()))
    assert [call.name for call in outcome.answer.calls] == ["theirs"]
    assert not outcome.turns


def test_results_hold_no_special_tokens() -> None:
    script = Script(calling(("f", "{}")), Answer())
    outcome = go(script, lambda _: "<|eot|><|eot|>a</s>|<|eo", special_tokens=["<|eot|>", "</s>", "a"])
    assert outcome.turns[-1].text == "< |eot|>< |eot|>a< /s>|<|eo"
    assert without_special_tokens("<s>", ()) == "<s>"
    assert without_special_tokens("<a<b>>", ["<a<b>>", "<b>"]) == "< a< b>>", "one inside another"


def test_callbacks() -> None:
    tools = with_callbacks([Tool("f"), Tool("g")], {"f": lambda name, arguments: f"{name}{arguments}"})
    assert [bound.tool.name for bound in tools] == ["f"]
    assert tools[0].function({"a": 1}) == "f{'a': 1}"
    with pytest.raises(UsageError, match="no tool for the callback 'h'"):
        with_callbacks([Tool("f")], {"h": print})


def test_two_of_one_name() -> None:
    tools = [BoundTool(Tool("f"), str), BoundTool(Tool("f"), str)]
    with pytest.raises(UsageError, match="two tools have the same name"):
        run_in_thread(lambda: run_tools(QUESTION, tools, Script(Answer())))


def test_the_models_own_error_is_raised() -> None:
    def ask(messages: Sequence[Message], more: bool) -> Answer:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        go(ask, str)
