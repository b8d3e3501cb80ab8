"""A real server on a real socket: clients that are slow, silent, or leave, and how it ends."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx2
import pytest

from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import ModelError, UsageError
from mlxvlm.messages import user
from mlxvlm.server import serving
from mlxvlm.server.assembly import assemble
from mlxvlm.server.registry import ModelSpec, Progress, Registry
from mlxvlm.server.settings import ServerSettings
from tests.fakes import eventually
from tests.server import stub_app
from tests.server.loaders import FakeLoader

SETTINGS = ServerSettings(port=0, max_body_bytes=1 << 20, body_timeout_s=0.3, drain_s=5)
JSON = {"Content-Type": "application/json"}


class Running:
    """A server in a thread; stop() it."""

    def __init__(self, loader: FakeLoader, settings: ServerSettings = SETTINGS) -> None:
        self.listener = serving.listen(settings)
        self.url = serving.url_of(self.listener)
        self.port: int = self.listener.getsockname()[1]
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self._servers: list[Any] = []
        self._arguments = (loader, settings)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert eventually(lambda: bool(self._servers) or not self._thread.is_alive())

    def _run(self) -> None:
        loader, settings = self._arguments

        async def main() -> None:
            registry = Registry([ModelSpec("a", "a")], loader, drain_s=settings.drain_s)
            self._loop = asyncio.get_running_loop()
            genuine = serving._Server.__init__

            def keep(server: Any, *args: Any) -> None:
                genuine(server, *args)
                self._servers.append(server)

            serving._Server.__init__ = keep  # type: ignore[method-assign]
            try:
                await serving.serve(assemble(registry, settings), registry, settings, self.listener, self.ready.set)
            finally:
                serving._Server.__init__ = genuine  # type: ignore[method-assign]

        try:
            asyncio.run(main())
        except ModelError as error:
            self.error = error

    def signal(self) -> None:
        """What the first Ctrl-C does."""
        self._servers[0].should_exit = True

    def stop(self) -> None:
        self.signal()
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_connections(self) -> int:
        return len(self._servers[0].server_state.connections)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.settimeout(10)
        return connection

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, trust_env=False)

    def post(self, path: str, body: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, content=body, headers=JSON, trust_env=False)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, stub_app.NAME, stub_app.stub_module())


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running(FakeLoader())
    assert server.ready.wait(10)
    yield server
    server.stop()


def test_listens_first_and_is_ready_when_it_is_loaded() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    server = Running(loader)
    try:
        assert server.get("/health").status_code == 503
        assert not server.ready.is_set()
        loader.gate.set()
        assert server.ready.wait(10)
        assert server.get("/health").status_code == 200
    finally:
        loader.gate.set()
        server.stop()


def test_a_model_that_can_not_be_loaded_ends_the_server() -> None:
    server = Running(FakeLoader(faults=(ModelError("no such model"),)))
    assert eventually(lambda: not server.is_running)
    assert str(server.error) == "no such model"
    assert not server.ready.is_set()


def test_a_signal_while_loading() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    server = Running(loader)
    assert loader.entered.wait(10)
    server.stop()
    assert server.error is None
    assert loader.loaded == []


def test_running_requests_are_finished() -> None:
    server = Running(FakeLoader())
    assert server.ready.wait(10)
    with httpx2.stream("GET", f"{server.url}/slow?tenths=5", trust_env=False) as response:
        pieces = response.iter_bytes()
        text = next(pieces)
        server.signal()
        assert text + b"".join(pieces) == b".....done"
    server.stop()
    with pytest.raises(OSError, match="refused"):
        server.connect()


def test_a_deadline_for_running_requests() -> None:
    server = Running(FakeLoader(), ServerSettings(port=0, drain_s=0.2))
    assert server.ready.wait(10)
    begun = time.monotonic()
    with httpx2.stream("GET", f"{server.url}/slow?tenths=600", trust_env=False) as response:
        pieces = response.iter_bytes()  # kept: a client that drops it leaves
        next(pieces)
        server.stop()
    assert time.monotonic() - begun < 15


def test_bodies(running: Running) -> None:
    assert running.post("/echo", b'{"a": [1, 2]}').json() == {"a": [1, 2]}
    assert running.post("/echo", b"[" * 10_000 + b"]" * 10_000).status_code == 400
    assert running.post("/echo", b"NaN").status_code == 400
    large = b"[" + b"1," * 400_000 + b"1]"
    assert len(running.post("/echo", large).json()) == 400_001


def test_a_client_sees_why_its_large_body_is_refused(running: Running) -> None:
    reply = running.post("/echo", b"x" * (8 << 20))
    assert reply.status_code == 413
    assert "limit of 1 MiB" in reply.json()["error"]["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 16)

    assert running.post("/echo", pieces()).status_code == 413
    assert running.get("/health").status_code == 200


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode()


def own_head(running: Running, *lines: str) -> bytes:
    return head("/echo", f"Host: localhost:{running.port}", "Content-Type: application/json", *lines)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def drip(connection: socket.socket, byte: bytes) -> None:
    """Sends byte by byte until the server closes, which it must."""
    for _ in range(500):
        try:
            connection.sendall(byte)
        except OSError:
            return
        time.sleep(0.02)
    raise AssertionError("the server goes on waiting")


def test_slow_bodies(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "rest", 0.3)
    with closing(running.connect()) as connection:
        connection.sendall(own_head(running, "Content-Length: 100") + b"[")
        assert all_of(connection).startswith(b"HTTP/1.1 408 ")


def test_bodies_that_go_on_after_the_answer(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "rest", 0.3)
    with closing(running.connect()) as connection:
        connection.sendall(own_head(running, "Content-Length: 100000000"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
        drip(connection, b"1")


@pytest.mark.parametrize("start", [b"", b"P", b"POST /echo HTTP/1.1\r\nHost: localhost\r\nX-A: "])
def test_heads_that_never_end(running: Running, start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "head", 0.3)
    with closing(running.connect()) as connection:
        connection.sendall(start)
        assert all_of(connection) == b""


def test_a_second_head_that_drips(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "head", 0.3)
    with closing(running.connect()) as connection:
        connection.sendall(own_head(running, "Content-Length: 2") + b"[]")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        drip(connection, b"G")


def test_connections_are_kept_between_requests(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "head", 0.3)
    with httpx2.Client(trust_env=False) as client:
        for _ in range(3):
            assert client.post(f"{running.url}/echo", content=b"[]", headers=JSON).status_code == 200
            time.sleep(0.4)  # longer than a head may take
    with closing(running.connect()) as connection:
        for _ in range(2):
            connection.sendall(own_head(running, "Content-Length: 2") + b"[]")
            time.sleep(0.4)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_long_answer_is_no_slow_head(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "head", 0.2)
    monkeypatch.setitem(serving._LIMITS_S, "rest", 0.2)
    assert running.get("/slow?tenths=6").content == b"......done"


def test_clients_that_do_not_read(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving._LIMITS_S, "write", 0.3)
    with closing(running.connect()) as connection:
        connection.sendall(f"GET /large HTTP/1.1\r\nHost: localhost:{running.port}\r\n\r\n".encode())
        assert eventually(lambda: running.num_connections == 1)
        assert eventually(lambda: running.num_connections == 0)
        assert len(all_of(connection)) < 100 << 20
    # One that reads slowly, but reads, gets all.
    with httpx2.stream("GET", f"{running.url}/large", trust_env=False) as response:
        assert sum(len(piece) for piece in response.iter_bytes()) == 2_000 << 16


def test_heads_that_are_too_long(running: Running) -> None:
    with closing(running.connect()) as connection:
        connection.sendall(own_head(running, f"X-A: {'a' * 100_000}", "Connection: close"))
        assert all_of(connection)[:10] in (b"HTTP/1.1 4", b"")


@pytest.mark.parametrize(
    "lines",
    [
        ("Host: evil.example", "Content-Length: 2"),
        ("Content-Length: 2", "Content-Length: 3"),
        ("Content-Length: -1",),
        ("Content-Length: 2", "Transfer-Encoding: chunked"),
        ("Host: a\x01b",),
    ],
)
def test_heads_that_lie(running: Running, lines: tuple[str, ...]) -> None:
    with closing(running.connect()) as connection:
        connection.sendall(own_head(running, *lines, "Connection: close") + b"[]")
        connection.shutdown(socket.SHUT_WR)
        answer = all_of(connection)
    assert answer == b"" or answer.split()[1].startswith(b"4")
    assert running.get("/health").status_code == 200


def test_the_log_and_the_counters_see_it_all(running: Running) -> None:
    reply = running.get("/none")
    assert reply.headers["x-request-id"]
    assert "server" not in reply.headers
    text = running.get("/metrics").text
    assert 'mlxvlm_requests_total{method="GET",route="none",status="404"} 1.0' in text
    assert "mlxvlm_budget_bytes" in text


def test_ports() -> None:
    with (
        closing(serving.listen(ServerSettings(port=0))) as taken,
        pytest.raises(UsageError, match=r"port \d+ is in use"),
    ):
        serving.listen(ServerSettings(port=taken.getsockname()[1]))
    with pytest.raises(UsageError, match=r"can't listen on 192\.0\.2\.1"):
        serving.listen(ServerSettings(host="192.0.2.1", port=0))
    with closing(serving.listen(ServerSettings(host="0.0.0.0", port=0))) as everywhere:
        assert serving.url_of(everywhere).startswith("http://127.0.0.1:")


def test_a_loader_has_what_the_protocol_asks() -> None:
    from mlxvlm.server.loading import CheckpointLoader

    limits = {"max_rows": 2, "speculation": "on", "prefix_cache_bytes": 0}
    loader, spec = CheckpointLoader(), ModelSpec("demo", "demo", limits=limits, draft_model="demo")
    seen: list[tuple[int, int]] = []
    loader.check(spec)
    assert loader.fits(spec)
    assert not loader.fits(ModelSpec("none", "/no/such/folder"))
    report: Progress = lambda done, total: seen.append((done, total))  # noqa: E731 - a Progress
    loaded = loader.load(spec, report)
    assert loaded.tools is not None
    with loaded.engine as engine:
        assert engine.config.max_rows == 2
        usage = engine.generate(Request([user("Hello!")], SamplingParams(max_tokens=20))).usage
    assert usage.accepted_tokens > 10, "a model guesses its own words"
    assert seen
    assert json.dumps(seen)
