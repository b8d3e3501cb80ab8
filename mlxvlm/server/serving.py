"""A socket, uvicorn, and an orderly end. Knows signals and connections, not endpoints."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxvlm.errors import EngineClosedError, UsageError
from mlxvlm.server.refusals import SHUTTING_DOWN, error_body, send_error
from mlxvlm.server.registry import Registry
from mlxvlm.server.request_log import new_id
from mlxvlm.server.settings import ServerSettings

_BACKLOG = 128  # connections that wait to be accepted; macOS takes no more
_KEEP_ALIVE_S = 30  # clients keep a connection for their next request
# A whole request head; the rest of a body that is already answered; a full buffer to the client.
_LIMITS_S = {"head": 15.0, "rest": 15.0, "write": 60.0}
_SPARE_CONNECTIONS = 16  # beyond the requests that are answered: to say 503, and for /health
_OTHER_FILES = 256  # weights, pictures, connections of our own
_MAX_HEAD_BYTES = 32 << 10
_INTERRUPTED = 130
_LAST_WORDS_S = 2.0  # after the engines' end, for what is then said of the requests that were cut off
_RETRY_AFTER = (b"retry-after", str(EngineClosedError.retry_after_s).encode())
_log = logging.getLogger("mlxvlm.server")


def allow_connections(count: int) -> None:
    """Room for so many sockets: macOS gives a program 256 open files unless it asks for more."""
    wanted = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):  # then there are fewer connections
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(settings: ServerSettings) -> socket.socket:
    """A listening socket. Raises UsageError where the port is taken or the host is not this machine's."""
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use: choose another with --port (0: any free one)") from error
        raise UsageError(f"can't listen on {host} port {port}: {error.strerror or error}") from error


def url_of(listener: socket.socket) -> str:
    """Where a program on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: ASGIApp,
    registry: Registry,
    settings: ServerSettings,
    listener: socket.socket,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Answers until SIGINT, SIGTERM, or the first model can't be loaded, whose error it raises.

    The socket answers at once (/health: 503); `on_ready` is called when the first model is loaded.
    """
    closing: list[asyncio.Task[None]] = []
    # Side by side with the connections' end: requests that are cut off still get to say so.
    server = _Server(_config(app, settings), lambda: closing.append(asyncio.create_task(registry.close())))
    registry.start()
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(registry.load())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():  # a signal came first
            loading.cancel()
        elif not server.should_exit and loading.exception() is None:
            on_ready()
        else:
            server.should_exit = True
        await serving
    finally:
        server.should_exit = True
        registry.refuse()
        await asyncio.wait({serving, loading})
        await asyncio.gather(*closing)
        await registry.close()  # of a server that never began
    error = None if loading.cancelled() else loading.exception()
    if error is not None and not isinstance(error, EngineClosedError):
        raise error


def _config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    # Nothing is looked for: which parser or loop happens to be installed must not change what is accepted.
    return uvicorn.Config(
        _answering_to_the_end(app),
        http=_Connection,
        loop="asyncio",
        ws="none",
        lifespan="auto",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # anybody can send them
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=settings.max_connections + _SPARE_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s + _LAST_WORDS_S,  # type: ignore[arg-type]  # it goes to wait_for as it is
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )


def _answering_to_the_end(app: ASGIApp) -> ASGIApp:
    """Nobody but uvicorn cancels a request, at the last deadline, and then logs a traceback for each."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, sending)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not started:
                await send_error(send, 503, SHUTTING_DOWN, headers=[_RETRY_AFTER], path=scope["path"])

    return answer


class _Server(uvicorn.Server):
    """A first signal ends the server in order, a second one at once; neither is raised again."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.on_shutdown()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(_INTERRUPTED)  # whatever hangs, does not hang this
        self.should_exit = True


class _Connection(H11Protocol):
    """uvicorn's connection with the limits that it lacks, and refusals in the shape of OpenAI's errors.

    Of time: for a whole head from its first byte; for the rest of a body that was answered before its end, which is
    read so that the client gets to see the answer; and for a client that does not read what it asked for. Of number:
    see _make_room.
    """

    _idle_since = 0.0
    _timer: asyncio.TimerHandle | None = None
    _timed: str | None = None  # what the timer is for

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.limit_concurrency = None  # uvicorn would refuse in plain text, whoever asks: see Capacity
        self._idle_since = self.loop.time()
        self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:  # uvicorn's own timer runs between requests
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._start(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._start(None)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP. Where an answer has begun, or is over, there is nothing that could still be said."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body, name = error_body("the request is not valid HTTP"), new_id()
        _log.info("a request is not valid HTTP", extra={"request_id": name})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"x-request-id", name.encode()), (b"connection", b"close")]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
        """Beyond the limit, whoever is longest without a request leaves: silence must not keep others out."""
        if len(self.connections) > (self.config.limit_concurrency or 0):
            idle = [each for each in self.connections if isinstance(each, _Connection) and each._is_idle]
            longest = min(idle, key=lambda each: each._idle_since)
            self.connections.discard(longest)  # it is lost a moment later, and others may come before
            longest.transport.abort()

    def _watch(self) -> None:
        if self._timed == "write":
            return
        if self.conn.their_state is h11.IDLE:
            self._start("head")
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            self._start("rest")
        else:
            self._start(None)

    def _start(self, what: str | None) -> None:
        """A timer that runs for the same thing goes on: drops of data don't prolong it."""
        if what == self._timed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timed = what
        self._timer = None if what is None else self.loop.call_later(_LIMITS_S[what], self._give_up)

    def _give_up(self) -> None:
        _log.info("a connection took longer than %g s (%s) and is closed", _LIMITS_S[self._timed or ""], self._timed)
        self.transport.abort()
