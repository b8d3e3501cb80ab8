"""Hostile requests against the whole server: a 4xx each, and nobody else notices. --abuse sends thousands."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mlxvlm
from mlxvlm.server import serving
from mlxvlm.server.settings import ServerSettings
from tests.fakes import eventually
from tests.server import hostile
from tests.server.live import Answer, Beside, Held, Live, answers, held, is_back, live

# What must never be shown: frames, and where the server's own files are.
SECRETS = (b"Traceback", b'File \\"', b"site-packages", str(Path(mlxvlm.__file__).parent).encode(), b"0x7f", b"tests/")
REFUSED = b"SECRET OF ANOTHER"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("pictures")
    secret = root.parent / "secret.png"
    secret.write_bytes(REFUSED)
    (root / "link.png").symlink_to(secret)
    (root / "folder-link").symlink_to(root.parent)
    os.mkfifo(root / "pipe")
    with live(ServerSettings(port=0, drain_s=1, image_root=root, max_connections=200)) as server:
        yield server


@pytest.fixture(autouse=True)
def others_notice_nothing(
    server: Live, caplog: pytest.LogCaptureFixture, pytestconfig: pytest.Config
) -> Iterator[None]:
    """A stream beside the test arrives unchanged; all that the test took is given back; no frames are logged."""
    server.chat(messages=hostile.HELLO, max_tokens=2)
    beside = Beside(server, 600 if pytestconfig.getoption("--abuse") else 80)
    before = floor(server)
    with beside:
        yield
        assert server.get("/health").status == 200
    assert beside.differing == []
    assert beside.count > 0
    assert is_back(server, before), (before, held())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def floor(server: Live) -> Held:
    """Pools have all their threads, which they keep."""
    assert server.engine is not None
    return Held(held().threads + 24, held().files, held().mlx_bytes + (64 << 10))


def examples(pytestconfig: pytest.Config, count: int, many: int) -> Any:
    number = many if pytestconfig.getoption("--abuse") else count
    return settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=False
    )


def check(answer: Answer, sent: bytes = b"") -> None:
    """A refusal in OpenAI's shape, or an answer to what turned out to be good."""
    is_late = answer.status == 504 and b'"timeout"' in sent  # as it asked
    assert answer.status < 500 or is_late, (answer, sent[:400])
    for secret in SECRETS:
        assert secret not in answer.body or secret in sent, (answer, sent[:400])
    assert REFUSED not in answer.body
    if answer.status >= 400 and answer.body:
        found = json.loads(answer.body)
        fields = {"message", "type"} if found.get("type") == "error" else {"message", "type", "param", "code"}
        assert set(found["error"]) == fields
        assert found["error"]["message"], sent[:400]


def refused(answer: Answer, sent: bytes = b"") -> None:
    check(answer, sent)
    assert 400 <= answer.status < 500, (answer.status, sent[:400])


def test_wrong_fields(server: Live, pytestconfig: pytest.Config) -> None:
    @examples(pytestconfig, 120, 1200)
    @given(hostile.wrong_fields())
    def run(body: bytes) -> None:
        check(server.post(body), body)

    run()


@pytest.mark.parametrize("path", hostile.PATHS)
def test_what_the_document_allows_and_forbids(server: Live, path: str, pytestconfig: pytest.Config) -> None:
    @examples(pytestconfig, 3, 200)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        body = data.draw(allowed)
        check(server.post(body, path), body)
        body = data.draw(forbidden)
        refused(server.post(body, path), body)

    allowed, forbidden = hostile.of_document(path, valid=True), hostile.of_document(path, valid=False)
    run()


def test_wrong_json(server: Live, pytestconfig: pytest.Config) -> None:
    @examples(pytestconfig, 60, 600)
    @given(hostile.wrong_json())
    def run(body: bytes) -> None:
        check(server.post(body), body)

    run()


def test_wrong_heads(server: Live, pytestconfig: pytest.Config) -> None:
    @examples(pytestconfig, 80, 800)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        sent = data.draw(hostile.heads(server.port))
        received = server.exchange(sent, patience_s=0.1)
        assert b"HTTP/1.1 5" not in received, sent
        if b"HEAD " not in sent:  # its answers have a length, and nothing of it
            for answer in answers(received):
                check(answer, sent)

    run()


# What Pillow warns of is no news for a server (processors/images.py), but an error in tests.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures(server: Live, pytestconfig: pytest.Config) -> None:
    @examples(pytestconfig, 60, 600)
    @given(hostile.damaged_pictures())
    def run(data: bytes) -> None:
        check(server.post(hostile.asks_of(hostile.data_url(data))), data)

    run()


def some(pytestconfig: pytest.Config, every: list[Any], count: int) -> list[Any]:
    """All of them with --abuse, else an arbitrary few."""
    return (
        every if pytestconfig.getoption("--abuse") else random.Random(len(every)).sample(every, min(count, len(every)))
    )


