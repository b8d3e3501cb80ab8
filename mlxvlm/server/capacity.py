"""How many requests are answered at a time. Knows ASGI, not what is asked."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from mlxvlm.errors import OverloadedError
from mlxvlm.server.guard import OPEN_PATHS
from mlxvlm.server.refusals import send_error

_RETRY_AFTER = (b"retry-after", str(OverloadedError.retry_after_s).encode())


class Capacity:
    """ASGI middleware: requests beyond `max_requests` get 503, but for those that ask whether the server is well."""

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        self.app, self.max_requests, self._running = app, max_requests, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        if self._running >= self.max_requests:
            message = f"{self.max_requests} requests are being answered, which is the limit: try again"
            await send_error(send, 503, message, headers=[_RETRY_AFTER])
            return
        self._running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running -= 1
