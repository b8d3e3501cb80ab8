"""Tokens, loading and re-quantising over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxvlm.server.registry import ModelSpec
from tests.server.loaders import FakeLoader
from tests.server.test_chat import PICTURE, look
from tests.server.whole import Whole, whole


def post(url: str, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{url}{path}", json=body, trust_env=False, timeout=30)


def error(reply: httpx2.Response) -> tuple[int, str | None]:
    return reply.status_code, reply.json()["error"]["param"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30))
def test_there_and_back(demo_url: str, text: str) -> None:
    found = post(demo_url, "/tokenize", text=text, add_special_tokens=False).json()
    assert found["count"] == len(found["tokens"]) == len(found["texts"])
    back = post(demo_url, "/detokenize", tokens=found["tokens"], skip_special_tokens=False).json()
    assert back == {"model": "demo", "text": text}


def test_a_chat_is_counted_as_it_is_answered(demo_url: str) -> None:
    for messages in (look(str(PICTURE)), [{"role": "user", "content": "Hello!"}]):
        answer = post(demo_url, "/v1/chat/completions", messages=messages, max_tokens=1, return_token_ids=True).json()
        found = post(demo_url, "/tokenize", messages=messages).json()
        assert found["tokens"] == answer["prompt_token_ids"]
        assert found["count"] == answer["usage"]["prompt_tokens"]
        assert found["max_context"] == 2048


def test_special_tokens_are_named_only_if_asked(demo_url: str) -> None:
    chat = post(demo_url, "/tokenize", messages=[{"role": "user", "content": "Hello!"}]).json()
    plain = post(demo_url, "/detokenize", tokens=chat["tokens"]).json()["text"]
    named = post(demo_url, "/detokenize", tokens=chat["tokens"], skip_special_tokens=False).json()["text"]
    assert "Hello!" in plain
    assert named == "".join(chat["texts"]) != plain


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "text"),
        ("/tokenize", {"text": "a", "messages": [{"role": "user", "content": "b"}]}, "text"),
        ("/tokenize", {"text": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("/tokenize", {"messages": look("a"), "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "b"}]}, "messages[0]"),
        ("/tokenize", {"text": "a", "content": "b"}, "content"),
        ("/tokenize", {"text": "a" * ((1 << 20) + 1)}, "text"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1 << 31]}, "tokens[0]"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
    ],
)  # fmt: skip
def test_refusals(demo_url: str, path: str, body: dict[str, Any], param: str) -> None:
    assert error(post(demo_url, path, **body)) == (400, param)


def test_ids_that_are_no_tokens(demo_url: str) -> None:
    assert post(demo_url, "/detokenize", tokens=[(1 << 31) - 1]).json()["text"] == ""


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def server(loader: FakeLoader) -> Iterator[Whole]:
    with whole([ModelSpec("org/a", "a", ("gpt",)), ModelSpec("b", "b")], None, loader) as server:
        yield server


def test_load_and_unload(server: Whole, loader: FakeLoader) -> None:
    assert post(server.url, "/v1/models/b/load").json() == {
        "id": "b",
        "object": "model",
        "status": "loaded",
        "isq": None,
    }
    assert loader.loaded == ["org/a", "b"]
    assert post(server.url, "/v1/models/org/a/unload").json()["status"] == "unloaded"
    assert post(server.url, "/v1/models/status", model_id="org/a").json()["status"] == "unloaded"
    assert post(server.url, "/v1/models/load", model="gpt").json()["id"] == "org/a"
    assert post(server.url, "/v1/models/unload", model_id="b").json()["status"] == "unloaded"
    assert post(server.url, "/v1/models/reload", model_id="b").json()["status"] == "loaded"
    assert loader.loaded == ["org/a", "b", "org/a", "b"]
    assert error(post(server.url, "/v1/models/c/load"))[0] == 404
    assert error(post(server.url, "/v1/models/unload", model="c"))[0] == 404
    assert error(post(server.url, "/v1/models/unload")) == (400, "model")
    assert httpx2.get(f"{server.url}/v1/models/org/a", trust_env=False).json()["id"] == "org/a"


def test_re_isq(server: Whole, loader: FakeLoader) -> None:
    assert post(server.url, "/re_isq", ggml_type="Q4K").json()["isq"] == "Q4K"
    assert post(server.url, "/re_isq", isq=8, model="gpt").json() == {
        "id": "org/a",
        "object": "model",
        "status": "loaded",
        "isq": "8",
    }
    assert post(server.url, "/re_isq", isq="none").json()["isq"] is None
    assert loader.recipes == [None, "Q4K", 8, None]
    assert error(post(server.url, "/re_isq")) == (400, "ggml_type")
    assert error(post(server.url, "/re_isq", isq=4, ggml_type="Q4K")) == (400, "ggml_type")
    assert error(post(server.url, "/re_isq", isq=4, model="c"))[0] == 404
    assert error(post(server.url, "/re_isq", isq="nonsense")) == (400, "isq")
    assert error(post(server.url, "/re_isq", ggml_type="nonsense")) == (400, "ggml_type")
    assert loader.alive == 1


def test_health(loader: FakeLoader, server: Whole) -> None:
    reply = httpx2.get(f"{server.url}/health", trust_env=False)
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
