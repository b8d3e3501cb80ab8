"""The document of the endpoints, and the page that is made of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from mlxvlm.api.operations import DetokenizeRequest
from mlxvlm.server import docs_page
from mlxvlm.server.openapi import OPERATIONS, Operation, document
from mlxvlm.server.registry import ModelSpec
from mlxvlm.server.settings import ServerSettings
from tests.server.loaders import FakeLoader
from tests.server.whole import Whole, whole


@pytest.fixture(scope="module")
def server() -> Iterator[Whole]:
    with whole([ModelSpec("a", "a")], ServerSettings(port=0, api_key="key"), FakeLoader()) as server:
        yield server


def routes_of(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Methods and paths of what is really served."""
    from mlxvlm.server import app

    seen: list[Any] = []
    genuine = Starlette.__init__

    def remembered(self: Starlette, **arguments: Any) -> None:
        seen.extend(arguments["routes"])
        genuine(self, **arguments)

    monkeypatch.setattr(app.Starlette, "__init__", remembered)
    with whole([ModelSpec("a", "a")], None, FakeLoader()):
        pass
    return {
        (method.lower(), route.path.replace(":path", ""))
        for route in seen
        if isinstance(route, Route) and route.include_in_schema
        for method in (route.methods or ()) - {"HEAD"}
    }


def test_it_has_every_route_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {(each.method, each.path) for each in OPERATIONS}
    assert told == routes_of(monkeypatch), "each route stands in openapi.OPERATIONS"


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from refs(each)
    elif isinstance(value, list):
        for each in value:
            yield from refs(each)


def test_what_it_refers_to_is_there(server: Whole) -> None:
    reply = httpx2.get(f"{server.url}/openapi.json", trust_env=False)
    assert reply.headers["content-type"] == "application/json"
    found = reply.json()
    assert found == json.loads(json.dumps(document(has_key=True)))
    assert found["openapi"].startswith("3.1")
    names = {ref.removeprefix("#/components/schemas/") for ref in refs(found)}
    assert names <= found["components"]["schemas"].keys()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in found["components"]["schemas"])
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert chat["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert chat["responses"]["429"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ErrorBody"
    }
    request = found["components"]["schemas"]["ChatCompletionRequest"]
    assert request["additionalProperties"] is False
    assert request["required"] == ["messages"]
    ids = [each["operationId"] for methods in found["paths"].values() for each in methods.values()]
    assert len(set(ids)) == len(ids)


def test_errors_have_the_shape_of_their_endpoint(server: Whole) -> None:
    found = document(has_key=True)
    for each in OPERATIONS:
        told = found["paths"][each.path][each.method]["responses"]["401"]["content"]["application/json"]["schema"]
        path = each.path.replace("{id}", "a")
        body = httpx2.request(each.method.upper(), server.url + path, json={}, trust_env=False)
        if body.status_code == 401:
            schema = found["components"]["schemas"][told["$ref"].rpartition("/")[2]]
            assert body.json().keys() == schema["properties"].keys(), each.path


def test_null_is_told_where_it_is_taken() -> None:
    """Of whatever may be left out of a request: see mlxvlm.api.base."""
    requests = {each.request for each in OPERATIONS if each.request}
    schemas = document(has_key=False)["components"]["schemas"]
    for model in requests:
        schema = schemas[model.__name__]
        for name in schema["properties"].keys() - set(schema.get("required", [])):
            assert {"type": "null"} in schema["properties"][name]["anyOf"], f"{model.__name__}.{name}"
    assert DetokenizeRequest.model_validate({"tokens": [], "model": None}).model == "default"


def test_a_405_names_all_methods_of_a_path(server: Whole) -> None:
    key = {"Authorization": "Bearer key"}
    for path in {each.path for each in OPERATIONS}:
        url = server.url + path.replace("{id}", "a")
        allowed = httpx2.request("PATCH", url, headers=key, json={}, trust_env=False).headers["allow"]
        told = {each.method.upper() for each in OPERATIONS if each.path == path}
        assert set(allowed.split(", ")) - {"HEAD"} == told, path


