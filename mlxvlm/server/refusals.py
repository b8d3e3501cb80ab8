"""Answers that are given before an endpoint is reached, in the shape of OpenAI's errors or Anthropic's."""

from __future__ import annotations

import json
from collections.abc import Iterable

from starlette.types import Send

from mlxvlm.api.anthropic.answers import error_of

Headers = Iterable[tuple[bytes, bytes]]
_ANTHROPICS = "/v1/messages"

# What a request is told that is cut off, or comes too late.
SHUTTING_DOWN = "the server is shutting down: ask again when it is back"
UNLOADED = "the model was unloaded before the answer was done: ask again"


def is_anthropics(path: str) -> bool:
    """Whether an endpoint speaks as Anthropic's do."""
    return path == _ANTHROPICS or path.startswith(f"{_ANTHROPICS}/")


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> bytes:
    """OpenAI's error object. Source: https://platform.openai.com/docs/guides/error-codes"""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


async def send_error(
    send: Send, status: int, message: str, code: str | None = None, headers: Headers = (), *, path: str = ""
) -> None:
    """A whole answer. A body that may still come is left to the connection, which has a time limit for it."""
    body = error_body(message, "server_error" if status >= 500 else "invalid_request_error", code)
    if is_anthropics(path):
        body = error_of(status, message).model_dump_json().encode()
    fixed = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})
