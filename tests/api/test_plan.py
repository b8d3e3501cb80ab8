"""What fields mean to the engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.agent.tools import NamedTool
from mlxvlm.api.base import parse
from mlxvlm.api.plan import ChatPlan, chat_plan
from mlxvlm.api.schema import IGNORED_FIELDS, ChatCompletionRequest
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import RequestError
from mlxvlm.messages import ImageOptions, ImagePart, Message, TextPart, ToolCall, assistant, system, user
from tests.api.toy_tools import ToyFormat

USER = {"role": "user", "content": "Hello"}
DEFAULTS = SamplingParams(temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1)
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
HEAR = {"type": "function", "function": {"name": "hear", "strict": True}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def plan(**fields: Any) -> ChatPlan:
    body = parse(ChatCompletionRequest, {"messages": [USER], **fields})
    return chat_plan(body, DEFAULTS, ToyFormat())


def asked(**fields: Any) -> Request:
    return plan(**fields).requests[0]


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        plan(**fields)
    return caught.value


def test_what_is_left_out_is_the_checkpoints() -> None:
    assert asked() == Request([user("Hello")], DEFAULTS)


# Each field with what it changes in the engine's request.
EFFECTS: dict[str, tuple[Any, Any]] = {
    **{
        name: (0.25, lambda r, name=name: getattr(r.sampling, name) == 0.25)
        for name in ("temperature", "top_p", "min_p")
    },
    **{
        name: (0.25, lambda r, name=name: getattr(r.sampling, name) == 0.25)
        for name in ("typical_p", "xtc_probability", "xtc_threshold", "presence_penalty", "frequency_penalty")
    },
    **{
        name: (2, lambda r, name=name: getattr(r.sampling, name) == 2)
        for name in ("top_k", "repetition_penalty", "dry_multiplier", "dry_base", "seed", "max_tokens")
    },
    "dry_allowed_length": (3, lambda r: r.sampling.dry_allowed_length == 3),
    "dry_sequence_breakers": (["x"], lambda r: r.sampling.dry_sequence_breakers == ["x"]),
    "ignore_eos": (True, lambda r: r.sampling.ignore_eos),
    "max_completion_tokens": (5, lambda r: r.sampling.max_tokens == 5),
    "logit_bias": ({"7": 1.5}, lambda r: r.sampling.logit_bias == {7: 1.5}),
    "logprobs": (True, lambda r: r.sampling.top_logprobs == 0),
    "grammar": ({"type": "lark", "value": "x"}, lambda r: r.sampling.grammar == Grammar("lark", "x")),
    "response_format": ({"type": "json_object"}, lambda r: r.sampling.grammar == Grammar("json_object")),
    "min_pixels": (9, lambda r: r.image_options == ImageOptions(min_pixels=9)),
    "max_pixels": (9, lambda r: r.image_options == ImageOptions(max_pixels=9)),
    "timeout": (1.5, lambda r: r.timeout_s == 1.5),
    "enable_thinking": (False, lambda r: r.template == {"enable_thinking": False}),
    "reasoning_effort": ("low", lambda r: r.template == {"reasoning_effort": "low"}),
    "chat_template_kwargs": ({"a": [1]}, lambda r: r.template == {"a": [1]}),
    "tools": ([LOOK], lambda r: r.template == {"tools": ["look"]}),
    "stop": (["a", "b"], lambda r: r.sampling.stop == ["a", "b"]),
}
# Tested where they act: with other fields, in answers, in the server.
ELSEWHERE = {
    *("messages", "model", "n", "top_logprobs", "stream", "stream_options", "return_token_ids", "truncate_sequence"),
    *("tool_choice", "parallel_tool_calls", "web_search_options", "modalities", "store"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_each_field_has_its_effect(name: str) -> None:
    value, has_effect = EFFECTS[name]
    assert has_effect(asked(**{name: value}))
    assert not has_effect(asked())


def test_every_field_is_honoured_or_said_to_be_ignored() -> None:
    ignored = {name for name in IGNORED_FIELDS if "." not in name}
    assert {*EFFECTS, *ELSEWHERE, *ignored} == set(ChatCompletionRequest.model_fields)


def test_ignored_fields_change_nothing() -> None:
    values = {"metadata": {"a": "b"}, "verbosity": "low"}
    for name in (name for name in IGNORED_FIELDS if "." not in name):
        assert asked(**{name: values.get(name, "x")}) == asked()


def test_the_order_of_parts_and_turns_is_kept() -> None:
    picture = {"type": "image_url", "image_url": {"url": "a.png"}}
    text = {"type": "text", "text": "and"}
    request = asked(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [text, picture, {"type": "image_url", "image_url": "b.png"}, text]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            {"role": "system", "content": [text]},
        ]
    )
    assert request.messages == [
        system("Be kind."),
        Message("user", (TextPart("and"), ImagePart("a.png"), ImagePart("b.png"), TextPart("and"))),
        assistant("A cat."),
        system("and"),
    ]


def test_calls_and_their_results() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "1", "content": "a cat"},
    ]
    body = parse(ChatCompletionRequest, {"messages": messages})
    assert chat_plan(body, DEFAULTS).requests[0].messages == [
        user("Hello"),
        Message("assistant", (), (ToolCall("1", "look", "{}"),)),
        Message("tool", (TextPart("a cat"),), tool_call_id="1"),
    ]
    assert asked(messages=messages).messages[1] == assistant("<look:{}>"), "the format has the last word"
    messages[2]["tool_call_id"] = "2"
    assert refused(messages=messages).param == "messages[2].tool_call_id"


@given(st.integers(1, 16), st.integers(-(2**63), 2**64 - 1))
def test_choices_have_seeds_of_their_own(n: int, seed: int) -> None:
    seeds = [request.sampling.seed for request in plan(n=n, seed=seed).requests if request.sampling]
    assert seeds == [seed + i for i in range(n)]


def test_without_a_seed_there_is_none() -> None:
    assert [r.sampling.seed for r in plan(n=2).requests if r.sampling] == [None, None]


def test_schemas() -> None:
    def grammar(strict: Any, schema: Any = SCHEMA) -> Grammar | None:
        form = {"name": "x", "schema": schema, "strict": strict}
        sampling = asked(response_format={"type": "json_schema", "json_schema": form}).sampling
        return sampling.grammar if sampling else None

    assert grammar(True) == Grammar("json_schema", SCHEMA)
    assert grammar(False) == grammar(None) == Grammar("json_schema", {"x-guidance": {"lenient": True}, **SCHEMA})
    own = {"x-guidance": {"lenient": False}}
    assert grammar(False, own) == Grammar("json_schema", own)
    assert grammar(True, None) == Grammar("json_object")
    assert asked(response_format={"type": "text"}) == asked()


def test_tool_choices() -> None:
    both = {"tools": [LOOK, HEAR]}
    assert [tool.name for tool in plan(**both).tools] == ["look", "hear"]
    assert plan(**both).tools[1].strict
    assert plan(**both, tool_choice="none").parser() is None
    assert not plan(**both).is_constrained
    named = plan(**both, tool_choice={"type": "function", "function": {"name": "hear"}})
    assert named.requests[0].sampling is not None
    assert named.requests[0].sampling.grammar == ToyFormat().grammar(named.tools, NamedTool("hear"))
    assert named.is_constrained
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "hear"}}]}
    allowed = plan(**both, tool_choice={"type": "allowed_tools", "allowed_tools": some}, parallel_tool_calls=False)
    assert [tool.name for tool in allowed.tools] == ["hear"]
    assert allowed.requests[0].sampling is not None
    assert allowed.requests[0].sampling.grammar == Grammar("regex", r"(<(hear):\{\}>)")
    assert allowed.max_calls == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"tools": [LOOK, LOOK]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "hear"}}}, "tool_choice"),
        ({"tools": [LOOK], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [LOOK], "grammar": {"type": "lark", "value": "x"}}, "grammar"),
        ({"response_format": {"type": "json_object"}, "grammar": {"type": "lark", "value": "x"}}, "grammar"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ],
)
def test_fields_that_exclude_each_other(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_without_a_format_tools_are_refused() -> None:
    body = parse(ChatCompletionRequest, {"messages": [USER], "tools": [LOOK]})
    with pytest.raises(RequestError) as caught:
        chat_plan(body, DEFAULTS)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(("choice", "shown"), [("auto", {7}), ("none", set())])
def test_markers_are_shown_to_a_parser_only(choice: str, shown: set[int]) -> None:
    class Marked(ToyFormat):
        visible_token_ids = frozenset([7])

    body = parse(ChatCompletionRequest, {"messages": [USER], "tools": [LOOK], "tool_choice": choice})
    plan = chat_plan(body, DEFAULTS, Marked())
    sampling = plan.requests[0].sampling
    assert sampling is not None
    assert set(sampling.visible_token_ids) == shown
    assert (plan.parser() is None) == (not shown)