def test_a_wrong_path_is_named(server: Whole) -> None:
    key = {"Authorization": "Bearer key"}
    for method, path, status in (
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/messages/x", 404),
        ("PUT", "/health", 405),
    ):
        reply = httpx2.request(method, server.url + path, headers=key, json={}, trust_env=False)
        assert reply.status_code == status
        assert path in reply.json()["error"]["message"]


def test_the_key(server: Whole) -> None:
    with_key, without = document(has_key=True), document(has_key=False)
    assert with_key["security"] == [{"bearer": []}, {"key": []}]
    assert "security" not in without
    assert "securitySchemes" not in without["components"]
    for each in OPERATIONS:
        operation = with_key["paths"][each.path][each.method]
        assert (operation.get("security") == []) == each.is_open
        if each.method == "get" and not each.parameters:
            status = httpx2.get(server.url + each.path, trust_env=False).status_code
            assert status == (200 if each.is_open else 401), each.path


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src"):
                self.links.add(value or "")


def test_the_page_needs_nothing_from_elsewhere(server: Whole) -> None:
    reply = httpx2.get(f"{server.url}/docs", trust_env=False)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(reply.text)
    assert not page.tags & {"script", "link", "img", "iframe", "form", "object"}
    assert page.attributes <= {"lang", "charset", "name", "content", "href", "id"}
    assert page.links - {"/openapi.json"} <= {f"#{each}" for each in page.ids}
    assert len(set(page.ids)) == len(page.ids)
    policy = reply.headers["content-security-policy"]
    [style] = re.findall(r"<style>(.*?)</style>", reply.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    for each in OPERATIONS:
        assert f"<code>{each.method.upper()} {each.path}</code>" in reply.text


def test_texts_can_not_become_tags() -> None:
    described = document(has_key=False)
    described["paths"]["/health"]["get"]["summary"] = "<script>`<b>`"
    described["components"]["schemas"]["Health"]["description"] = "</pre><script>"
    assert "script" not in Page(docs_page.html(described)).tags


@pytest.mark.parametrize("each", [each for each in OPERATIONS if "stream" in getattr(each.request, "model_fields", {})])
def test_what_is_streamed_is_told(each: Operation, demo_url: str) -> None:
    told = document(has_key=False)["paths"][each.path][each.method]["responses"]
    assert "text/event-stream" in told["200"]["content"]
    assert "504" in told
    assert each.event is not None
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "input": "Hello!", "prompt": "Hello"}
    limits = {"max_tokens": 2, "max_output_tokens": 2, "model": "demo"}
    body = {name: value for name, value in (asked | limits).items() if name in each.request.model_fields}  # type: ignore[union-attr]
    reply = httpx2.post(demo_url + each.path, json={**body, "stream": True}, trust_env=False, timeout=60)
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    assert len(events) > 1
    for event in events:
        read = each.event.model_validate_json(event)
        assert json.loads(read.model_dump_json()) == json.loads(event), "nothing of it is unknown"


def test_parameters_of_a_query_are_told(demo_url: str) -> None:
    made = httpx2.post(f"{demo_url}/v1/responses", json={"input": "a", "max_output_tokens": 1}, trust_env=False).json()
    [told] = [each.query for each in OPERATIONS if each.path.endswith("/input_items")]
    assert told.keys() == {"order", "limit", "after"}
    most, asked = told["limit"]["maximum"], f"{demo_url}/v1/responses/{made['id']}/input_items"
    for limit, status in ((most, 200), (most + 1, 400), (told["limit"]["minimum"] - 1, 400)):
        assert httpx2.get(asked, params={"limit": limit}, trust_env=False).status_code == status
    assert "<code>limit</code>" in docs_page.html(document(has_key=False))
