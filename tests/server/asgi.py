"""A client without a socket: one request to an ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Headers = Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def __getitem__(self, name: str) -> str:
        return ", ".join(value for key, value in self.headers if key == name)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


def scope_of(method: str, path: str, headers: Headers, port: int = 1234) -> dict[str, Any]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs],
        "client": ("127.0.0.1", 5555),
        "server": ("127.0.0.1", port),
    }


async def ask(app: Any, scope: dict[str, Any], pieces: Iterable[bytes] = (b"",)) -> Reply:
    """Sends the pieces of a body, then nothing more."""
    waiting = list(pieces)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if waiting:
            piece = waiting.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(waiting)}
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await app(scope, receive, send)
    start, *bodies = sent
    assert start["type"] == "http.response.start"
    headers = [(key.decode(), value.decode("latin-1")) for key, value in start["headers"]]
    return Reply(start["status"], headers, b"".join(each.get("body", b"") for each in bodies))


def fetch(app: Any, method: str, path: str, headers: Headers, body: bytes = b"", port: int = 1234) -> Reply:
    """One request from beginning to end."""
    return asyncio.run(ask(app, scope_of(method, path, headers, port), [body]))
