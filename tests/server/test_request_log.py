"""A name for every request, one line about each, and never what was asked."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from mlxvlm.engine.request import Usage
from mlxvlm.server.guard import Guard
from mlxvlm.server.request_log import JsonFormat, RequestLog, TextFormat, configure_logging, note_usage, request_id
from mlxvlm.server.settings import ServerSettings
from tests.server.asgi import Headers, Reply, ask, fetch, scope_of
from tests.server.whole import whole

USAGE = Usage(7, 5, 3, 0.1, 0.2, 0.3, 0.25, 0.6, cached_tokens=2)
_log = logging.getLogger("mlxvlm.server.test")
Records = pytest.LogCaptureFixture


async def plain(request: Request) -> Response:
    _log.warning("inside")
    note_usage(request.scope, "demo", USAGE)
    return PlainTextResponse(f"{request.state.request_id} {request_id()}")


async def stream(request: Request) -> Response:
    async def pieces() -> Any:
        yield "a"
        _log.warning("streaming")
        yield "b"

    return StreamingResponse(pieces())


async def crash(request: Request) -> Response:
    raise ZeroDivisionError("a defect")


APP = RequestLog(
    Guard(
        Starlette(routes=[Route("/plain", plain), Route("/stream", stream), Route("/crash", crash)]), ServerSettings()
    )
)
HOST = {"Host": "localhost:1234"}


def get(path: str = "/plain", headers: Headers = HOST) -> Reply:
    return fetch(APP, "GET", path, headers)


@pytest.fixture(autouse=True)
def heard(caplog: Records) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="mlxvlm"):
        yield


def last_fields(caplog: Records) -> dict[str, Any]:
    found: dict[str, Any] = caplog.records[-1].fields  # type: ignore[attr-defined]
    return found


def test_an_id_is_made_and_kept(caplog: Records) -> None:
    reply = get()
    name = reply["x-request-id"]
    assert name.startswith("req-")
    assert reply.body.decode() == f"{name} {name}"
    assert name != get()["x-request-id"]
    assert request_id() == ""


def test_a_clients_own_id() -> None:
    assert get(headers={**HOST, "X-Request-Id": "a-b.c:1_2"})["x-request-id"] == "a-b.c:1_2"


@pytest.mark.parametrize("wrong", ["", "a b", "a\nb", "x" * 129, "é", '"', "a,b"])
def test_ids_that_are_not_sane(wrong: str) -> None:
    assert get(headers={**HOST, "X-Request-Id": wrong})["x-request-id"].startswith("req-")


def test_two_ids_are_none() -> None:
    assert get(headers=[*HOST.items(), ("x-request-id", "a"), ("x-request-id", "b")])["x-request-id"].startswith("req-")


@pytest.mark.parametrize(("path", "headers", "status"), [("/none", HOST, 404), ("/plain", {"Host": "evil"}, 403)])
def test_errors_have_one_too(path: str, headers: dict[str, str], status: int, caplog: Records) -> None:
    reply = get(path, headers)
    assert reply.status == status
    assert reply["x-request-id"] == caplog.records[-1].request_id  # type: ignore[attr-defined]
    assert last_fields(caplog)["status"] == status


def test_a_line(caplog: Records) -> None:
    get()
    fields = last_fields(caplog)
    assert (fields["method"], fields["path"], fields["status"], fields["client"]) == ("GET", "/plain", 200, "127.0.0.1")
    assert (fields["model"], fields["prompt_tokens"], fields["cached_tokens"]) == ("demo", 7, 2)
    assert (fields["image_tokens"], fields["completion_tokens"]) == (3, 5)
    assert 0 < fields["first_byte_seconds"] <= fields["seconds"] + 0.001
    assert fields["complete"] is True


def test_a_stream_and_a_crash(caplog: Records) -> None:
    assert get("/stream").body == b"ab"
    assert last_fields(caplog)["complete"] is True
    with pytest.raises(ZeroDivisionError):
        get("/crash")
    assert last_fields(caplog)["status"] == 500


def test_a_client_that_leaves(caplog: Records) -> None:
    async def leave(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})

    async def say_nothing(scope: Any, receive: Any, send: Any) -> None:
        pass

    asyncio.run(ask(RequestLog(leave), scope_of("GET", "/", HOST)))
    assert last_fields(caplog)["complete"] is False
    with pytest.raises(ValueError, match="unpack"):
        asyncio.run(ask(RequestLog(say_nothing), scope_of("GET", "/", HOST)))
    assert last_fields(caplog)["status"] == 499


def test_formats(caplog: Records) -> None:
    reply = get("/plain")
    inside, line = caplog.records[-2:]
    as_json = json.loads(JsonFormat().format(line))
    assert as_json["message"] == "request"
    assert as_json["request_id"] == reply["x-request-id"]
    assert (as_json["level"], as_json["status"], as_json["completion_tokens"]) == ("info", 200, 5)
    text = TextFormat().format(line)
    assert f"request_id={reply['x-request-id']}" in text
    assert "status=200" in text
    assert TextFormat().format(inside).endswith("warning: inside")


@given(st.text(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_breaks_a_line(caplog: Records, path: str) -> None:
    caplog.clear()
    fetch(APP, "GET", "/" + path.encode(errors="replace").decode(), HOST)
    record = caplog.records[-1]
    for text in (TextFormat().format(record), JsonFormat().format(record)):
        assert len(text.splitlines()) == 1
        assert "\x1b" not in text
        assert len(text) < 2500


def test_ids_of_lines_inside_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    ours = logging.getLogger("mlxvlm").level
    try:
        root.handlers = []
        configure_logging(as_json=True)
        reply = get("/stream")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logging.getLogger("mlxvlm").setLevel(ours)
    assert [line["message"] for line in lines] == ["streaming", "request"]
    assert {line["request_id"] for line in lines} == {reply["x-request-id"]}


def test_tracebacks() -> None:
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError:
        record = logging.LogRecord("a", logging.ERROR, "", 1, "it failed", (), __import__("sys").exc_info())
    assert "ZeroDivisionError" in json.loads(JsonFormat().format(record))["traceback"]
    assert "ZeroDivisionError" in TextFormat().format(record)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with whole() as server:
        yield server.url


def test_ids_are_where_the_official_clients_look(url: str) -> None:
    hello: list[Any] = [{"role": "user", "content": "Hello!"}]
    with openai.OpenAI(api_key="EMPTY", base_url=f"{url}/v1", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="demo", messages=hello, max_tokens=1, extra_headers={"x-request-id": "mine"}
        )
        assert answer._request_id == "mine"
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="none", messages=hello)
        assert str(caught.value.request_id).startswith("req-")
    with anthropic.Anthropic(api_key="EMPTY", base_url=url, max_retries=0) as other:
        message = other.messages.create(
            model="demo", messages=hello, max_tokens=1, extra_headers={"x-request-id": "mine"}
        )
        assert message._request_id == "mine"
        with pytest.raises(anthropic.NotFoundError) as missing:
            other.messages.create(model="none", messages=hello, max_tokens=1)
        assert str(missing.value.request_id).startswith("req-")


def test_what_is_no_http_has_one_too(url: str, caplog: Records) -> None:
    port = int(url.rpartition(":")[2])
    with (
        caplog.at_level(logging.INFO, logger="mlxvlm.server"),
        socket.create_connection(("127.0.0.1", port), 30) as connection,
    ):
        connection.sendall(b"not at all\r\n\r\n")
        reply = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    [name] = re.findall(r"^x-request-id: (req-\w+)\r$", reply, re.MULTILINE)
    assert name in {getattr(record, "request_id", None) for record in caplog.records}
