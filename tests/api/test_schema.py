"""What a chat request may be: every wrong one is refused by the field's name, and by nothing but RequestError."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.agent.web_search import MAX_PLACE_CHARS, SearchOptions
from mlxvlm.api.base import MAX_FIELDS, REFUSED_FIELDS, parse
from mlxvlm.api.describing import type_of
from mlxvlm.api.schema import IGNORED_FIELDS, ChatCompletionRequest
from mlxvlm.errors import RequestError

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
# With at least one of every kind of object.
FULL: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief.", "name": "boss"},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                {"type": "image_url", "image_url": "b.png"},
                {"type": "text", "text": "What is this?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "tool_calls": [CALL]},
        {"role": "tool", "content": "a cat", "tool_call_id": "1"},
        USER,
    ],
    "model": "default",
    "temperature": 0.5,
    "stop": ["a", "b"],
    "logit_bias": {"5": -1.5},
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "tools": [TOOL],
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}},
    "web_search_options": {
        "search_context_size": "low",
        "user_location": {"type": "approximate", "approximate": {"city": "Bern"}},
    },
    "grammar": {"type": "regex", "value": "a+"},
    "chat_template_kwargs": {"a": 1},
    "metadata": {"a": "b"},
}
FULL["tool_choice"]["allowed_tools"]["tools"] = [{"type": "function", "function": {"name": "look"}}]
FREE = ("parameters", "schema", "chat_template_kwargs", "metadata", "logit_bias")  # objects of any fields
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(ChatCompletionRequest, {"messages": [USER], **fields})
    return caught.value


def outcome(body: Any) -> ChatCompletionRequest | RequestError:
    try:
        return parse(ChatCompletionRequest, body)
    except RequestError as error:
        return error


def objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects with fields of ours, and where they stand."""
    if isinstance(value, dict):
        yield path, value
        for name, child in value.items():
            if name not in FREE:
                yield from objects(child, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from objects(child, f"{path}[{index}]")


PLACES = [path for path, _ in objects(FULL)]


def at(body: Any, path: str) -> dict[str, Any]:
    return next(value for place, value in objects(body) if place == path)


def test_a_full_request_is_taken() -> None:
    body = parse(ChatCompletionRequest, FULL)
    again = json.loads(body.model_dump_json(exclude_unset=True, by_alias=True))
    assert again == FULL


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("name", ["surprise", "<text>", "0"])
def test_an_unknown_field_is_refused_by_its_path(path: str, name: str) -> None:
    body = copy.deepcopy(FULL)
    at(body, path)[name] = 1
    with pytest.raises(RequestError) as caught:
        parse(ChatCompletionRequest, body)
    assert caught.value.param == (f"{path}.{name}" if path else name)
    assert caught.value.code == "unknown_parameter"
    assert str(caught.value.param) in str(caught.value)


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("value", [[], "text", 5, True, math.nan, {"surprise": {}}])
def test_another_type_is_refused_or_means_something(path: str, value: Any) -> None:
    body = copy.deepcopy(FULL)
    for name in at(body, path):
        changed = copy.deepcopy(FULL)
        at(changed, path)[name] = value
        error = outcome(changed)
        if isinstance(error, RequestError):
            # Another role or type refuses the object as a whole, or what else it holds.
            assert (error.param or "").startswith(path.rpartition(".")[0])


@given(JSON, st.sampled_from(sorted(ChatCompletionRequest.model_fields)))
@settings(max_examples=300, deadline=None)
def test_any_json_is_taken_or_refused(value: Any, name: str) -> None:
    for body in ({"messages": [USER], name: value}, value, {"messages": [{"role": "user", "content": [value]}]}):
        parsed = outcome(body)
        if isinstance(parsed, RequestError):
            assert parsed.http_status == 400
            assert str(parsed)
        else:
            assert all(math.isfinite(each) for each in vars(parsed).values() if isinstance(each, float))


@pytest.mark.parametrize("name", sorted({*ChatCompletionRequest.model_fields, *REFUSED_FIELDS} - {"messages"}))
def test_null_means_not_given(name: str) -> None:
    plain = parse(ChatCompletionRequest, {"messages": [USER]})
    assert parse(ChatCompletionRequest, {"messages": [USER], name: None}) == plain


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_what_cannot_be_honoured_is_refused_with_the_remedy(name: str) -> None:
    error = refused(**{name: {}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert REFUSED_FIELDS[name] in str(error)


def test_ignored_fields_say_so() -> None:
    described = ChatCompletionRequest.model_fields
    for name in (name for name in IGNORED_FIELDS if "." not in name):
        if "[" not in name:
            assert IGNORED_FIELDS[name] in str(described[name].description)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": math.nan}, "temperature", "invalid_value"),
        ({"temperature": math.inf}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"top_k": 10**9}, "top_k", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens", "invalid_type"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"stop": ["x"] * 65}, "stop", "invalid_value"),
        ({"stop": "x" * 257}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "invalid_value"),
        ({"logit_bias": {"05": 1}}, "logit_bias.05", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias", "invalid_value"),
        ({"tools": [TOOL] * 129}, "tools", "invalid_value"),
        ({"messages": [USER] * 4097}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"store": True}, "store", "invalid_value"),
        ({"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]", "invalid_value"),
        ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"grammar": {"type": "ebnf", "value": "x"}}, "grammar.type", "invalid_value"),
    ],
)
def test_wrong_values(fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize("kind", ["input_image", "input_audio", "video_url", "file", "image", "nonsense"])
def test_other_parts_are_refused_by_name(kind: str) -> None:
    error = refused(messages=[{"role": "user", "content": [{"type": kind, kind: "x"}]}])
    assert error.param == "messages[0].content[0]"
    assert "image_url" in str(error) or kind in str(error)


def test_pictures_belong_to_users() -> None:
    part = {"type": "image_url", "image_url": "x"}
    for role in ("system", "developer", "assistant", "tool"):
        error = refused(messages=[{"role": role, "content": [part], "tool_call_id": "1"}])
        assert "user" in str(error) or error.code == "unknown_parameter"


def test_what_an_error_repeats_is_short() -> None:
    assert len(str(refused(**{"x" * 100_000: 1}))) < 500
    assert len(str(refused(**{str(i): 1 for i in range(MAX_FIELDS)}))) < 500
    deep: Any = 5
    for _ in range(5000):
        deep = [deep]
    assert len(str(refused(stop=deep))) < 500


def test_types_in_a_few_words() -> None:
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 2000}
    lists = {"type": "array", "items": ids, "maxItems": 9}
    assert type_of({"anyOf": [{"type": "string"}, lists, {"type": "null"}]}) == (
        "string or list of at most 9 lists of at most 2,000 integers from 0"
    )
    assert type_of({"type": "array", "items": {"enum": ["a", "b"]}}) == "list of `a`, `b`"


@pytest.mark.parametrize("length", [MAX_PLACE_CHARS, MAX_PLACE_CHARS + 1])
def test_a_place_is_as_short_as_a_search_takes_it(length: int) -> None:
    location = {"type": "approximate", "approximate": {"city": "a" * length}}
    if length > MAX_PLACE_CHARS:
        with pytest.raises(RequestError) as caught:
            parse(ChatCompletionRequest, {"messages": [USER], "web_search_options": {"user_location": location}})
        assert caught.value.param == "web_search_options.user_location.approximate.city"
    else:
        body = parse(ChatCompletionRequest, {"messages": [USER], "web_search_options": {"user_location": location}})
        assert body.web_search_options is not None
        SearchOptions.from_openai(body.web_search_options.model_dump(exclude_none=True))
