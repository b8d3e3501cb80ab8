"""Who gets through the guard: programs of this machine, and no page of another origin."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mlxvlm.errors import UsageError
from mlxvlm.server.guard import Guard
from mlxvlm.server.settings import ServerSettings
from tests.server.asgi import Headers, Reply, fetch, scope_of

LOCAL = ServerSettings()
OPEN = ServerSettings(host="0.0.0.0")
HOST = {"Host": "localhost:1234"}
JSON = {**HOST, "Content-Type": "application/json", "Content-Length": "2"}
PAGE = "https://page.example"


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"ok": True}, headers={"x-frame-options": "SAMEORIGIN", "access-control-allow-origin": "*"})


APP = Starlette(routes=[Route(path, answer, methods=["GET", "POST", "OPTIONS"]) for path in ("/v1/models", "/health")])


def get(headers: Headers, settings: ServerSettings = LOCAL, **how: Any) -> Reply:
    method, path = how.pop("method", "GET"), how.pop("path", "/v1/models")
    return fetch(Guard(APP, settings), method, path, headers, **how)


@pytest.mark.parametrize(
    "host", ["localhost:1234", "127.0.0.1:1234", "[::1]:1234", "LOCALHOST:1234", "localhost.:1234"]
)
def test_own_names(host: str) -> None:
    assert get({"Host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *(
            "page.example",
            "page.example:1234",
            "localhost",
            "localhost:80",
            "localhost:12345",
            "127.0.0.1",
            "192.168.1.2:1234",
        ),
        *("localhost:1234:1234", "localhost:1234@page.example", "page.example#localhost:1234", "localhost:1234/", ""),
        *("127.0.0.1.page.example:1234", "localhost.page.example:1234", "[::1%lo]:1234", "[::1]", "localhost :1234"),
        *("127.1:1234", "2130706433:1234", "localhost..:1234", "löcalhost:1234", "*", "0.0.0.0:1234"),
    ],
)
def test_foreign_hosts(host: str) -> None:
    reply = get({"Host": host})
    assert reply.status == 403
    assert reply.error["code"] == "host_not_allowed"


def test_one_host_only() -> None:
    assert get([]).status == 400
    assert get([("Host", "localhost:1234"), ("Host", "localhost:1234")]).status == 400


def test_the_default_port_may_be_left_out() -> None:
    assert get({"Host": "localhost"}, port=80).status == 200
    assert get({"Host": "localhost"}, port=443).status == 403


def test_further_names() -> None:
    settings = replace(LOCAL, allowed_hosts=("Mac.local", "proxy.example:8443"))
    assert get({"Host": "mac.local"}, settings).status == 200
    assert get({"Host": "mac.local:99"}, settings).status == 200
    assert get({"Host": "proxy.example:8443"}, settings).status == 200
    assert get({"Host": "proxy.example:1234"}, settings).status == 403
    assert get({"Host": "page.example"}, replace(LOCAL, allowed_hosts=("*",))).status == 200


def test_an_open_server_answers_to_addresses_but_not_to_any_name() -> None:
    assert get({"Host": "192.168.1.2:1234"}, OPEN).status == 200
    assert get({"Host": "[fd00::1]:1234"}, OPEN).status == 200
    assert get({"Host": "page.example:1234"}, OPEN).status == 403
    assert get({"Host": "192.168.1.2:99"}, OPEN).status == 403
    assert get({"Host": "mac.local:1234"}, replace(OPEN, host="mac.local")).status == 200


@given(st.text(max_size=40))
def test_no_odd_host_gets_through(name: str) -> None:
    try:
        name.encode("latin-1")
    except UnicodeEncodeError:
        return
    status = get({"Host": name}).status
    known = {f"{host}{dot}:1234" for host in ("localhost", "127.0.0.1", "[::1]") for dot in ("", ".")}
    assert (status == 200) == (name.strip().lower() in known)
    assert status in (200, 403)


@pytest.mark.parametrize(
    "origin", [PAGE, "http://localhost:3000", "http://localhost", "null", "", "file://", "localhost:1234"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_foreign_origins(origin: str, method: str) -> None:
    reply = get({**JSON, "Origin": origin}, method=method)
    assert reply.status == 403
    assert reply.error["code"] == "origin_not_allowed"
    assert not reply["access-control-allow-origin"]


def test_our_own_page() -> None:
    for host in ("localhost:1234", "127.0.0.1:1234"):
        reply = get({"Host": host, "Origin": f"http://{host}"})
        assert reply.status == 200
        assert not reply["access-control-allow-origin"]  # nor what the endpoint said
    assert get({"Host": "127.0.0.1:1234", "Origin": "http://localhost:1234"}).status == 403
    assert get([*HOST.items(), ("Origin", "http://localhost:1234"), ("Origin", PAGE)]).status == 403


def fetch_headers(site: str, mode: str = "no-cors", dest: str = "image") -> dict[str, str]:
    return {**HOST, "Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}


def test_what_pages_send_without_an_origin() -> None:
    assert get(fetch_headers("cross-site")).status == 403
    assert get(fetch_headers("same-site")).status == 403  # another port of this machine
    assert get(fetch_headers("cross-site", "navigate", "iframe")).status == 403
    assert get(fetch_headers("cross-site", "navigate", "document")).status == 200
    assert get({**JSON, **fetch_headers("cross-site", "navigate", "document")}, method="POST").status == 403
    assert get(fetch_headers("same-origin")).status == 200
    assert get(fetch_headers("none", "navigate", "document")).status == 200
    twice = [*HOST.items(), ("Sec-Fetch-Site", "none"), ("Sec-Fetch-Site", "cross-site")]
    assert get(twice).status == 403


def test_cors() -> None:
    settings = replace(LOCAL, cors_origins=(PAGE,))
    reply = get({**HOST, "Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, settings)
    assert (reply.status, reply["access-control-allow-origin"]) == (200, PAGE)
    assert "x-request-id" in reply["access-control-expose-headers"]
    assert not reply["access-control-allow-credentials"]
    assert "Origin" in reply["vary"]
    assert get({**HOST, "Origin": "https://page.example.evil"}, settings).status == 403
    assert get({**HOST, "Origin": "null"}, replace(LOCAL, cors_origins=("*",))).status == 403
    assert get({**HOST, "Origin": "https://any.example"}, replace(LOCAL, cors_origins=("*",))).status == 200
    # An allowed page gets to read errors too, but no further than any client.
    refused = get({**HOST, "Origin": PAGE}, replace(settings, api_key="key"))
    assert (refused.status, refused["access-control-allow-origin"]) == (401, PAGE)


def test_preflight() -> None:
    settings = replace(LOCAL, cors_origins=(PAGE,), api_key="key")
    asked = {
        **HOST,
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    reply = get(asked, settings, method="OPTIONS")
    assert (reply.status, reply.body) == (204, b"")
    assert reply["access-control-allow-origin"] == PAGE
    assert "POST" in reply["access-control-allow-methods"]
    assert reply["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert reply["access-control-allow-private-network"] == "true"
    split = get({**asked, "Access-Control-Request-Headers": "a\r\nset-cookie: b"}, settings, method="OPTIONS")
    assert not split["access-control-allow-headers"]
    assert get({**asked, "Origin": "https://other.example"}, settings, method="OPTIONS").status == 403
    # Without an origin it is a request like others, and needs the key.
    assert get(HOST, settings, method="OPTIONS").status == 401


KEYED = replace(LOCAL, api_key="sk-secret")


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("Authorization", "Bearer sk-secret", 200),
        ("authorization", "bearer   sk-secret", 200),
        ("x-api-key", "sk-secret", 200),
        ("Authorization", "sk-secret", 401),
        ("Authorization", "Basic sk-secret", 401),
        ("Authorization", "Bearer sk-secre", 401),
        ("Authorization", "Bearer sk-secrets", 401),
        ("Authorization", "Bearer", 401),
        ("Authorization", "Bearer \xff", 401),
        ("x-api-key", "", 401),
        ("x-other", "sk-secret", 401),
    ],
)
def test_api_key(name: str, value: str, status: int) -> None:
    reply = get({**HOST, name: value}, KEYED)
    assert reply.status == status
    if status == 401:
        assert reply.error["code"] == "invalid_api_key"
        assert reply["www-authenticate"] == "Bearer"
        assert "secret" not in reply.body.decode()


def test_what_needs_no_key() -> None:
    assert get(HOST, KEYED, path="/health").status == 200
    assert get(HOST, KEYED, path="/health/").status == 401
    assert get(HOST, KEYED, path="/nothing").status == 401  # which paths there are is not told
    twice = [*HOST.items(), ("Authorization", "Bearer no"), ("Authorization", "Bearer sk-secret")]
    assert get(twice, KEYED).status == 401


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        *[
            ("application/json", 200),
            ("Application/JSON; charset=UTF-8", 200),
            ('application/json;charset="utf-8"', 200),
        ],
        *[("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=x", 415)],
        *[("", 415), ("application/jsonx", 415), ("application/json; charset=utf-16", 415), ("text/json", 415)],
        ("application/json, text/plain", 415),
    ],
)
def test_content_type(kind: str, status: int) -> None:
    assert get({**JSON, "Content-Type": kind}, method="POST").status == status


def test_bodies_without_a_type() -> None:
    assert get(HOST, method="POST").status == 200  # nor a body: a cancel, say
    assert get({**HOST, "Content-Length": "0"}, method="POST").status == 200
    assert get({**HOST, "Content-Length": "2"}, method="POST").status == 415
    assert get({**HOST, "Transfer-Encoding": "chunked"}, method="POST").status == 415
    assert get({**JSON, "Content-Encoding": "gzip"}, method="POST").status == 415
    assert get([*JSON.items(), ("Content-Type", "text/plain")], method="POST").status == 415
    twice = [*JSON.items(), ("Content-Encoding", "identity"), ("Content-Encoding", "gzip")]
    assert get(twice, method="POST").status == 415


def test_security_headers() -> None:
    reply = get(HOST)
    assert reply["x-content-type-options"] == "nosniff"
    assert reply["x-frame-options"] == "SAMEORIGIN"  # the endpoint's own
    assert "frame-ancestors 'none'" in reply["content-security-policy"]
    assert reply["cache-control"] == "no-store"
    refused = get({"Host": "page.example"})
    assert refused["x-frame-options"] == "DENY"
    assert refused["content-type"] == "application/json"


def test_no_websockets() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {**scope_of("GET", "/v1/models", HOST), "type": "websocket"}
    asyncio.run(Guard(APP, LOCAL)(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 65536},
        {"port": -1},
        {"api_key": ""},
        {"api_key": "two\nlines"},
        {"cors_origins": ("page.example",)},
        {"cors_origins": ("https://page.example/",)},
        {"cors_origins": ("https://Page.example",)},
        {"cors_origins": ("http://[",)},
        {"max_body_bytes": 0},
        {"idle_unload_s": 0},
        {"drain_s": -1},
        {"image_root": Path("/no/such/folder")},
    ],
)
def test_settings_without_a_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServerSettings(**wrong)


def test_loopback() -> None:
    names = {"localhost": True, "127.0.0.1": True, "127.1.2.3": True, "::1": True, "0.0.0.0": False, "::": False}
    assert {host: ServerSettings(host=host).is_loopback for host in names} == names
    assert not ServerSettings(host="mac.local").is_loopback


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(KEYED)
