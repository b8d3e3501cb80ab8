"""The server's own tools in /v1/responses and /v1/messages, as the official clients see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import openai
import pytest

from mlxvlm.agent.formats import tool_format
from mlxvlm.agent.loop import BoundTool
from mlxvlm.agent.tools import Tool
from mlxvlm.engine.engine import Engine
from mlxvlm.server.app import create_app
from mlxvlm.server.models import SingleModel
from mlxvlm.server.tool_rounds import ServerTools
from tests.scripted import FORMAT, ScriptedEngine, calling, offered_names
from tests.server.serving import client_of, serving
from tests.server.test_tool_rounds import FOUND, SEARCH, searching

QUESTION = "How long do cats sleep?"
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
PLACE = {"type": "approximate", "city": "Berlin", "country": "DE"}
ANSWER = ("Let me look. " + SEARCH, "Sixteen hours [1].")
TOLD = "Let me look.\n\nSixteen hours [1]."
THEIRS: dict[str, Any] = {"type": "object", "properties": {}}
WEB: Any = {"type": "web_search_20250305", "name": "web_search"}


@contextmanager
def served(tools: ServerTools, *rounds: str) -> Iterator[tuple[ScriptedEngine, openai.OpenAI, anthropic.Anthropic]]:
    engine = ScriptedEngine(*rounds)
    with (
        serving(create_app(SingleModel("fake", engine, FORMAT), tools=tools)) as url,
        client_of(url) as client,
        anthropic.Anthropic(api_key="EMPTY", base_url=url, max_retries=0, timeout=60) as other,
    ):
        yield engine, client, other


@pytest.mark.parametrize("kind", ["web_search", "web_search_preview", "web_search_2025_08_26"])
def test_a_response_with_sources(kind: str) -> None:
    tool: Any = {"type": kind, "search_context_size": "low", "user_location": PLACE}
    with served(searching(), *ANSWER, *ANSWER) as (engine, client, _):
        whole: Any = client.responses.create(model="fake", input=QUESTION, tools=[tool])
        events = list(client.responses.create(model="fake", input=QUESTION, tools=[tool], stream=True))
        kept: Any = client.responses.retrieve(whole.id)
    streamed: Any = events[-1].response  # type: ignore[union-attr]
    for response in (whole, kept, streamed):
        [item] = response.output
        [part] = item.content
        assert (part.text, response.status, response.tools[0].type) == (TOLD, "completed", kind)
        [cited] = part.annotations
        assert (cited.type, cited.url, cited.title) == ("url_citation", "https://a.example/cats", "Cats")
        assert part.text[cited.start_index : cited.end_index] == "[1]"
    [added] = [event for event in events if event.type == "response.output_text.annotation.added"]
    assert added.annotation.model_dump() == streamed.output[0].content[0].annotations[0].model_dump()
    assert (added.annotation_index, added.item_id) == (0, streamed.output[0].id)
    assert "sixteen hours a day" in engine.prompts[1]
    assert "Berlin, DE" in str(engine.asked[0])


def test_a_search_can_be_forced_by_its_own_name() -> None:
    with served(searching(), *ANSWER, *ANSWER) as (engine, client, other):
        client.responses.create(
            model="fake", input=QUESTION, tools=[{"type": "web_search"}], tool_choice={"type": "web_search_preview"}
        )
        chosen: Any = {"type": "tool", "name": "web_search"}
        other.messages.create(model="fake", max_tokens=99, messages=ASKED, tools=[WEB], tool_choice=chosen)
    forced = [request.sampling.grammar is not None for request in engine.asked]
    assert forced == [True, False, True, False]


def test_a_message_with_sources() -> None:
    fields: Any = {"model": "fake", "max_tokens": 99, "messages": ASKED, "tools": [{**WEB, "user_location": PLACE}]}
    with served(searching(), *ANSWER, *ANSWER) as (engine, _, client):
        whole: Any = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            final: Any = stream.get_final_message()
    for message in (whole, final):
        [block] = message.content
        assert (block.text, message.stop_reason) == (TOLD, "end_turn")
        [cited] = block.citations
        assert (cited.type, cited.url, cited.title) == ("web_search_result_location", "https://a.example/cats", "Cats")
    assert "Berlin, DE" in str(engine.asked[0])


def test_searches_are_bounded_by_the_request() -> None:
    found: list[str] = []

    def search(query: str) -> Any:
        found.append(query)
        return FOUND

    with served(searching(search), SEARCH, SEARCH, "Done.") as (engine, _, client):
        client.messages.create(model="fake", max_tokens=99, messages=ASKED, tools=[{**WEB, "max_uses": 1}])
    assert found == ["cats"]
    assert "no search is left of 1" in engine.prompts[2]


def test_the_clients_tools_come_back_beside_a_search() -> None:
    function: Any = {"type": "function", "name": "theirs", "parameters": THEIRS}
    tool: Any = {"name": "theirs", "input_schema": THEIRS}
    called = (SEARCH, "See [1]. " + calling("theirs", "{}"))
    with served(searching(), *called, *called) as (engine, client, other):
        response: Any = client.responses.create(model="fake", input=QUESTION, tools=[{"type": "web_search"}, function])
        message: Any = other.messages.create(model="fake", max_tokens=99, messages=ASKED, tools=[WEB, tool])
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.stop_reason == "tool_use"
    assert offered_names(engine.asked[0]) == ["theirs", "search_the_web", "website_content_extractor"]


def test_mcp_tools_are_for_all_doors() -> None:
    bound = BoundTool(Tool("clock", "Tells the time."), lambda arguments: "It is noon.")
    rounds = (calling("clock", "{}"), "Noon.")
    with served(ServerTools(mcp=(bound,)), *rounds, *rounds) as (engine, client, other):
        assert client.responses.create(model="fake", input="When?").output_text == "Noon."
        message: Any = other.messages.create(model="fake", max_tokens=99, messages=ASKED)
    assert message.content[0].text == "Noon."
    assert all("It is noon." in engine.prompts[index] for index in (1, 3))


def test_without_the_flag_and_with_what_searches_have_not() -> None:
    with served(ServerTools()) as (_, client, other):
        for tools, words in (
            ([{"type": "web_search"}], "--enable-search"),
            ([{"type": "web_search"}] * 2, "two tools search"),
            ([{"type": "web_search", "filters": {"allowed_domains": ["a"]}}], "domains"),
            ([{"type": "mcp", "server_label": "x"}], "--mcp-config"),
            ([{"type": "file_search"}], "give a function"),
        ):
            with pytest.raises(openai.BadRequestError, match=words) as caught:
                client.responses.create(model="fake", input="a", tools=tools)
            assert str(caught.value.param).startswith("tools")
            assert "web_search_options" not in caught.value.message
        for tool, words in (
            (WEB, "--enable-search"),
            ({**WEB, "allowed_domains": ["a"]}, "domains"),
            ({"type": "bash_20250124", "name": "bash"}, "web_search_20250305"),
        ):
            with pytest.raises(anthropic.BadRequestError, match=words):
                other.messages.create(model="fake", max_tokens=9, messages=ASKED, tools=[tool])


def test_tokens_are_counted_with_the_servers_tools(demo_engine: Engine) -> None:
    format = tool_format(demo_engine.processor.template, demo_engine.processor.tokenizer)
    with (
        serving(create_app(SingleModel("demo", demo_engine, format), tools=searching())) as url,
        anthropic.Anthropic(api_key="EMPTY", base_url=url, max_retries=0, timeout=60) as client,
    ):
        counted = client.messages.count_tokens(model="demo", messages=ASKED, tools=[WEB])
        alone = client.messages.count_tokens(model="demo", messages=ASKED)
    assert counted.input_tokens > alone.input_tokens + 50
