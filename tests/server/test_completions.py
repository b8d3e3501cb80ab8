"""Texts to go on with: the official client against the demo model, and the pieces on paper."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.api.base import parse
from mlxvlm.api.completions import CompletionAssembler, CompletionRequest, TextChoice, completion_plan
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Delta, Request, TokenLogprob, Usage
from mlxvlm.errors import RequestError
from mlxvlm.processors.base import Prompt

TEXT = "What do you see? A red"
USAGE = Usage(10, 4, 0, 0.0, 1.0, 2.0, 0.5, 3.0, cached_tokens=2)


def create(client: openai.OpenAI, prompt: Any = TEXT, **fields: Any) -> Any:
    return client.completions.create(model="default", prompt=prompt, **fields)


def streamed(client: openai.OpenAI, count: int, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    wholes: list[dict[str, Any]] = [{"text": "", "reason": None, "tokens": [], "ids": []} for _ in range(count)]
    for event in create(client, prompt, stream=True, **fields):
        for choice in event.choices:
            whole = wholes[choice.index]
            whole["text"] += choice.text
            whole["reason"] = choice.finish_reason or whole["reason"]
            whole["tokens"] += choice.logprobs.tokens if choice.logprobs else []
            whole["ids"] += getattr(choice, "token_ids", None) or []
    return wholes


def wholes_of(answer: Any) -> list[dict[str, Any]]:
    return [
        {
            "text": choice.text,
            "reason": choice.finish_reason,
            "tokens": choice.logprobs.tokens if choice.logprobs else [],
            "ids": getattr(choice, "token_ids", None) or [],
        }
        for choice in answer.choices
    ]


def test_the_text_itself_is_gone_on_with(client: openai.OpenAI, demo_engine: Engine) -> None:
    ids = tuple(demo_engine.processor.tokenizer.encode_prompt(TEXT))
    alone = demo_engine.generate(Request(sampling=SamplingParams(max_tokens=9), prompt=Prompt(ids)))
    answer = create(client, max_tokens=9)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == alone.text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(alone.token_ids))
    assert create(client, list(ids), max_tokens=9).choices[0].text == alone.text
    assert create(client, extra_body={"ignore_eos": True}).usage.completion_tokens == 16, "as OpenAI's default is"


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        (TEXT, {}),
        ([TEXT, "Once"], {"n": 2, "temperature": 2.0, "seed": 3}),
        ([[5, 6, 7], [8, 9]], {"echo": True}),
        (TEXT, {"logprobs": 2, "extra_body": {"return_token_ids": True}}),
        (TEXT, {"stop": ["e"], "logprobs": 0}),
    ],
)
def test_streamed_is_whole(client: openai.OpenAI, prompt: Any, fields: dict[str, Any]) -> None:
    whole = wholes_of(create(client, prompt, **fields))
    assert streamed(client, len(whole), prompt, **fields) == whole


def test_several_prompts_are_several_requests(client: openai.OpenAI) -> None:
    alone = [create(client, text, temperature=1.5, seed=4, n=2) for text in (TEXT, "Once upon")]
    both = create(client, [TEXT, "Once upon"], temperature=1.5, seed=4, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [each.text for one in alone for each in one.choices]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(both.usage, name) == sum(getattr(one.usage, name) for one in alone)


def test_echo(client: openai.OpenAI, demo_engine: Engine) -> None:
    plain = create(client).choices[0].text
    assert create(client, echo=True).choices[0].text == TEXT + plain
    ids = demo_engine.processor.tokenizer.encode_prompt(TEXT)
    assert create(client, ids, echo=True).choices[0].text == TEXT + plain


def test_logprobs_in_their_old_shape(client: openai.OpenAI) -> None:
    choice = create(client, logprobs=3, max_tokens=6).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [sum(map(len, told.tokens[:index])) for index in range(len(told.tokens))]
    assert all(len(top) == 3 and top[token] == value for token, value, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ))  # fmt: skip
    assert all(value <= 0 and math.isfinite(value) for value in told.token_logprobs)
    assert create(client, logprobs=0, max_tokens=6).choices[0].logprobs.top_logprobs is None


def test_usage_in_streams(client: openai.OpenAI) -> None:
    *_, last = create(client, ["a", "bc"], stream=True, stream_options={"include_usage": True}, max_tokens=3)
    assert last.choices == []
    assert last.usage.completion_tokens <= 6
    assert last.usage.prompt_tokens == create(client, ["a", "bc"], max_tokens=3).usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "."}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"surprise": 2}, "surprise"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1 << 31]}, "prompt[0]"),
        ({"prompt": [1.0]}, "prompt[0]"),
        ({"prompt": [60_000]}, "prompt"),
        ({"prompt": "Hello! " * 9999}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"grammar": {"type": "regex", "value": "("}}, "grammar"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_pixels": 100}, "max_pixels"),
        ({"messages": []}, "messages"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
    ],
)
def test_refusals_name_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str | None) -> None:
    prompt = fields.pop("prompt", TEXT)
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, prompt, extra_body=fields, max_tokens=fields.pop("max_tokens", 1))
    assert caught.value.param == param


def test_a_text_that_can_t_fit_is_not_read_to_its_end(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt has 1,000,000 characters") as caught:
        create(client, "word " * 200_000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_a_prompt_of_nothing() -> None:
    body = parse(CompletionRequest, {"prompt": ""})
    with pytest.raises(RequestError, match="empty") as caught:
        completion_plan(body, SamplingParams(), lambda text: [], lambda ids: "")
    assert caught.value.param == "prompt"


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, -1.0, ((token, -1.0), (token + 1, -2.0)))


@given(st.text(max_size=12), st.lists(st.integers(0, 12), max_size=6), st.booleans())
def test_pieces_of_characters(text: str, cuts: list[int], ends: bool) -> None:
    """Tokens of one byte each, in Deltas cut anywhere."""
    data = text.encode("utf-8", "ignore")
    body = parse(CompletionRequest, {"prompt": "p", "logprobs": 2})

    def assembler() -> CompletionAssembler:
        choice = TextChoice(0, lambda token: bytes([token]), frozenset({300}), body, "")
        return CompletionAssembler([choice], "m", 1, with_usage=False)

    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    tokens = [list(data[start:end]) for start, end in pairwise(places)] or [[]]
    deltas = [Delta("", tuple(each), tuple(map(logprob, each))) for each in tokens]
    last = [logprob(300)] if ends else []
    deltas.append(Delta(data.decode(), (300,) * ends, tuple(last), "stop" if ends else "length", USAGE))
    [choice] = assembler().whole([(1,)], [(0, delta) for delta in deltas]).choices
    told = choice.logprobs
    assert (told is None) == (not data)
    if told is not None:
        assert len(told.tokens) == len(data)
        # The slow twin: where a byte's character begins, or where the one before it ended.
        assert told.text_offset == [len(data[:index].decode("utf-8", "ignore")) for index in range(len(data))]
        assert all(word.startswith("bytes:\\x") or len(word) == 1 for word in told.tokens)
