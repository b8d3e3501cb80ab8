"""Asks, runs the tools that the answer calls, asks again. Knows neither engine nor door: asking is a function.

A tool's function is somebody else's: whatever it raises, and its running out of time, becomes the call's result, which
the model reads. So does no call end the conversation.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from mlxvlm.agent.tools import Tool
from mlxvlm.errors import InputError, UsageError
from mlxvlm.messages import Message, TextPart, ToolCall
from mlxvlm.processors.base import arguments_of

MAX_ROUNDS = 8  # of calls in one answer
MOST_ROUNDS = 256  # that may be asked for; mistral.rs's limit
MAX_CALLS = 16  # of one round
TIMEOUT_S = 60.0  # of one call
MAX_RESULT_CHARS = 100_000  # about 25,000 tokens
_MAX_ERROR_CHARS = 500

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BoundTool:
    """A tool and what answers it: a function of its arguments, or a coroutine function.

    What it returns is shown to the model: text as it is, all else as JSON.
    """

    tool: Tool
    function: Callable[[dict[str, Any]], Any]
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, and the calls that it wants to have answered."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last answer, and the turns before it that were added to the conversation."""

    answer: Answer
    turns: tuple[Message, ...] = ()


# The turns so far, and whether another round may follow: where none may, tools must not be offered any more.
Ask: TypeAlias = Callable[[Sequence[Message], bool], Awaitable[Answer] | Answer]


def with_callbacks(tools: Sequence[Tool], callbacks: Mapping[str, Callable[..., Any]]) -> list[BoundTool]:
    """mistral.rs's `tool_callbacks`: functions of a tool's name and its arguments. Tools without one are left out."""
    unknown = sorted(callbacks.keys() - {tool.name for tool in tools})
    if unknown:
        raise UsageError(f"there is no tool for the callback {unknown[0]!r}")
    return [BoundTool(tool, partial(callbacks[tool.name], tool.name)) for tool in tools if tool.name in callbacks]


async def run_tools(
    messages: Sequence[Message],
    tools: Sequence[BoundTool],
    ask: Ask,
    *,
    max_rounds: int = MAX_ROUNDS,
    special_tokens: Collection[str] = (),
) -> Outcome:
    """Goes on until an answer has no call that one of `tools` could answer, or `max_rounds` of calls were answered.

    Calls of other tools are left in the answer, for the caller's caller. special_tokens: texts that the tokenizer takes
    as control tokens, which what a tool returns must not hold.
    """
    known = {bound.tool.name: bound for bound in tools}
    if len(known) < len(tools):
        raise UsageError("two tools have the same name")
    turns: list[Message] = []
    for round in range(max_rounds + 1):
        answer = await call(ask, [*messages, *turns], round < max_rounds)
        foreign = tuple(one for one in answer.calls if one.name not in known)
        if foreign or not answer.calls or round == max_rounds:
            return Outcome(replace(answer, calls=foreign), tuple(turns))
        turns += await answered(answer, known, special_tokens)
    raise AssertionError


async def answered(
    answer: Answer, tools: Mapping[str, BoundTool], special_tokens: Collection[str], timeout_s: float = math.inf
) -> list[Message]:
    """The turns that follow a question: the answer with its calls, all of `tools`, and their results, run at once.

    timeout_s: for each call, where its tool would wait longer.
    """
    calls = answer.calls[:MAX_CALLS]
    parts = (TextPart(answer.text),) if answer.text else ()
    results = await asyncio.gather(*(_result(tools[one.name], one, timeout_s) for one in calls))
    texts = [without_special_tokens(result, special_tokens) for result in results]
    told = [Message("tool", (TextPart(text),), tool_call_id=one.id) for one, text in zip(calls, texts, strict=True)]
    return [Message("assistant", parts, calls), *told]


def run_in_thread(coroutine: Callable[[], Awaitable[T]]) -> T:
    """Runs a coroutine to its end, also where a loop runs already (notebooks)."""

    async def body() -> T:
        return await coroutine()

    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(body()))
        except BaseException as error:  # noqa: BLE001 - passed on to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=run, name="mlxvlm-tools", daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


async def call(function: Callable[..., Awaitable[T] | T], *arguments: Any) -> T:
    """Calls a coroutine function, or a function in a thread of its own.

    Not in the loop's pool: one that hangs would keep the process from ending.
    """
    if _is_async(function):
        return await function(*arguments)  # type: ignore[misc, no-any-return]
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            # A future can't hold StopIteration.
            failure = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
        with suppress(RuntimeError):  # the loop may be closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="mlxvlm-tool", daemon=True).start()
    found = await future
    result: T = await found if inspect.isawaitable(found) else found
    return result


def _is_async(function: Callable[..., Any]) -> bool:
    plain = function.func if isinstance(function, partial) else function
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None))  # noqa: B004


async def _result(bound: BoundTool, one: ToolCall, timeout_s: float) -> str:
    """What the model reads of a call."""
    timeout_s = min(bound.timeout_s, timeout_s)
    try:
        arguments = arguments_of(one)
        async with asyncio.timeout(timeout_s):
            return _shown(await call(bound.function, arguments))
    except InputError as error:
        return f"Error: {error}"
    except TimeoutError:
        return f"Error: {one.name} took more than {timeout_s:.3g} s"
    except Exception as error:  # noqa: BLE001 - a tool's function is somebody else's
        return f"Error: {type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_ERROR_CHARS]


def _shown(result: Any) -> str:
    if result is None:
        return ""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    if len(text) > MAX_RESULT_CHARS:
        text = f"{text[:MAX_RESULT_CHARS]}\n(cut: {len(text) - MAX_RESULT_CHARS} characters more)"
    # Half of a surrogate pair is no character, and no tokenizer takes it.
    return text.encode("utf-8", "replace").decode()


def without_special_tokens(text: str, special_tokens: Collection[str]) -> str:
    """Foreign text that can't begin a turn of its own: a space after the first character of what would be a token."""
    if not special_tokens:
        return text
    tokens = sorted((token for token in special_tokens if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)))

    def broken(found: re.Match[str]) -> str:
        return f"{found[0][0]} {pattern.sub(broken, found[0][1:])}"  # a token may hold another

    return pattern.sub(broken, text)
