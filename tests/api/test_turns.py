"""Turns from texts, calls and results in any order: as a twin gathers them that copies a turn for each piece."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.api.base import parse
from mlxvlm.api.messages import MAX_PARTS, TextContent, UserMessage
from mlxvlm.api.responses.convert import turns_of
from mlxvlm.api.responses.request import ResponsesRequest
from mlxvlm.api.turns import Turns, picture
from mlxvlm.errors import RequestError

TEXTS = st.sampled_from(["", "a", "b"])
PARTS = st.lists(st.sampled_from(["text", "picture"]), max_size=3)
STEPS = st.lists(
    st.tuples(st.just("ask"), PARTS)
    | st.tuples(st.just("answer"), TEXTS)
    | st.tuples(st.just("call"), TEXTS)
    | st.tuples(st.just("result"), PARTS)
    | st.tuples(st.just("instruct"), TEXTS),
    max_size=8,
)


class Slow:
    """Plain dicts, and no state but them."""

    def __init__(self, *, joins_users: bool) -> None:
        self.turns: list[dict[str, Any]] = []
        self.waiting: list[str] = []
        self.joins_users = joins_users

    def ask(self, parts: list[str]) -> None:
        shown, self.waiting = [*self.waiting, *parts], []
        if self.joins_users and self.turns and self.turns[-1]["role"] == "user":
            self.turns[-1]["content"] = self.turns[-1]["content"] + shown
        else:
            self.turns.append({"role": "user", "content": shown})

    def instruct(self, text: str) -> None:
        self.show()
        self.turns.append({"role": "system", "content": text})

    def answer(self, text: str) -> None:
        turn = self.models_turn()
        turn["content"] = (turn["content"] or "") + text

    def call(self, text: str) -> None:
        self.models_turn()["calls"].append(text)

    def result(self, parts: list[str]) -> None:
        self.waiting += [part for part in parts if part == "picture"]
        self.turns.append({"role": "tool", "content": "\n".join(part for part in parts if part == "text")})

    def models_turn(self) -> dict[str, Any]:
        self.show()
        if not self.turns or self.turns[-1]["role"] != "assistant":
            self.turns.append({"role": "assistant", "content": None, "calls": []})
        return self.turns[-1]

    def show(self) -> None:
        if self.waiting:
            self.ask([])


def take(turns: Turns, kind: str, value: Any) -> None:
    shown = [picture("x") if part == "picture" else TextContent(type="text", text=part) for part in value]
    if kind == "ask":
        turns.ask(shown)
    elif kind == "call":
        turns.call("id", "f", value)
    elif kind == "result":
        turns.result("id", shown)
    else:
        getattr(turns, kind)(value)


def plain(message: Any) -> dict[str, Any]:
    if message.role == "user":
        return {"role": "user", "content": ["text" if part.type == "text" else "picture" for part in message.content]}
    told = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        told["calls"] = [call.function.arguments for call in message.tool_calls or ()]
    return told


@given(STEPS, STEPS, st.booleans())
def test_as_the_slow_twin(first: Any, second: Any, joins_users: bool) -> None:
    """In one go, and gone on with what came before."""
    slow, whole = Slow(joins_users=joins_users), Turns(joins_users=joins_users)
    for kind, value in [*first, *second]:
        getattr(slow, kind)(value)
        take(whole, kind, value)
    slow.show()
    assert [*map(plain, whole.messages())] == slow.turns
    begun = Turns()
    for kind, value in first:
        take(begun, kind, value)
    earlier = begun.messages()
    further, slow = Turns(earlier), Slow(joins_users=False)
    for kind, value in first:
        getattr(slow, kind)(value)
    slow.show()
    for kind, value in second:
        getattr(slow, kind)(value)
        take(further, kind, value)
    slow.show()
    assert [*map(plain, further.messages())] == slow.turns


@pytest.mark.timeout(20)
def test_many_long_pieces_take_no_time() -> None:
    """Over a minute where each copies those before it."""
    items: list[Any] = [{"role": "assistant", "content": "x" * 10_000}] * 4000
    [turn] = turns_of(parse(ResponsesRequest, {"input": items}))
    assert len(str(turn.content)) == 40_000_000


def test_turns_that_are_one_are_no_larger_than_one_may_be() -> None:
    turns = Turns(joins_users=True)
    part = [TextContent(type="text", text="a")]
    for _ in range(MAX_PARTS):
        turns.ask(part)
    [turn] = turns.messages()
    assert isinstance(turn, UserMessage)
    assert len(turn.content) == MAX_PARTS
    turns = Turns(joins_users=True)
    for _ in range(MAX_PARTS + 1):
        turns.ask(part)
    with pytest.raises(RequestError, match="more than 1024 parts"):
        turns.messages()