def test_grammars_tools_and_templates(server: Live, pytestconfig: pytest.Config) -> None:
    for fields in some(pytestconfig, hostile.grammar_bodies(), 40):
        body = json.dumps(fields).encode()
        check(server.post(body), body)


def test_large_bodies(server: Live, pytestconfig: pytest.Config) -> None:
    for fields in some(pytestconfig, hostile.large_bodies(), 12):
        body = json.dumps(fields).encode()
        if set(fields) <= {"messages", "max_tokens", "timeout"}:
            check(server.post(body), body)
        else:
            refused(server.post(body), body)


def test_a_text_beyond_any_context_is_refused_at_once(server: Live) -> None:
    answer = server.chat(messages=[{"role": "user", "content": "a" * 2_000_000}])
    refused(answer)
    assert b"2,000,0" in answer.body, "by its characters: its tokens were never counted"


def test_bombs(server: Live) -> None:
    for bomb in hostile.bombs():
        refused(server.post(hostile.asks_of(hostile.data_url(bomb))), bomb)


def test_sources(server: Live) -> None:
    root = server.settings.image_root
    assert root is not None
    for source in hostile.sources(str(root.parent / "secret.png")):
        sent = hostile.asks_of(source)
        refused(server.post(sent), sent)


def test_pictures_without_end(server: Live) -> None:
    good = hostile.data_url(hostile.PICTURES["PNG"])
    parts = [{"type": "image_url", "image_url": good}]
    refused(server.chat(messages=[{"role": "user", "content": parts * 65}], max_tokens=1))
    refused(server.chat(messages=[{"role": "user", "content": parts * 1025}], max_tokens=1))
    for pixels in (0, -1, 1, 10**12, "1", 1.5):
        refused(server.post(hostile.asks_of(good, min_pixels=pixels)))
        refused(server.post(hostile.asks_of(good, max_pixels=pixels)))


def test_bodies_without_end(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "rest", 0.5)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    (answer,) = server.send(f"{head}Content-Length: {100 << 20}\r\n\r\n".encode())
    assert answer.status == 413
    refused(answer)
    with server.connect() as connection, suppress(OSError):
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(110):
            connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")


def test_slow_and_many(server: Live, pytestconfig: pytest.Config) -> None:
    """More silent connections than the server has room for keep nobody out."""
    count = 1500 if pytestconfig.getoption("--abuse") else 400
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n".encode()
    slow, before = [], held().files
    for number in range(count):
        connection = server.connect()
        connection.send(head[: number % len(head)] or b"P")
        slow.append(connection)
        if number % 100 == 0:
            assert server.get("/health").status == 200
            assert server.chat(messages=hostile.HELLO, max_tokens=1).status == 200
    assert server.get("/v1/models").status == 200
    kept = server.settings.max_connections + serving._SPARE_CONNECTIONS
    assert eventually(lambda: held().files <= before + count + kept + 4, 5), "both ends are of this process"
    for connection in slow:
        connection.close()


def test_too_many_requests(server: Live) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    waiting = []
    for _ in range(server.settings.max_connections + 20):
        connection = server.connect()
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        waiting.append(connection)
    answer = server.get("/v1/models")
    assert (answer.status, answer.headers["retry-after"]) == (503, "2")
    assert json.loads(answer.body)["error"]["type"] == "server_error"
    assert server.get("/health").status == 200
    for connection in waiting:
        connection.close()


def test_leaving_at_any_moment(server: Live, pytestconfig: pytest.Config) -> None:
    rng = random.Random(3)
    for _ in range(500 if pytestconfig.getoption("--abuse") else 50):
        fields: dict[str, Any] = {
            "messages": hostile.HELLO,
            "max_tokens": 300,
            "ignore_eos": True,
            "n": rng.randint(1, 3),
        }
        fields["stream"] = rng.random() < 0.5
        body = json.dumps(fields).encode()
        if rng.random() < 0.3:
            body = hostile.asks_of(hostile.data_url(hostile.PICTURES["PNG"]), max_tokens=200)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        )
        data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        connection = server.connect()
        connection.sendall(data if rng.random() < 0.7 else data[: rng.randrange(len(data))])
        if rng.random() < 0.5:
            connection.settimeout(rng.random() * 0.05 + 0.001)
            with suppress(TimeoutError):
                connection.recv(rng.randint(1, 2000))
        if rng.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def test_requests_in_a_row_are_answered_in_order(server: Live) -> None:
    good = json.dumps({"messages": hostile.HELLO, "max_tokens": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    bodies = [good, b"{", good, b"[]", b"{}"] * 4
    data = b"".join(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies)
    found = answers(server.exchange(data, patience_s=2))
    assert [answer.status for answer in found] == [200, 400, 200, 400, 400] * 4
