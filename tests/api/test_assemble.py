"""Deltas to chunks to whole answers, against slow twins."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.api.answers import ChatCompletionChunk
from mlxvlm.api.assemble import ChatAssembler, ChoiceAssembler
from mlxvlm.api.usage import total_usage
from mlxvlm.engine.request import Delta, FinishReason, TokenLogprob, Usage
from mlxvlm.errors import InternalError
from tests.api.toy_tools import CALL, ToyParser

END = 0  # the end token
USAGE = Usage(10, 5, 3, 0.5, 1.0, 2.0, 1.5, 4.0, 4)
TEXT = "".join


def token_bytes(token_id: int) -> bytes:
    return b"</s>" if token_id == END else "\u00e9".encode()[:1] if token_id == 233 else chr(token_id).encode()


def deltas_of(pieces: list[str], reason: FinishReason = "stop") -> list[Delta]:
    """One Delta a piece, its first letter's code as its token, and an end token."""
    deltas = [Delta(piece, (ord(piece[0]),), (TokenLogprob(ord(piece[0]), -0.5, ((65, -0.1),)),)) for piece in pieces]
    return [*deltas, Delta("", (END,), (TokenLogprob(END, -0.1),), reason, USAGE)]


def assembler(n: int = 1, *, tools: bool = False, rich: bool = False, max_calls: int | None = None) -> ChatAssembler:
    choices = [
        ChoiceAssembler(
            index,
            token_bytes if rich else None,
            frozenset({END}),
            ToyParser() if tools else None,
            max_calls=max_calls,
            with_token_ids=rich,
        )
        for index in range(n)
    ]
    return ChatAssembler(choices, "demo")


def as_json(chunk: ChatCompletionChunk) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(chunk.model_dump_json())
    return found


