"""How many requests are answered at a time, and who gets in when connections are many."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import pytest
from starlette.types import Message, Receive, Scope, Send

from mlxvlm.server import local_files
from mlxvlm.server.capacity import Capacity
from mlxvlm.server.serving import _Connection


async def call(app: Any, path: str) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    await app({"type": "http", "path": path}, receive, send)
    return sent


def test_beyond_the_limit_503_but_health_is_told() -> None:
    async def main() -> None:
        gate, entered = asyncio.Event(), []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            entered.append(scope["path"])
            if scope["path"] == "/wait":
                await gate.wait()

        limited = Capacity(app, 2)
        waiting = [asyncio.create_task(call(limited, "/wait")) for _ in range(2)]
        await asyncio.sleep(0)
        start, body = await call(limited, "/third")
        assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"2")
        assert json.loads(body["body"])["error"]["type"] == "server_error"
        await call(limited, "/health")
        gate.set()
        await asyncio.gather(*waiting)
        await call(limited, "/fourth")
        assert entered == ["/wait", "/wait", "/health", "/fourth"]

    asyncio.run(main())


def test_what_is_no_http_after_an_answer_only_closes() -> None:
    class Transport:
        written, aborted = b"", False

        def abort(self) -> None:
            self.aborted = True

    connection: Any = _Connection.__new__(_Connection)
    connection.conn = h11.Connection(h11.SERVER)
    connection.transport = Transport()
    connection.conn.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.conn.next_event()
    connection.conn.send(h11.Response(status_code=413, headers=[(b"content-length", b"0")]))
    connection.conn.send(h11.EndOfMessage())
    connection.send_400_response("")  # h11 would raise
    assert connection.transport.aborted


def test_a_kernel_s_file_with_nothing_to_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    class Silent:
        def __enter__(self) -> Silent:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def read(self, size: int) -> None:
            return None  # io's word for "nothing yet" of a file that does not block

    path = tmp_path / "silent"
    path.touch()
    monkeypatch.setattr(local_files.os, "fdopen", lambda *args, **kwargs: Silent())
    assert local_files.read_anywhere(path, local_files.ImageLimits()) == b""
