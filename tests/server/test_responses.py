"""The official openai client's responses against the demo model over HTTP."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pydantic
import pytest

from mlxvlm.agent.formats import tool_format
from mlxvlm.engine.engine import Engine
from mlxvlm.server import responses
from mlxvlm.server.answering import Patience
from mlxvlm.server.app import create_app
from mlxvlm.server.models import SingleModel
from tests.fakes import FakeModel, Gate, answer, eventually, fake_engine, is_empty
from tests.server.serving import client_of, serving
from tests.server.test_chat import PICTURE, create, look
from tests.server.test_leaving import LONG, HeldProcessor, connected, read_until, served, slow, text_of

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "paint",
    "description": "Paints.",
    "parameters": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    },
    "strict": True,
}


async def read_bytes(source: str) -> Any:
    return base64.b64decode(source.split(",")[-1]) if source.startswith("data:") else Path(source).read_bytes()


@pytest.fixture(scope="module")
def url(demo_engine: Engine) -> Iterator[str]:
    tools = tool_format(demo_engine.processor.template, demo_engine.processor.tokenizer)
    with serving(create_app(SingleModel("demo", demo_engine, tools), fetch_picture=read_bytes)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


def ask(client: openai.OpenAI, input: Any = "Hello!", **fields: Any) -> Any:
    return client.responses.create(model="default", input=input, **fields)


def shown(path: Path, question: str = "What do you see?") -> list[dict[str, Any]]:
    data = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [{"type": "input_image", "image_url": data}, {"type": "input_text", "text": question}]
    return [{"role": "user", "content": content}]


def told(response: Any) -> dict[str, Any]:
    """What a response says, without what is its own each time."""
    fields = json.loads(response.model_dump_json(exclude={"id", "created_at", "completed_at", "usage"}))
    for item in fields["output"]:
        del item["id"]
        item.pop("call_id", None)
        item.pop("parsed_arguments", None)
        for part in item.get("content", ()):
            part.pop("parsed", None)
    return fields


def test_it_answers_as_chat_completions_do(client: openai.OpenAI) -> None:
    chat = create(client, look(str(PICTURE)), max_tokens=32)
    response = ask(client, shown(PICTURE), max_output_tokens=32)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.model, response.error) == ("completed", "demo", None)
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.usage.input_tokens_details.image_tokens == 16
    assert response.usage.avg_tok_per_sec > 0


def test_instructions_and_items_are_a_chat(client: openai.OpenAI) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello!"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello.", "annotations": []}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "user", "content": "Who are you?"},
    ]
    whole = create(client, chat, max_tokens=24)
    response = ask(client, items, instructions="Be brief.", max_output_tokens=24)
    assert response.output_text == whole.choices[0].message.content
    assert response.usage.input_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 3},
        {"temperature": 1.2, "extra_body": {"seed": 5, "top_k": 20}, "max_output_tokens": 12},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 8},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "paint"}},
        {"extra_body": {"stop": ["picture"]}, "metadata": {"a": "b"}, "user": "me"},
        {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 20},
    ],
)
def test_streamed_is_whole(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = ask(client, **fields)
    events = list(ask(client, stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert told(last.response) == told(whole)
    assert folded(events) == last.response.output
    if whole.status == "completed":
        with client.responses.stream(model="default", input="Hello!", **fields) as stream:
            assert told(stream.get_final_response()) == told(whole)


def folded(events: list[Any]) -> list[Any]:
    """The slow twin: the output that the pieces come to."""
    items: list[Any] = []
    said: list[str] = []
    logprobs: list[Any] = []
    for event in events:
        if event.type == "response.output_item.added":
            assert event.output_index == len(items)
            items.append(event.item)
            said, logprobs = [], []
        elif event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
            assert (event.item_id, event.output_index) == (items[-1].id, len(items) - 1)
            said.append(event.delta)
            logprobs += [each.token for each in getattr(event, "logprobs", None) or ()]
        elif event.type == "response.output_text.done":
            assert event.text == "".join(said)
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == "".join(said)
        elif event.type == "response.output_item.done":
            assert event.item.id == items[-1].id
            items[-1] = event.item
            if event.item.type == "message":
                (part,) = event.item.content
                assert part.text == "".join(said)
                assert [each.token for each in part.logprobs][: len(logprobs)] == logprobs
            else:
                assert event.item.arguments == "".join(said)
    return items


def test_logprobs(client: openai.OpenAI) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 8}
    part = ask(client, **fields).output[0].content[0]
    assert "".join(each.token for each in part.logprobs).strip() == part.text.strip()
    assert all(len(each.top_logprobs) == 2 for each in part.logprobs)
    assert not ask(client, max_output_tokens=8).output[0].content[0].logprobs
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, top_logprobs=2)
    assert caught.value.param == "top_logprobs"


def test_what_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = ask(client, max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output[0].status, response.completed_at) == ("incomplete", None)


def test_the_clients_parse(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        color: str = pydantic.Field(pattern="^(red|orange|blue)$")

    parsed = client.responses.parse(model="default", input="Which?", text_format=Answer, max_output_tokens=40)
    assert isinstance(parsed.output_parsed, Answer)


def test_tools_from_the_call_to_the_answer(client: openai.OpenAI) -> None:
    first = ask(client, "Paint!", tools=[TOOL], tool_choice={"type": "function", "name": "paint"})
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "paint", "completed")
    assert json.loads(call.arguments)["color"] in ("red", "blue")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Done."}
    by_name = ask(client, [result], previous_response_id=first.id, tools=[TOOL], max_output_tokens=12)
    by_hand = ask(client, [{"role": "user", "content": "Paint!"}, call, result], tools=[TOOL], max_output_tokens=12)
    by_dump = ask(
        client, [{"role": "user", "content": "Paint!"}, call.model_dump(), result], tools=[TOOL], max_output_tokens=12
    )
    assert told(by_name)["output"] == told(by_hand)["output"] == told(by_dump)["output"]
    assert by_name.usage.input_tokens == by_hand.usage.input_tokens == by_dump.usage.input_tokens


def test_a_chat_goes_on_from_a_stored_response(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    shutil.copy(PICTURE, path)
    picture = {"type": "input_image", "image_url": str(path)}
    content = [picture, {"type": "input_text", "text": "What do you see?"}]
    first = ask(client, [{"role": "user", "content": content}], instructions="Be brief.", max_output_tokens=32)
    path.unlink()
    second = ask(client, "And the color?", previous_response_id=first.id, max_output_tokens=16)
    chat = [*look(str(PICTURE)), {"role": "assistant", "content": first.output_text}]
    whole = create(client, [*chat, {"role": "user", "content": "And the color?"}], max_tokens=16)
    assert second.output_text == whole.choices[0].message.content
    assert second.usage.input_tokens == whole.usage.prompt_tokens, "instructions are not carried over"
    assert second.usage.input_tokens_details.image_tokens == 16
    client.responses.delete(first.id)
    third = ask(client, "Why?", previous_response_id=second.id, max_output_tokens=4)
    assert third.usage.input_tokens_details.image_tokens == 16, "pictures live as long as a response that needs them"
    assert third.previous_response_id == second.id


def test_stored_responses(client: openai.OpenAI) -> None:
    made = ask(client, max_output_tokens=8, metadata={"a": "b"})
    assert client.responses.retrieve(made.id) == made
    assert made.metadata == {"a": "b"}
    client.responses.delete(made.id)
    for use in (
        lambda: client.responses.retrieve(made.id),
        lambda: client.responses.delete(made.id),
        lambda: ask(client, previous_response_id=made.id),
    ):
        with pytest.raises(openai.NotFoundError):
            use()
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ask(client, store=False, max_output_tokens=2).id)
    with client.responses.stream(model="default", input="Hello!", max_output_tokens=40) as stream:
        last = stream.get_final_response()
    assert client.responses.retrieve(last.id).output_text == last.output_text


def test_input_items(client: openai.OpenAI) -> None:
    items = [*shown(PICTURE), {"role": "assistant", "content": "A star."}, {"role": "user", "content": "Why?"}]
    made = ask(client, items, max_output_tokens=2)
    page = client.responses.input_items.list(made.id, order="asc")
    assert [(item.role, item.content[-1].text) for item in page.data] == [
        ("user", "What do you see?"),
        ("assistant", "A star."),
        ("user", "Why?"),
    ]
    assert page.data[0].content[0].image_url is None, "the picture itself is no address"
    one = client.responses.input_items.list(made.id, limit=2)
    assert [item.id for item in one.data] == [item.id for item in reversed(page.data)][:2]
    assert one.has_more
    assert [item.id for item in client.responses.input_items.list(made.id, limit=1)] == [
        item.id for item in reversed(page.data)
    ], "the client turns the pages"


def test_in_the_background(client: openai.OpenAI) -> None:
    whole = ask(client, max_output_tokens=24)
    begun = ask(client, max_output_tokens=24, background=True)
    assert (begun.status, begun.output) == ("queued", [])
    assert eventually(lambda: client.responses.retrieve(begun.id).status == "completed")
    done = client.responses.retrieve(begun.id)
    assert done.output_text == whole.output_text
    assert client.responses.cancel(begun.id) == done
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(whole.id)
    for wrong, words in (({"model": "none"}, "no model"), ({"tools": [{"type": "web_search"}]}, "leave tools out")):
        with pytest.raises(openai.APIStatusError, match=words):
            client.responses.create(**{"model": "demo", "input": "a", "background": True, **wrong})  # type: ignore[call-overload]
    failed = ask(client, shown(Path(__file__)), background=True)
    assert eventually(lambda: client.responses.retrieve(failed.id).status == "failed")
    assert client.responses.retrieve(failed.id).error.code == "invalid_image"


def test_what_runs_in_the_background_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_BACKGROUND", 2)
    engine = fake_engine(FakeModel(on_call=slow))
    with served(engine) as url, client_of(url) as client:
        first, second = (ask(client, "12", max_output_tokens=LONG, background=True) for _ in range(2))
        with pytest.raises(openai.APIStatusError, match="try again"):
            ask(client, "12", background=True)
        assert eventually(lambda: engine.stats().generated_tokens > 10)
        assert client.responses.retrieve(first.id).status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="no answer"):
            ask(client, previous_response_id=first.id)
        assert client.responses.cancel(first.id).status == "cancelled"
        client.responses.delete(second.id)
        assert eventually(lambda: is_empty(engine))
        assert engine.stats().generated_tokens < 2 * LONG
        assert client.responses.retrieve(first.id).status == "cancelled"
        assert ask(client, "12", max_output_tokens=3, background=True).status == "queued"
        assert eventually(lambda: is_empty(engine))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "file_search"}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id"),
        ({"input": []}, "input"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"background": True, "store": False}, "store"),
        ({"background": True, "stream": True}, "stream"),
        (
            {"extra_body": {"grammar": {"type": "regex", "value": "a"}}, "text": {"format": {"type": "json_object"}}},
            "grammar",
        ),
        ({"tools": [TOOL], "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "f", "schema": {"type": "nothing"}}}}, "text.format"),
        ({"tools": [{**TOOL, "parameters": {"properties": {"a": {"type": "nothing"}}}}]}, "tools"),
        ({"input": "Hello! " * 9999}, "input"),
        ({"extra_body": {"logit_bias": {"99999": 1}}}, "logit_bias"),
    ],
)
def test_what_is_refused_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "default", "input": "Hello!", **fields})
    assert caught.value.param == param
    for name in ("response_format", "messages", "max_completion_tokens"):
        assert name not in caught.value.message, "the words of another API"


def test_other_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="Hello!")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, shown(Path(__file__)))
    assert caught.value.code == "invalid_image"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "la " * 4000)
    assert caught.value.code == "context_length_exceeded"
    chat = [{"role": role, "content": "la " * 250} for _ in range(4) for role in ("user", "assistant")]
    cut = ask(client, [*chat, {"role": "user", "content": "Hello!"}], truncation="auto", max_output_tokens=5)
    assert cut.usage.input_tokens < 2048
    made = ask(client, max_output_tokens=2)
    for query in ("order=up", "limit=0", "limit=101", "limit=x", "after=nothing"):
        assert httpx2.get(f"{url}/v1/responses/{made.id}/input_items?{query}").status_code == 400
    assert httpx2.get(f"{url}/v1/responses/{made.id}?stream=true").status_code == 400


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    engine = fake_engine(FakeModel(on_call=slow))
    body = {"input": "12", "max_output_tokens": LONG, "stream": stream}
    with served(engine) as url:
        with connected(url, body, path="/v1/responses"):
            assert eventually(lambda: engine.stats().generated_tokens > 30)
        assert eventually(lambda: is_empty(engine))
        assert engine.stats().generated_tokens < LONG


def test_an_error_in_the_middle_fails_the_response() -> None:
    model = FakeModel()
    model.nan_token = answer([1, 2], 3)[-1]
    with served(fake_engine(model)) as url, client_of(url) as client:
        events = list(ask(client, "12", max_output_tokens=5, stream=True))
        assert [event.type for event in events].count("response.created") == 1
        last = events[-1]
        assert (last.type, last.response.status, last.response.error.code) == (
            "response.failed",
            "failed",
            "server_error",
        )
        assert last.response.output[0].content[0].text == text_of(answer([1, 2], 3))
        assert "NaN" not in last.response.error.message
        assert client.responses.retrieve(last.response.id).status == "failed"
        with pytest.raises(openai.InternalServerError):
            ask(client, "12", max_output_tokens=5)
        begun = ask(client, "12", max_output_tokens=5, background=True)
        assert eventually(lambda: client.responses.retrieve(begun.id).status == "failed")


def test_silence_is_filled_and_late_errors_are_events() -> None:
    gate = Gate()
    engine = fake_engine(FakeModel(on_call=gate))
    engine.processor = held = HeldProcessor()
    body = {"input": "refuse", "stream": True}
    with served(engine, Patience(keep_alive_s=0.02)) as url:
        with connected(url, body, path="/v1/responses") as connection:
            data = read_until(connection, b": keep-alive\n\n", times=2)
            held.opened.set()
            data = read_until(connection, b"event: response.failed\n", data)
            assert data.index(b"response.created") < data.index(b"response.failed")
        gate.opened.set()