def accumulated(chunks: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """The slow twin of WholeChoice: what a client makes of the events' JSON."""
    wholes = [{"text": "", "calls": {}, "ids": [], "tokens": [], "reason": None} for _ in range(n)]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole: dict[str, Any] = wholes[choice["index"]]
        assert whole["reason"] is None, "nothing comes after the end"
        whole["text"] += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                whole["calls"][call["index"]] = [call["id"], call["function"]["name"], ""]
            whole["calls"][call["index"]][2] += call["function"]["arguments"]
        whole["ids"] += choice.get("token_ids", [])
        whole["tokens"] += (choice["logprobs"] or {"content": []})["content"]
        whole["reason"] = choice["finish_reason"]
    return wholes


PIECES = st.lists(st.text("ab<>f:{}", min_size=1, max_size=5), max_size=8)


@given(st.lists(PIECES, min_size=1, max_size=3), st.booleans(), st.booleans(), st.randoms())
def test_streamed_is_whole_is_the_slow_twin(answers: list[list[str]], tools: bool, rich: bool, random: Any) -> None:
    n = len(answers)
    left = [list(map(lambda delta, i=i: (i, delta), deltas_of(pieces))) for i, pieces in enumerate(answers)]
    order = []
    while any(left):
        order.append(random.choice([each for each in left if each]).pop(0))
    streaming = assembler(n, tools=tools, rich=rich)
    chunks = [as_json(chunk) for chunk in streaming.first([1, 2])]
    chunks += [as_json(chunk) for item in order for chunk in streaming.feed(*item)]
    whole = assembler(n, tools=tools, rich=rich).whole(order, [1, 2], with_logprobs=rich, with_token_ids=rich)
    for index, (got, pieces) in enumerate(zip(accumulated(chunks, n), answers, strict=True)):
        text, calls = TEXT(pieces), []
        if tools:
            calls = [[f"call_{i}", *found] for i, found in enumerate(CALL.findall(text))]
            text = CALL.sub("", text)
        assert got["text"] == text
        assert list(got["calls"].values()) == calls
        assert got["reason"] == ("tool_calls" if calls else "stop")
        assert got["ids"] == ([*(ord(piece[0]) for piece in pieces), END] if rich else [])
        assert [each["token"] for each in got["tokens"]] == ([piece[0] for piece in pieces] if rich else [])
        choice = json.loads(whole.model_dump_json())["choices"][index]
        assert (choice["message"]["content"] or "") == text
        assert (choice["message"]["content"] is None) == (not text and bool(calls))
        made = [[each["id"], *each["function"].values()] for each in choice["message"].get("tool_calls", ())]
        assert made == calls
        assert choice["finish_reason"] == got["reason"]
        assert choice.get("token_ids", []) == got["ids"]
        assert (choice["logprobs"] or {"content": []})["content"] == got["tokens"]
    assert chunks[0]["prompt_token_ids"] == whole.prompt_token_ids == [1, 2]


def test_the_first_chunks_say_who_speaks_and_the_last_what_it_cost() -> None:
    streaming = assembler(2)
    assert [as_json(chunk)["choices"][0]["delta"] for chunk in streaming.first()] == [
        {"role": "assistant", "content": ""}
    ] * 2
    for index in range(2):
        for delta in deltas_of(["a"]):
            last = [as_json(chunk) for chunk in streaming.feed(index, delta)]
        assert last[-1]["choices"] == [{"index": index, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    usage = as_json(streaming.last())
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize(("reason", "told"), [("length", "length"), ("timeout", "length"), ("cancelled", "length")])
def test_reasons_to_end(reason: FinishReason, told: str) -> None:
    whole = assembler(tools=True).whole([(0, delta) for delta in deltas_of(["<f:1>", "x"], reason)])
    assert whole.choices[0].finish_reason == told
    assert whole.choices[0].message.content == "x"


def test_calls_beyond_the_limit_are_passed_over() -> None:
    whole = assembler(tools=True, max_calls=1).whole([(0, delta) for delta in deltas_of(["<f:1><g:2>"])])
    assert [call.function.name for call in whole.choices[0].message.tool_calls or ()] == ["f"]


def test_an_answer_without_an_end_is_a_defect() -> None:
    with pytest.raises(InternalError):
        assembler().whole([(0, Delta("a"))])


def test_a_piece_of_a_character_has_exact_bytes() -> None:
    delta = Delta("", (233,), (TokenLogprob(233, -1.0),))
    piece = as_json(assembler(rich=True).feed(0, delta)[0])["choices"][0]
    assert piece["delta"] == {}
    assert piece["logprobs"]["content"] == [{"token": "\ufffd", "bytes": [0xC3], "logprob": -1.0, "top_logprobs": []}]


def test_an_end_token_that_the_limit_cut_off_is_part_of_the_answer() -> None:
    delta = Delta("x", (END,), (TokenLogprob(END, -1.0),), "length", USAGE)
    found = assembler(rich=True).whole([(0, delta)], with_logprobs=True)
    assert found.choices[0].logprobs is not None
    assert len(found.choices[0].logprobs.content or ()) == 1


def test_usage_counts_the_prompt_once_and_answers_all() -> None:
    other = Usage(10, 3, 3, 0.5, 3.0, 1.0, 0.5, 3.5, 8)
    usage = total_usage([USAGE, other])
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 8, 18)
    assert (usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens_details.image_tokens) == (4, 3)
    assert (usage.total_time_sec, usage.total_prompt_time_sec, usage.total_completion_time_sec) == (4.0, 3.0, 2.0)
    assert (usage.time_to_first_token_sec, usage.avg_tok_per_sec) == (0.5, 18 / 4)
    assert (usage.avg_prompt_tok_per_sec, usage.avg_compl_tok_per_sec) == (6 / 1.0, (4 + 2) / 2.0)
    alone = total_usage([USAGE])
    assert alone.avg_compl_tok_per_sec == USAGE.completion_tokens_per_s
    assert total_usage([Usage(1, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)]).avg_tok_per_sec == 0.0
