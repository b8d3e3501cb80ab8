"""A name for every request, and one line about each in the log. Never what was asked: no prompts, no pictures.

The id stands in the answer's x-request-id, in error lines, and in all that is logged while the request is handled.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxvlm.engine.request import Usage
from mlxvlm.server.refusals import is_anthropics

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_SHOWN_CHARS = 200  # of a path
_NO_ANSWER = 499  # nginx's: the client left before there was one
_request_id: ContextVar[str] = ContextVar("request_id", default="")
_log = logging.getLogger("mlxvlm.server.requests")


def new_id() -> str:
    """For a request that brings none."""
    return f"req-{uuid.uuid4().hex}"


class RequestLog:
    """ASGI middleware, outside of all others."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = _Record(scope)
        token = _request_id.set(record.id)
        try:
            await self.app(scope, receive, record.watch(send))
        finally:
            record.write()
            _request_id.reset(token)


class _Record:
    """What is told of one request."""

    def __init__(self, scope: Scope) -> None:
        given = [value for key, value in scope["headers"] if key.lower() == b"x-request-id"]
        is_sane = len(given) == 1 and _SANE_ID.fullmatch(given[0])
        self.id = given[0].decode("ascii") if is_sane else new_id()
        names = (b"x-request-id", b"request-id") if is_anthropics(scope["path"]) else (b"x-request-id",)
        self.headers = [(name, self.id.encode()) for name in names]  # where OpenAI's and Anthropic's clients look
        self.state: dict[str, Any] = scope.setdefault("state", {})
        self.state["request_id"] = self.id
        self.scope = scope
        self.begun = time.perf_counter()
        self.first_byte_s: float | None = None
        self.status = _NO_ANSWER
        self.ended = False

    def watch(self, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
            await send(message)
            if message["type"] == "http.response.body":
                if self.first_byte_s is None:
                    self.first_byte_s = time.perf_counter() - self.begun
                self.ended = not message.get("more_body", False)

        return sending

    def write(self) -> None:
        client = self.scope.get("client")
        fields = {
            "method": self.scope["method"],
            "path": self.scope["path"][:_SHOWN_CHARS],
            "status": self.status,
            "seconds": round(time.perf_counter() - self.begun, 4),
            "client": client[0] if client else None,
            "first_byte_seconds": None if self.first_byte_s is None else round(self.first_byte_s, 4),
            "complete": self.ended,
            **self.state.get("log_fields", {}),
        }
        _log.info("request", extra={"fields": fields, "request_id": self.id})


def note_usage(scope: Scope, model: str, usage: Usage) -> None:
    """For endpoints: what an answer took, for the request's line."""
    scope.setdefault("state", {})["log_fields"] = {
        "model": model,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "image_tokens": usage.image_tokens,
        "completion_tokens": usage.completion_tokens,
        "time_to_first_token_seconds": round(usage.time_to_first_token_s, 4),
    }


def request_id() -> str:
    """Of the request that is being handled; "" outside of one."""
    return _request_id.get()


class _Format(logging.Formatter):
    """Fields in order: what every line has, then what the caller gave."""

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        number = getattr(record, "request_id", None) or request_id()
        own = {"request_id": number} if number else {}
        return {**own, **getattr(record, "fields", {})}


class JsonFormat(_Format):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormat(_Format):
    """A line for people; nothing in it can break the line or steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        values = [f"{name}={value}" for name, value in self.fields(record).items() if value is not None]
        words = [self.formatTime(record, "%H:%M:%S"), f"{record.levelname.lower()}:", record.getMessage(), *values]
        line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(words))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(as_json: bool, level: int = logging.INFO) -> None:
    """Sends what the server and its libraries log to stderr; for the command, which owns the process."""
    target = logging.StreamHandler()
    target.setFormatter(JsonFormat() if as_json else TextFormat())
    logging.basicConfig(level=logging.WARNING, handlers=[target], force=True)
    logging.getLogger("mlxvlm").setLevel(level)
