"""A forced call that a limit cuts off: text in a whole answer, a broken call where it was streamed already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from mlxvlm.agent.formats import tool_format
from mlxvlm.agent.loop import BoundTool
from mlxvlm.agent.reader import is_json
from mlxvlm.agent.tools import Tool
from mlxvlm.engine.engine import Engine
from mlxvlm.server.app import create_app
from mlxvlm.server.models import SingleModel
from mlxvlm.server.tool_rounds import ServerTools
from tests.server.serving import client_of, serving

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "size": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["color", "size"],
    "additionalProperties": False,
}
FUNCTION = {"name": "paint", "parameters": SCHEMA}


@pytest.fixture(scope="module")
def client(calling_url: str) -> Iterator[openai.OpenAI]:
    with client_of(calling_url) as client:
        yield client


def test_in_chats(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": FUNCTION}
    fields: Any = {"model": "demo", "messages": HELLO, "tools": [tool], "tool_choice": "required"}
    seen = set()
    for max_tokens in range(24, 54, 3):
        [choice] = client.chat.completions.create(**fields, max_tokens=max_tokens).choices
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == "length"
        assert all(is_json(call.function.arguments) for call in calls)  # type: ignore[union-attr]
        chunks: list[Any] = [*client.chat.completions.create(**fields, max_tokens=max_tokens, stream=True)]
        pieces = [call.function for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        told = "".join(piece.arguments for piece in pieces)
        assert chunks[-1].choices[0].finish_reason == "length"
        if not calls:
            assert (choice.message.content or "").endswith(told), "nothing of it is lost"
        seen.add((bool(calls), bool(told)))
    assert {(False, False), (False, True)} <= seen


def test_in_responses(client: openai.OpenAI) -> None:
    tool = {"type": "function", **FUNCTION}
    chosen = {"type": "function", "name": "paint"}

    def respond(input: Any = "Hello!", **fields: Any) -> Any:
        return client.responses.create(model="default", input=input, **fields)

    fields: Any = {"tools": [tool], "tool_choice": chosen, "max_output_tokens": 42}
    whole = respond(**fields)
    assert [item.type for item in whole.output] == ["message"]
    assert (whole.status, '"name": "paint"' in whole.output_text) == ("incomplete", True)
    *_, last = respond(stream=True, **fields)
    (call,) = last.response.output
    assert (last.type, call.type, call.status) == ("response.incomplete", "function_call", "incomplete")
    assert whole.output_text.endswith(call.arguments), "nothing of it is lost"
    assert not is_json(call.arguments)
    for kept in (whole, last.response):
        respond("Go on.", previous_response_id=kept.id, tools=[tool], max_output_tokens=4)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Done."}
    with pytest.raises(openai.BadRequestError, match="names a call that nothing before it makes"):
        respond([result], previous_response_id=last.response.id)


def test_in_messages(calling_url: str) -> None:
    tool: Any = {"name": "paint", "input_schema": SCHEMA}
    fields: Any = {
        "model": "default",
        "messages": HELLO,
        "tools": [tool],
        "tool_choice": {"type": "tool", "name": "paint"},
        "max_tokens": 42,
    }
    with anthropic.Anthropic(api_key="EMPTY", base_url=calling_url, max_retries=0, timeout=60) as client:
        whole: Any = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            written = "".join(event.partial_json for event in stream if event.type == "input_json")
            final = stream.get_final_message()
    (block,) = whole.content
    assert (whole.stop_reason, block.type, '"name": "paint"' in block.text) == ("max_tokens", "text", True)
    (use,) = final.content
    assert (final.stop_reason, use.type) == ("max_tokens", "tool_use")
    assert written
    assert block.text.endswith(written), "nothing of it is lost"


def test_of_a_tool_that_the_server_answers(demo_engine: Engine) -> None:
    """Nobody is told of such a call as it grows: cut off, it is text in a stream too."""
    format = tool_format(demo_engine.processor.template, demo_engine.processor.tokenizer)
    tools = ServerTools(mcp=(BoundTool(Tool("paint", "Paints.", SCHEMA), lambda arguments: "Done."),))
    fields: Any = {"model": "demo", "messages": HELLO, "max_tokens": 42}
    fields["tool_choice"] = {"type": "function", "function": {"name": "paint"}}
    with serving(create_app(SingleModel("demo", demo_engine, format), tools=tools)) as url, client_of(url) as client:
        [choice] = client.chat.completions.create(**fields).choices
        chunks: list[Any] = [*client.chat.completions.create(**fields, stream=True)]
    assert choice.finish_reason == "length"
    assert '"name": "paint"' in str(choice.message.content)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
