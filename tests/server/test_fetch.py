"""Pictures from the web: what is checked, where the connection goes, and servers that misbehave."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.errors import ImageError
from mlxvlm.processors.sources import DEFAULT_LIMITS, ImageLimits
from mlxvlm.server import fetch as fetch_module
from mlxvlm.server.fetch import Fetcher
from tests.processors.conftest import Answer, Web

SMALL = replace(DEFAULT_LIMITS, max_bytes=1 << 10, timeout_s=5)
QUICK = replace(DEFAULT_LIMITS, timeout_s=0.3)


class Names:
    """A resolver with a table; a name's addresses are taken in turn, the last one stays."""

    def __init__(self, **table: Sequence[Sequence[str]]) -> None:
        self.table = {name.replace("_", "."): list(answers) for name, answers in table.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self.table.get(host)
        if answers is None:
            raise OSError("unknown name")
        return answers.pop(0) if len(answers) > 1 else answers[0]


def fetch(url: str, resolve: Any, limits: ImageLimits = SMALL, allow_private: bool = False) -> bytes:
    return asyncio.run(Fetcher(allow_private, limits, resolve)(url))


def refusal(url: str, resolve: Any, limits: ImageLimits = SMALL, allow_private: bool = False) -> str:
    with pytest.raises(ImageError) as caught:
        fetch(url, resolve, limits, allow_private)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


LOCAL = Names(pictures_example=[["127.0.0.1"]], **{"127_0_0_1": [["127.0.0.1"]]})
INSIDE = "its host has no public address"


def named(web: Web) -> str:
    return f"http://pictures.example:{web.server.server_port}"


def redirect(location: str, code: int = 302) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Location", location)
        handler.end_headers()

    return answer


def test_the_connection_goes_to_the_checked_address(web: Web) -> None:
    web.add("/a.png", b"picture")
    names = Names(pictures_example=[["127.0.0.1"], ["192.0.2.1"]])  # the second is nowhere
    assert fetch(f"{named(web)}/a.png", names, allow_private=True) == b"picture"
    assert names.asked == ["pictures.example"]  # once, and nobody looks again
    sent = web.headers[0]
    assert sent["host"] == named(web).removeprefix("http://")
    assert not {"cookie", "authorization", "referer"} & set(sent)
    assert sent["accept-encoding"] == "identity"


def test_rebinding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and this machine's when it is asked again."""
    names = Names(rebind_example=[["93.184.216.34"], ["127.0.0.1"]])
    reached: list[str] = []

    async def connect(self: Fetcher, address: str, url: httpx2.URL, name: str) -> bytes:
        reached.append(address)
        return b"picture"

    monkeypatch.setattr(Fetcher, "_get_from", connect)
    assert fetch("http://rebind.example/a.png", names) == b"picture"
    assert reached == ["93.184.216.34"]
    assert INSIDE in refusal("http://rebind.example/a.png", names)
    assert len(reached) == 1


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["::1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["93.184.216.34", "127.0.0.1"],
        ["::ffff:10.0.0.1"],
        [],
    ],
)
def test_names_of_the_inside(addresses: list[str]) -> None:
    message = refusal("http://inside.example/a.png", Names(inside_example=[addresses]))
    # The same words as for a name that nobody knows: the answers map no network.
    assert message == refusal("http://inside.example/a.png", Names())
    assert INSIDE in message


def test_private_addresses_by_themselves(web: Web) -> None:
    web.add("/a.png", b"picture")
    assert "only ports 80 and 443" in refusal(f"{web.url}/a.png", None)
    assert INSIDE in refusal("http://127.0.0.1/a.png", None)
    assert INSIDE in refusal("http://[::1]/a.png", None)
    assert INSIDE in refusal("http://[::ffff:127.0.0.1]/a.png", None)
    assert INSIDE in refusal("http://localhost/a.png", None)
    assert INSIDE in refusal("http://2130706433/a.png", None)
    assert web.asked == []
    assert fetch(f"{web.url}/a.png", None, allow_private=True) == b"picture"


@pytest.mark.parametrize(
    "location",
    [
        *(
            "http://127.0.0.1/",
            "http://[::1]/",
            "//127.0.0.1/",
            "http://localhost:22/",
            "http://169.254.169.254/latest",
        ),
        *(
            "file:///etc/passwd",
            "ftp://pictures.example/a",
            "gopher://pictures.example/a",
            "data:image/png;base64,AAAA",
        ),
        *("http://user:password@pictures.example/", "javascript:1", "http://", "unix:/var/run/docker.sock"),
    ],
)
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_checked_anew(location: str, code: int, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetch_module._PORTS, "http", web.server.server_port)
    names = Names(pictures_example=[["127.0.0.1"]], **{"127_0_0_1": [["127.0.0.1"]], "localhost": [["127.0.0.1"]]})
    # Of the addresses of this test only the first one's counts as public, and only once.
    checked: list[str] = []

    def is_public(address: str) -> bool:
        checked.append(address)
        return len(checked) == 1

    monkeypatch.setattr(fetch_module, "is_public", is_public)
    web.add("/a.png", redirect(location, code))
    assert "can't be fetched" in refusal(f"{named(web)}/a.png", names)
    assert web.asked == ["/a.png"]


