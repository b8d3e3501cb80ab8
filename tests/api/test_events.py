"""Events of the Responses and Messages APIs: folded, they are the whole answer. And what requests become."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxvlm.api.anthropic.assemble import MessageAssembler
from mlxvlm.api.anthropic.convert import chat_request as of_messages
from mlxvlm.api.anthropic.request import MessagesRequest
from mlxvlm.api.base import parse
from mlxvlm.api.responses.answers import ResponseError
from mlxvlm.api.responses.assemble import ResponseAssembler
from mlxvlm.api.responses.convert import chat_request as of_responses
from mlxvlm.api.responses.convert import turns_of
from mlxvlm.api.responses.request import ResponsesRequest
from mlxvlm.api.responses.shown import response_of
from mlxvlm.engine.request import Delta, FinishReason, TokenLogprob
from mlxvlm.errors import RequestError
from tests.api.test_assemble import USAGE, assembler, deltas_of

BODY = parse(ResponsesRequest, {"input": "Hello!"})
# Words, calls and beginnings of calls.
PIECES = st.lists(st.sampled_from(["a", "b c", "<", "f", ":", "{}", ">", '<f:{"x": 1}>', "<g:{}>"]), max_size=10)
REASONS = st.sampled_from(["stop", "length"])
PROMPT = [(1, 2, 3)]


def as_json(events: Any) -> list[dict[str, Any]]:
    return [json.loads(event.model_dump_json()) for event in events]


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


def response_events(pieces: list[str], reason: FinishReason, rich: bool) -> list[dict[str, Any]]:
    made = ResponseAssembler(assembler(tools=True, rich=rich), response_of(BODY, "demo"))
    events = as_json(made.begin())
    for delta in deltas_of(pieces, reason):
        events += as_json(made.feed(0, delta))
    events += as_json(made.end())
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


@given(PIECES, REASONS, st.booleans())
def test_a_responses_events_come_to_what_is_not_streamed(pieces: list[str], reason: FinishReason, rich: bool) -> None:
    events = response_events(pieces, reason, rich)
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "content_part.added":
            items[-1]["content"].append(event["part"])
        elif kind == "output_text.delta":
            part = items[event["output_index"]]["content"][event["content_index"]]
            part["text"] += event["delta"]
            part["logprobs"] += event["logprobs"]
        elif kind == "function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            said = [part["text"] for part in event["item"].get("content", ())]
            assert said == [part["text"] for part in items[-1].get("content", ())]
            items[-1] = {**items[-1], "content": event["item"]["content"]} if said else items[-1]
            assert items[-1] == event["item"]
    final = events[-1]["response"]
    assert items == final["output"]
    whole = ResponseAssembler(assembler(tools=True, rich=rich), response_of(BODY, "demo"))
    told = json.loads(whole.whole(PROMPT, [(0, delta) for delta in deltas_of(pieces, reason)]).model_dump_json())
    assert without_ids(told["output"]) == without_ids(items)
    assert told["usage"] == final["usage"]
    assert [item["status"] for item in items[:-1]] == ["completed"] * (len(items) - 1)
    ended = "completed" if reason == "stop" else "incomplete"
    assert (final["status"], items[-1]["status"]) == (ended, ended)
    # Nothing is lost or told twice: text and calls, as chat completions have them.
    choice = assembler(tools=True).whole([(0, delta) for delta in deltas_of(pieces, reason)]).choices[0]
    texts = [part["text"] for item in items for part in item.get("content", ())]
    assert "".join(texts) == (choice.message.content or "")
    calls = [(item["name"], item["arguments"]) for item in items if item["type"] == "function_call"]
    assert calls == [(each.function.name, each.function.arguments) for each in choice.message.tool_calls or ()]


def as_object(arguments: str) -> Any:
    """What is no JSON comes from the toy parser alone."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


@given(PIECES, REASONS)
@example(["<", "f", ":", ":", ">"], "stop")
def test_a_messages_events_come_to_what_is_not_streamed(pieces: list[str], reason: FinishReason) -> None:
    deltas = deltas_of(pieces, reason)
    made = MessageAssembler(assembler(tools=True), "demo")
    events = as_json(made.begin(PROMPT))
    events += [event for delta in deltas for event in as_json(made.feed(0, delta))]
    events += as_json(made.end())
    message = events[0]["message"]
    blocks = message["content"]
    open_block: int | None = None
    inputs: dict[int, str] = {}
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert (open_block, event["index"]) == (None, len(blocks))
            open_block = event["index"]
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
            if event["delta"]["type"] == "text_delta":
                blocks[-1]["text"] += event["delta"]["text"]
            else:
                inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"]["partial_json"]
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = as_object(inputs.get(event["index"], ""))
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    assert open_block is None
    whole = MessageAssembler(assembler(tools=True), "demo").whole(PROMPT, [(0, delta) for delta in deltas])
    told = json.loads(whole.model_dump_json())
    assert without_ids(told["content"]) == without_ids(blocks)
    assert {**message, "id": "", "content": []} == {**told, "id": "", "content": []}
    assert message["usage"] == {
        "input_tokens": 6,
        "output_tokens": 5,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 0,
    }


