"""The official anthropic client against the demo model over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest

from mlxvlm.server.answering import Patience
from mlxvlm.server.guard import Guard
from mlxvlm.server.settings import ServerSettings
from tests.fakes import FakeModel, Gate, answer, eventually, fake_engine, is_empty
from tests.server.asgi import fetch
from tests.server.serving import client_of
from tests.server.test_chat import PICTURE, create, look
from tests.server.test_leaving import LONG, HeldProcessor, connected, read_until, served, slow

DATA = base64.b64encode(PICTURE.read_bytes()).decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
HELLO = [{"role": "user", "content": "Hello!"}]
TOOL: dict[str, Any] = {
    "name": "paint",
    "description": "Paints.",
    "input_schema": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "size": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["color", "size"],
        "additionalProperties": False,
    },
}


def anthropics(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key="EMPTY", base_url=url, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(calling_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropics(calling_url) as client:
        yield client


def ask(client: anthropic.Anthropic, messages: Any = HELLO, max_tokens: int = 32, **fields: Any) -> Any:
    return client.messages.create(model="default", messages=messages, max_tokens=max_tokens, **fields)


def shown(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def told(message: Any) -> dict[str, Any]:
    """What a message says, without what is its own each time."""
    fields: dict[str, Any] = json.loads(message.model_dump_json(exclude={"id"}))
    spent = fields["usage"]  # what was cached depends on what was asked before
    spent["input_tokens"] += spent.pop("cache_read_input_tokens")
    for block in fields["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    fields.pop("parsed_output", None)
    return fields


def test_it_answers_as_chat_completions_do(client: anthropic.Anthropic, calling_url: str) -> None:
    message = ask(client, shown(IMAGE, text("What do you see?")))
    with client_of(calling_url) as other:
        chat = create(other, look(str(PICTURE)), max_tokens=32)
    assert message.content[0].text == chat.choices[0].message.content
    assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, "demo")
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert usage.output_tokens == chat.usage.completion_tokens
    by_url = shown({"type": "image", "source": {"type": "url", "url": str(PICTURE)}}, text("What do you see?"))
    assert told(ask(client, by_url)) == told(message)


def test_a_whole_chat(client: anthropic.Anthropic, calling_url: str) -> None:
    messages = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, text("Hello.")]},
        {"role": "user", "content": [{**text("Who"), "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": " are you?"},
    ]
    message = ask(
        client,
        messages,
        system=[{**text("Be"), "cache_control": {"type": "ephemeral"}}, text("brief.")],
        metadata={"user_id": "me"},
        thinking={"type": "disabled"},
        extra_headers={"anthropic-beta": "anything-2025-01-01"},
    )
    chat = [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]
    with client_of(calling_url) as other:
        whole = create(other, chat, max_tokens=32)
    assert message.content[0].text == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "end_turn"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"extra_body": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 4}, "max_tokens": 9}, None),
        ({"stop_sequences": ["never", "picture"]}, "stop_sequence"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 99},
            "tool_use",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "paint"}, "max_tokens": 99}, "tool_use"),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, "end_turn"),
    ],
)
def test_streamed_is_whole(client: anthropic.Anthropic, fields: dict[str, Any], reason: str | None) -> None:
    whole = ask(client, **fields)
    if reason is not None:
        assert whole.stop_reason == reason
    with client.messages.stream(**{"model": "default", "messages": HELLO, "max_tokens": 32, **fields}) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert told(final) == told(whole)
    names = [event.type for event in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop") == len(whole.content)


def test_a_stop_sequence_is_told(client: anthropic.Anthropic) -> None:
    message = ask(client, stop_sequences=["never", "picture"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "picture")
    assert "picture" not in message.content[0].text
    assert ask(client, stop_sequences=["never"]).stop_sequence is None


def test_tools_from_the_use_to_the_answer(client: anthropic.Anthropic, calling_url: str) -> None:
    chosen = {"type": "tool", "name": "paint"}
    first = ask(client, [{"role": "user", "content": "Paint!"}], tools=[TOOL], tool_choice=chosen, max_tokens=99)
    (use,) = first.content
    assert (use.type, use.name, use.input["color"] in ("red", "blue")) == ("tool_use", "paint", True)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [text("Broken."), IMAGE], "is_error": True}
    turns = [{"role": "user", "content": "Paint!"}, {"role": "assistant", "content": first.content}]
    message = ask(client, [*turns, *shown(result, text("What do you see?"))], tools=[TOOL], max_tokens=12)
    call = {"id": use.id, "type": "function", "function": {"name": "paint", "arguments": json.dumps(use.input)}}
    chat = [
        {"role": "user", "content": "Paint!"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": use.id, "content": "Error:\nBroken."},
        *look(str(PICTURE)),
    ]
    function = {"name": "paint", "description": "Paints.", "parameters": TOOL["input_schema"]}
    with client_of(calling_url) as other:
        whole = create(other, chat, tools=[{"type": "function", "function": function}], max_tokens=12)
    assert message.content[0].text == whole.choices[0].message.content
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == whole.usage.prompt_tokens


def test_structured_output(client: anthropic.Anthropic) -> None:
    class Answer(pydantic.BaseModel):
        is_star: bool

    parsed = client.messages.parse(model="default", messages=HELLO, max_tokens=40, output_format=Answer)  # type: ignore[arg-type]
    assert isinstance(parsed.parsed_output, Answer)


@pytest.mark.parametrize("messages", [HELLO, shown(IMAGE, text("What do you see?"))], ids=["text", "picture"])
def test_tokens_are_counted(client: anthropic.Anthropic, messages: Any) -> None:
    fields = {"system": "Be brief.", "tools": [TOOL]}
    count = client.messages.count_tokens(model="default", messages=messages, **fields)  # type: ignore[arg-type]
    usage = ask(client, messages, max_tokens=1, **fields).usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    long = client.messages.count_tokens(model="default", messages=shown(text("la " * 4000)))  # type: ignore[arg-type]
    assert long.input_tokens > 4000, "also what would not fit"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"extra_body": {"n": 2}}, "n:"),
        ({"extra_body": {"stop": "x"}}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": "hot"}}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "--enable-search"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "the last message"),
        ({"messages": shown({"type": "tool_result", "tool_use_id": "x", "content": "y"})}, "messages[0].content[0]"),
        ({"messages": shown({"type": "document", "source": {}})}, "document"),
        ({"messages": shown({**IMAGE, "source": {"type": "file", "file_id": "x"}})}, "file"),
        ({"messages": shown({**IMAGE, "source": {**IMAGE["source"], "data": "AAAA"}})}, "picture"),
        ({"messages": shown(text("la " * 4000))}, "context"),
        ({"messages": HELLO * 1025}, "more than 1024 parts"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_named(
    client: anthropic.Anthropic, fields: dict[str, Any], words: str, stream: bool
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{"model": "default", "messages": HELLO, "max_tokens": 9, "stream": stream, **fields})
    error = caught.value.body
    assert isinstance(error, dict)
    assert set(error) == {"type", "error"}
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert words in error["error"]["message"] or words == "picture"


def test_other_errors(client: anthropic.Anthropic, calling_url: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude", messages=HELLO, max_tokens=5)  # type: ignore[arg-type]
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    assert httpx2.get(f"{calling_url}/v1/messages").json()["type"] == "error"
    missing = httpx2.post(f"{calling_url}/v1/messages", json={"model": "default", "messages": HELLO})
    assert (missing.status_code, "max_tokens" in missing.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(("path", "key"), [("/v1/messages", "type"), ("/v1/models", "error")])
def test_the_guard_speaks_as_the_endpoint_does(path: str, key: str) -> None:
    guard = Guard(None, ServerSettings(api_key="secret"))  # type: ignore[arg-type]
    reply = fetch(guard, "GET", path, {"host": "localhost:1234", "x-api-key": "wrong"})
    assert (reply.status, next(iter(json.loads(reply.body)))) == (401, key)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    engine = fake_engine(FakeModel(on_call=slow))
    body = {"model": "fake", "messages": [{"role": "user", "content": "12"}], "max_tokens": LONG, "stream": stream}
    with served(engine) as url:
        with connected(url, body, path="/v1/messages"):
            assert eventually(lambda: engine.stats().generated_tokens > 30)
        assert eventually(lambda: is_empty(engine))
        assert engine.stats().generated_tokens < LONG


def test_an_error_in_the_middle_is_an_event() -> None:
    model = FakeModel()
    model.nan_token = answer([1, 2], 3)[-1]
    asked = {"model": "fake", "messages": [{"role": "user", "content": "12"}], "max_tokens": 5}
    with served(fake_engine(model)) as url, anthropics(url) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(client.messages.create(**asked, stream=True))  # type: ignore[call-overload]
        assert caught.value.body["error"]["type"] == "api_error"  # type: ignore[index]
        assert "NaN" not in str(caught.value)
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(**asked)  # type: ignore[call-overload]


def test_silence_is_filled_with_pings() -> None:
    gate = Gate()
    engine = fake_engine(FakeModel(on_call=gate))
    engine.processor = held = HeldProcessor()
    body = {"model": "fake", "messages": [{"role": "user", "content": "12"}], "max_tokens": 5, "stream": True}
    with served(engine, Patience(keep_alive_s=0.02)) as url:
        with connected(url, body, path="/v1/messages") as connection:
            data = read_until(connection, b'event: ping\ndata: {"type":"ping"}\n\n', times=2)
            assert b"message_start" not in data
            held.opened.set()
            data = read_until(connection, b"event: message_start\n", data)
            data = read_until(connection, b"event: ping\n", data, data.count(b"event: ping\n") + 2)
            gate.opened.set()
            data = read_until(connection, b"event: message_stop\n", data)
        assert b"[DONE]" not in data
