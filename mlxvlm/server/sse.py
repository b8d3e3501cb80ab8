"""Server-sent events as OpenAI frames them. Source: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.types import Send

from mlxvlm.server.watch import Watch

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
)
# Ends of lines to some clients' splitlines(), though not to the standard.
_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def frame(body: BaseModel) -> bytes:
    """One event."""
    text = body.model_dump_json()
    return b"data: " + (text if text.isascii() else text.translate(_BREAKS)).encode() + b"\n\n"


def named_frame(body: BaseModel) -> bytes:
    """One event that is named by its type."""
    return b"event: " + str(getattr(body, "type", "message")).encode() + b"\n" + frame(body)


async def send_events(send: Send, events: AsyncGenerator[bytes, None], send_timeout_s: float) -> None:
    """A whole event stream, one write for each piece. Raises TimeoutError where one is not taken in that time."""
    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as scope, aclosing(events):
        with Watch(send_timeout_s, lambda: scope.reschedule(loop.time())) as watch:
            async for data in events:
                await watch.wait(send({"type": "http.response.body", "body": data, "more_body": True}))
    await send({"type": "http.response.body", "body": b""})