def test_redirects_that_are_fine(web: Web) -> None:
    web.add("/a.png", redirect("b.png"))
    web.add("/b.png", redirect(f"{named(web)}/c.png", 308))
    web.add("/c.png", b"picture")
    assert fetch(f"{named(web)}/a.png", LOCAL, allow_private=True) == b"picture"
    web.add("/loop", redirect("/loop"))
    assert "more than 3 redirects" in refusal(f"{named(web)}/loop", LOCAL, allow_private=True)
    assert web.asked.count("/loop") == 4


def test_cookies_are_not_carried(web: Web) -> None:
    def bake(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Set-Cookie", "a=1; Path=/")
        handler.send_header("Location", "/b.png")
        handler.end_headers()

    web.add("/a.png", bake)
    web.add("/b.png", b"picture")
    assert fetch(f"{named(web)}/a.png", LOCAL, allow_private=True) == b"picture"
    assert "cookie" not in web.headers[1]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("ftp://pictures.example/a", "only http and https"),
        ("gopher://pictures.example/a", "only http and https"),
        ("http://user@pictures.example/", "password"),
        ("http://user:secret@pictures.example/", "password"),
        ("http://pictures.example:22/", "only ports 80 and 443"),
        ("https://pictures.example:8443/", "only ports 80 and 443"),
        ("http://", "can't be fetched"),
        ("http://[", "can't be fetched"),
        ("http://a b/", "can't be fetched"),
        ("http://pictures.example:99999999/", "can't be fetched"),
        ("http://pictures.example\n.evil/", "can't be fetched"),
        ("http://" + "a" * 300 + "/", "can't be fetched"),
    ],
)
def test_urls_that_are_not_taken(url: str, words: str) -> None:
    assert words in refusal(url, LOCAL)


@given(st.text(max_size=50), st.sampled_from(["http://", "https://", "HTTP://", "http:", "http://pictures.example"]))
def test_odd_urls(rest: str, start: str) -> None:
    """Each is refused with one line: no name of the table is public."""
    refusal(start + rest, LOCAL)


def test_ports_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(self: Fetcher, address: str, url: httpx2.URL, name: str) -> bytes:
        return str(url).encode()

    monkeypatch.setattr(Fetcher, "_get_from", connect)
    names = Names(a_example=[["93.184.216.34"]])
    for url in ("http://a.example/", "http://a.example:80/", "https://a.example:443/", "http://a.example:443/"):
        assert fetch(url, names)


def test_too_many_bytes(web: Web) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))

    web.add("/a.png", endless)
    assert "is larger than the limit" in refusal(f"{named(web)}/a.png", LOCAL, allow_private=True)


def test_compressed_bombs_stay_small(web: Web) -> None:
    def packed(handler: BaseHTTPRequestHandler) -> None:
        import gzip

        body = gzip.compress(bytes(100_000))
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    web.add("/a.png", packed)
    assert len(fetch(f"{named(web)}/a.png", LOCAL, allow_private=True)) < 1000


def test_slow_servers(web: Web) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            web.closing.wait(0.02)
            handler.wfile.write(b"x")

    web.add("/a.png", drip)
    assert "took longer than 0.3 s" in refusal(f"{named(web)}/a.png", LOCAL, QUICK, allow_private=True)


def test_slow_names() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return ()

    assert "took longer than 0.3 s" in refusal("http://slow.example/", resolve, QUICK)


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
def test_other_answers(web: Web, status: int) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    web.add("/a.png", answer)
    assert f"HTTP {status}" in refusal(f"{named(web)}/a.png", LOCAL, allow_private=True)


def test_no_http_at_all(web: Web) -> None:
    def noise(handler: Any) -> None:
        handler.wfile.write(b"\0\xff\n\nnot http\r\n\r\n")

    web.add("/a.png", noise)
    assert "can't be fetched" in refusal(f"{named(web)}/a.png", LOCAL, allow_private=True)


def test_another_address_of_the_same_host(web: Web) -> None:
    web.add("/a.png", b"picture")
    names = Names(pictures_example=[["127.0.0.2", "::1", "127.0.0.1"]])  # the first two don't listen
    assert fetch(f"{named(web)}/a.png", names, allow_private=True) == b"picture"


def test_proxies_of_the_environment_are_not_asked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.add("/a.png", b"picture")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(f"{named(web)}/a.png", LOCAL, allow_private=True) == b"picture"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_proves_the_name_not_the_address(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.example"]
    make += ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "7")
            self.end_headers()
            self.wfile.write(b"picture")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda request, address: None  # type: ignore[method-assign, assignment]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    names = Names(pictures_example=[["127.0.0.1"]], other_example=[["127.0.0.1"]])

    async def both() -> None:
        fetcher = Fetcher(True, SMALL, names)
        fetcher.__dict__["_tls"] = ssl.create_default_context(cafile=str(certificate))
        assert await fetcher(f"https://pictures.example:{server.server_port}/") == b"picture"
        with pytest.raises(ImageError, match="certificate"):
            await fetcher(f"https://other.example:{server.server_port}/")
        with pytest.raises(ImageError, match="certificate"):
            await Fetcher(True, SMALL, names)(f"https://pictures.example:{server.server_port}/")  # nobody's authority

    try:
        asyncio.run(both())
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
