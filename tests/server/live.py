"""The whole server with the demo model on a real socket, in a thread; and what it holds."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxvlm.engine.engine import Engine
from mlxvlm.server import serving
from mlxvlm.server.assembly import assemble
from mlxvlm.server.loading import CheckpointLoader
from mlxvlm.server.registry import ModelSpec, Registry
from mlxvlm.server.settings import ServerSettings
from tests.fakes import eventually, is_empty

FDS = "/dev/fd"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Live:
    """A running server; use live()."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.listener = serving.listen(settings)
        self.port: int = self.listener.getsockname()[1]
        self.url = serving.url_of(self.listener)
        self.ready = threading.Event()
        self.stopping = threading.Event()
        self.engine: Engine | None = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="live-server")
        self.thread.start()
        assert self.ready.wait(60)

    async def _main(self) -> None:
        # No memory between requests: what is allocated is what requests hold.
        limits = {"prefix_cache_bytes": 0, "feature_cache_bytes": 0}
        registry = Registry([ModelSpec("demo", "demo", limits=limits)], CheckpointLoader(), drain_s=1)
        app = assemble(registry, self.settings)
        serve = asyncio.create_task(serving.serve(app, registry, self.settings, self.listener, self.ready.set))
        while not self.ready.is_set() and not serve.done():
            await asyncio.sleep(0.01)
        async with registry.acquire() as model:
            self.engine = model.engine
        while not self.stopping.is_set():
            await asyncio.sleep(0.02)
        registry.refuse()
        serve.cancel()
        await asyncio.wait({serve})

    def connect(self, timeout_s: float = 60) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def exchange(self, data: bytes, *, patience_s: float = 60) -> bytes:
        """What comes back for whatever bytes, to its end or until nothing comes for so long."""
        with closing(self.connect()) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before its end
                connection.sendall(data)
            connection.settimeout(patience_s)
            return read_all(connection)

    def send(self, data: bytes) -> list[Answer]:
        """The answers to whatever bytes."""
        return answers(self.exchange(data))

    def post(self, body: bytes, path: str = "/v1/chat/completions", headers: str = "") -> Answer:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n{headers}"
        return self.send(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)[0]

    def chat(self, **fields: Any) -> Answer:
        return self.post(json.dumps(fields).encode())

    def get(self, path: str) -> Answer:
        return self.send(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n\r\n".encode())[0]

    def is_floor(self, before: Held) -> bool:
        """Whether nothing is left of any request."""
        assert self.engine is not None
        gc.collect()
        return is_empty(self.engine) and held() <= before


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds on to."""

    threads: int
    files: int
    mlx_bytes: int

    def __le__(self, other: Held) -> bool:
        return self.threads <= other.threads and self.files <= other.files and self.mlx_bytes <= other.mlx_bytes


def held() -> Held:
    return Held(threading.active_count(), len(os.listdir(FDS)), mx.get_active_memory())


def read_all(connection: socket.socket) -> bytes:
    data = bytearray()
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except (ConnectionResetError, TimeoutError):
        pass
    return bytes(data)


def answers(data: bytes) -> list[Answer]:
    """All answers in what a server sent; chunked ones keep their framing."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = int(headers.get("content-length", len(data)))
        found.append(Answer(int(lines[0].split()[1]), headers, data[:length]))
        data = data[length:]
    return found


@contextmanager
def live(settings: ServerSettings | None = None) -> Iterator[Live]:
    server = Live(settings or ServerSettings(port=0, drain_s=1))
    try:
        yield server
    finally:
        server.stopping.set()
        server.thread.join(60)
        server.listener.close()
        assert not server.thread.is_alive()


class Beside:
    """A long seeded stream, over and over, beside whatever else happens; each must equal the one given alone."""

    def __init__(self, server: Live, count: int) -> None:
        fields = {"stream": True, "temperature": 2.0, "seed": 7, "max_tokens": count, "ignore_eos": True}
        body = {"messages": [{"role": "user", "content": "Go on."}], "return_token_ids": True, **fields}
        self.body = json.dumps(body).encode()
        self.server, self.count = server, 0
        self.differing: list[list[int]] = []
        self.alone = self._stream()
        assert len(self.alone) > count
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="beside")

    def _stream(self) -> list[int]:
        answer = self.server.post(self.body)
        events = [line[6:] for line in answer.body.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")]
        ids: list[int] = [len(answer.body) and answer.status]
        for event in events:
            for choice in json.loads(event)["choices"]:
                ids += choice.get("token_ids") or ()
        return [*ids, answer.body.count(b"[DONE]")]

    def _run(self) -> None:
        while not self.over.is_set():
            found = self._stream()
            self.count += 1
            if found != self.alone:
                self.differing.append(found)

    def __enter__(self) -> Beside:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.thread.join(120)
        assert not self.thread.is_alive()


def is_back(server: Live, before: Held) -> bool:
    return eventually(lambda: server.is_floor(before), 60)
