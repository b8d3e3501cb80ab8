"""Servers that misbehave: every answer is bounded in bytes, redirects and time."""

from __future__ import annotations

import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from mlxvlm.errors import ImageError
from mlxvlm.processors.images import DEFAULT_LIMITS, ImageLimits, load_image
from tests.processors.conftest import Answer, Web

QUICK = replace(DEFAULT_LIMITS, timeout_s=0.3)
SMALL = replace(DEFAULT_LIMITS, max_bytes=1 << 10, timeout_s=5)


def refusal(url: str, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(url, limits)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(url[:90])
    return message.removeprefix(url).strip()


def redirect(location: str, body: bytes = b"", *, endless: bool = False) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        if location:
            handler.send_header("Location", location)
        handler.end_headers()
        while endless:
            handler.wfile.write(bytes(1 << 16))

    return answer


@pytest.mark.parametrize("status", [304, 401, 403, 404, 429, 500, 503])
def test_status(web: Web, status: int) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    assert refusal(web.add("/pic.png", answer)) == f"can't be fetched: HTTP {status}"


def test_page_instead_of_a_picture(web: Web) -> None:
    assert "is not an image in a format" in refusal(web.add("/pic.png", b"<html>gone</html>"))


def test_empty_body(web: Web) -> None:
    assert refusal(web.add("/pic.png", b"")) == "is empty"


def test_server_that_never_answers(web: Web) -> None:
    def wait(handler: BaseHTTPRequestHandler) -> None:
        web.closing.wait(5)

    url = web.add("/pic.png", wait)
    start = time.monotonic()
    assert refusal(url, QUICK).startswith("can't be fetched: ")
    assert time.monotonic() - start < 2


def test_drip_feed(web: Web) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            web.closing.wait(0.02)
            handler.wfile.write(b"x")

    start = time.monotonic()
    assert refusal(web.add("/pic.png", drip), QUICK) == "took longer than 0.3 s"
    assert time.monotonic() - start < 2


def test_slow_redirects(web: Web) -> None:
    def slow(handler: BaseHTTPRequestHandler) -> None:
        web.closing.wait(0.2)
        redirect("/pic.png")(handler)

    limits = replace(QUICK, max_redirects=100)
    start = time.monotonic()
    assert refusal(web.add("/pic.png", slow), limits) == "took longer than 0.3 s"
    assert time.monotonic() - start < 2
    assert len(web.asked) <= 3


def test_redirect_loop(web: Web) -> None:
    url = web.add("/a", redirect("/b"))
    web.add("/b", redirect("/a"))
    assert refusal(url) == "can't be fetched: more than 3 redirects"
    assert web.asked == ["/a", "/b", "/a", "/b"]


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_too_many_redirects(web: Web, limit: int) -> None:
    for step in range(9):
        web.add(f"/{step}", redirect(f"/{step + 1}"))
    limits = replace(DEFAULT_LIMITS, max_redirects=limit)
    assert refusal(web.url + "/0", limits) == f"can't be fetched: more than {limit} redirects"
    assert web.asked == [f"/{step}" for step in range(limit + 1)]


def test_redirect_with_an_endless_body(web: Web) -> None:
    web.add("/pic.png", b"gone")
    assert "is not an image" in refusal(web.add("/a", redirect("/pic.png", endless=True)), SMALL)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://[", "", "data:,x"])
def test_redirect_to_nowhere(web: Web, location: str) -> None:
    assert refusal(web.add("/a", redirect(location)), QUICK).startswith("can't be fetched: ")


@pytest.mark.parametrize("length", [True, False], ids=["Content-Length", "no Content-Length"])
def test_body_over_the_limit(web: Web, length: bool) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))
            sent += 1 << 16

    assert refusal(web.add("/pic.png", endless), SMALL) == "is larger than the limit of 0.000976562 MiB"
    assert sent < 64 << 20


def test_connection_cut_in_the_middle(web: Web) -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"half")

    assert refusal(web.add("/pic.png", cut)).startswith("can't be fetched: ")


def test_answer_that_is_no_http(web: Web) -> None:
    def noise(handler: Any) -> None:
        handler.wfile.write(b"\0\xff\n\nnot http\r\n\r\n")

    assert refusal(web.add("/pic.png", noise)).startswith("can't be fetched: ")


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://:99999999/", "https://", "http://a b/", "http://\x7f/", "HTTP:///x"]
)
def test_urls_that_name_no_host(url: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(url, QUICK)
    assert len(str(caught.value).splitlines()) == 1


def test_broken_certificate_file(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file.pem")
    refusal(web.add("/pic.png", b""))