def test_a_response_that_fails_keeps_what_was_said() -> None:
    made = ResponseAssembler(assembler(), response_of(BODY, "demo"))
    (late,) = list(made.fail(ResponseError(code="server_error", message="x")))[2:]
    assert json.loads(late.model_dump_json())["response"]["status"] == "failed"
    made = ResponseAssembler(assembler(), response_of(BODY, "demo"))
    list(made.begin())
    for delta in deltas_of(["Hel", "lo"])[:2]:
        list(made.feed(0, delta))
    (event,) = as_json(made.fail(ResponseError(code="server_error", message="x")))
    assert event["response"]["output"][0]["content"][0]["text"] == "Hello"
    assert event["response"]["output"][0]["status"] == "incomplete"


def messages_of(chat: Any) -> list[Any]:
    return [json.loads(each.model_dump_json(exclude_none=True)) for each in chat.messages]


def test_calls_and_pictures_of_results_find_their_turns() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output"}
    picture = {"type": "input_image", "image_url": "a.png"}
    items = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "I call."},
        {**call, "call_id": "1"},
        {**call, "call_id": "2", "namespace": None, "caller": None},
        {**output, "call_id": "1", "output": [{"type": "input_text", "text": "seen"}, picture]},
        {**output, "call_id": "2", "output": "done"},
    ]
    body = parse(ResponsesRequest, {"input": items, "instructions": "Be brief."})
    roles = [each["role"] for each in messages_of(of_responses(body, turns_of(body)))]
    assert roles == ["system", "user", "assistant", "tool", "tool", "user"]
    messages = messages_of(of_responses(body, turns_of(body)))
    assert [each["id"] for each in messages[2]["tool_calls"]] == ["1", "2"]
    assert (messages[2]["content"], messages[3]["content"]) == ("I call.", "seen")
    assert messages[5]["content"] == [{"type": "image_url", "image_url": "a.png"}]


def test_a_users_message_of_anthropics_is_results_then_the_rest() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "a.png"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [image]}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"é": 1}}]},
        {"role": "user", "content": [{"type": "text", "text": "here"}, result]},
    ]
    chat = messages_of(of_messages(parse(MessagesRequest, {"model": "m", "max_tokens": 5, "messages": messages})))
    assert [each["role"] for each in chat] == ["user", "assistant", "tool", "user"]
    assert chat[1]["tool_calls"][0]["function"]["arguments"] == '{"é": 1}'
    assert chat[3]["content"] == [{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "here"}]


def test_base64_is_never_a_path() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "etc/passwd"}}
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": [image]}]}
    (message,) = messages_of(of_messages(parse(MessagesRequest, body)))
    assert message["content"][0]["image_url"] == "data:image/png;base64,etc/passwd"


@pytest.mark.parametrize("shape", [ResponsesRequest, MessagesRequest])
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["input", "messages", "model", "max_tokens", "role", "content", "type", "tools", "text"]
                ),
                inner | st.sampled_from(["user", "message", "function", "tool_result", "text", "assistant"]),
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_nonsense_is_refused(shape: Any, body: Any) -> None:
    """With a RequestError and nothing else, or it is a request."""
    with suppress(RequestError):
        made = parse(shape, body)
        if shape is MessagesRequest:
            of_messages(made)
        else:
            of_responses(made, turns_of(made))


def tokens_of(events: list[dict[str, Any]]) -> list[list[str]]:
    items = events[-1]["response"]["output"]
    return [[token["token"] for token in part["logprobs"]] for item in items for part in item.get("content", ())]


def test_logprobs_are_those_of_texts_alone() -> None:
    events = response_events(["a", "<f:{}>", "c"], "stop", rich=True)
    assert tokens_of(events) == [["a"], ["c"]]


def test_logprobs_of_a_character_that_was_cut_off_are_kept() -> None:
    made = ResponseAssembler(assembler(rich=True), response_of(BODY, "demo"))
    events = as_json(made.begin())
    half = Delta("", (233,), (TokenLogprob(233, -0.5),))
    for delta in (deltas_of(["a"])[0], half, Delta("\ufffd", finish_reason="length", usage=USAGE)):
        events += as_json(made.feed(0, delta))
    assert tokens_of([*events, *as_json(made.end())]) == [["a", "\ufffd"]]
    made = ResponseAssembler(assembler(rich=True), response_of(BODY, "demo"))
    events = as_json(made.begin())
    for delta in (deltas_of(["a"])[0], half, Delta("", finish_reason="length", usage=USAGE)):
        events += as_json(made.feed(0, delta))
    assert tokens_of([*events, *as_json(made.end())]) == [["a", "\ufffd"]]
