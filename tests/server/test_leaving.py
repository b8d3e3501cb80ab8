"""Clients that leave, read slowly or wait long, over real sockets; the model is a fake that can be held."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import openai
import pytest

from mlxvlm.engine.engine import Engine
from mlxvlm.messages import ImageOptions, Message
from mlxvlm.processors.base import AS_THE_CHECKPOINT, Prompt
from mlxvlm.server.answering import Patience
from mlxvlm.server.app import create_app
from mlxvlm.server.models import SingleModel
from tests.fakes import FakeModel, FakeProcessor, Gate, answer, eventually, fake_engine, is_empty
from tests.server.serving import client_of, serving

LONG = 3000  # tokens: seconds of work


class HeldProcessor(FakeProcessor):
    """Waits in the pool until opened."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(
        self,
        messages: Sequence[Message],
        template: Mapping[str, Any] | None = None,
        options: ImageOptions = AS_THE_CHECKPOINT,
    ) -> Prompt:
        self.entered.set()
        assert self.opened.wait(30)
        return super().__call__(messages, template, options)


def slow(x: mx.array) -> None:
    time.sleep(0.001)


@contextmanager
def served(engine: Engine, patience: Patience | None = None, **options: Any) -> Iterator[str]:
    with engine, serving(create_app(SingleModel("fake", engine), patience=patience), **options) as url:
        yield url


def body_of(text: str = "12", count: int = 5, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": count, **fields}


def connected(
    url: str,
    request: dict[str, Any],
    *,
    small: bool = False,
    cut: int | None = None,
    path: str = "/v1/chat/completions",
) -> socket.socket:
    """A request that is on its way, or its first `cut` bytes."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    body = json.dumps(request).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall((f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)[:cut])
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def read_until(connection: socket.socket, words: bytes, data: bytes = b"", times: int = 1) -> bytes:
    """All that came, `data` first, once the words stand in it so many times."""
    while data.count(words) < times:
        piece = connection.recv(4096)
        assert piece, "the connection was closed"
        data += piece
    return data


def text_of(ids: Sequence[int]) -> str:
    return "".join(chr(ord("0") + token) for token in ids)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    engine = fake_engine(FakeModel(on_call=slow))
    with served(engine) as url:
        with connected(url, body_of(count=LONG, stream=stream, n=3)):
            assert eventually(lambda: engine.stats().generated_tokens > 30)
            before = engine.stats().generated_tokens
        assert eventually(lambda: is_empty(engine))
        assert before < engine.stats().generated_tokens < 3 * LONG


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_is_prepared(stream: bool) -> None:
    engine = fake_engine()
    engine.processor = held = HeldProcessor()
    with served(engine) as url:
        with connected(url, body_of(stream=stream)):
            assert held.entered.wait(20)
        assert eventually(lambda: is_empty(engine))
        held.opened.set()
        assert engine.stats().generated_tokens == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_for_a_row(stream: bool) -> None:
    engine = fake_engine(FakeModel(on_call=slow), max_rows=1)
    with served(engine) as url, connected(url, body_of(count=LONG, stream=True)) as first:
        assert eventually(lambda: engine.stats().running == 1)
        with connected(url, body_of("34", stream=stream)):
            assert eventually(lambda: engine.stats().waiting == 1)
        assert eventually(lambda: engine.stats().waiting == 0)
        assert engine.stats().running == 1
        first.close()
        assert eventually(lambda: is_empty(engine))


def test_clients_that_leave_at_random_moments_leave_nothing() -> None:
    engine = fake_engine(FakeModel(on_call=slow))
    rng = random.Random(5)
    with served(engine) as url, client_of(url) as client:
        body = body_of(count=20)
        whole = client.chat.completions.create(model="fake", **body)
        floor = mx.get_active_memory()
        clients = []
        for _ in range(60):
            request = body_of(count=LONG, stream=rng.random() < 0.5, n=rng.randint(1, 3))
            cut = rng.randint(0, 200) if rng.random() < 0.2 else None
            clients.append(connected(url, request, cut=cut))
            if rng.random() < 0.7:
                leaver = clients.pop(rng.randrange(len(clients)))
                if rng.random() < 0.3:
                    leaver.settimeout(0.01)
                    with suppress(TimeoutError):
                        leaver.recv(rng.randint(1, 4000))
                leaver.close()
        for leaver in clients:
            leaver.close()
        assert eventually(lambda: is_empty(engine))
        assert eventually(lambda: mx.get_active_memory() <= floor)
        again = client.chat.completions.create(model="fake", **body)
        assert again.choices[0].message.content == whole.choices[0].message.content


def test_silence_is_filled_with_comments() -> None:
    gate = Gate()
    engine = fake_engine(FakeModel(on_call=gate))
    engine.processor = held = HeldProcessor()
    with served(engine, Patience(keep_alive_s=0.02)) as url:
        with connected(url, body_of(stream=True)) as connection:
            data = read_until(connection, b": keep-alive\n\n", times=3)
            assert b"data:" not in data, "nothing is said before the prompt is made"
            held.opened.set()
            data = read_until(connection, b'"role"', data)
            data = read_until(connection, b"keep-alive", data, data.count(b"keep-alive") + 3)
            gate.opened.set()
            data = read_until(connection, b"[DONE]", data)
        events = [line for line in data.split(b"\n") if line.startswith(b"data: {")]
        said = [json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(said) == text_of(answer([1, 2], 5))


def test_an_error_after_the_start_is_an_event_and_the_end() -> None:
    model = FakeModel()
    model.nan_token = answer([1, 2], 3)[-1]
    with served(fake_engine(model)) as url:
        with connected(url, {**body_of(stream=True, n=2, stream_options={"include_usage": True})}) as connection:
            data = read_until(connection, b"[DONE]")
        events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
        error = json.loads(events[-2])["error"]
        assert (error["type"], events[-1].strip()) == ("server_error", b"[DONE]")
        assert "NaN" not in error["message"], "what is wrong with us is for the log"
        with client_of(url) as client, pytest.raises(openai.APIError):
            list(client.chat.completions.create(model="fake", stream=True, **body_of()))
        with client_of(url) as client, pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="fake", **body_of())


def test_an_error_of_a_prompt_that_took_long_is_an_event_too() -> None:
    engine = fake_engine()
    engine.processor = held = HeldProcessor()
    with (
        served(engine, Patience(keep_alive_s=0.02)) as url,
        connected(url, body_of("refuse", stream=True)) as connection,
    ):
        data = read_until(connection, b"keep-alive")
        held.opened.set()
        data = read_until(connection, b"[DONE]", data)
        assert b'"refused"' in data


@pytest.mark.parametrize("stream", [True, False])
def test_time_that_ends_before_the_answer_begins_is_a_status(stream: bool) -> None:
    engine = fake_engine()
    engine.processor = held = HeldProcessor()
    with served(engine) as url, client_of(url) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.with_options(max_retries=2).chat.completions.create(
                model="fake", stream=stream, **body_of(), extra_body={"timeout": 0.05}
            )
        held.opened.set()
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert "--request-timeout" in caught.value.message
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "0", "it would end so again"
        assert eventually(lambda: is_empty(engine))


@pytest.mark.parametrize(("stream", "n"), [(True, 1), (False, 1), (False, 3)])
def test_time_that_ends_before_the_first_token(stream: bool, n: int) -> None:
    gate = Gate()
    engine = fake_engine(FakeModel(on_call=gate))
    with served(engine) as url, connected(url, body_of(stream=stream, n=n, timeout=0.2)) as connection:
        assert gate.entered.wait(20)
        if stream:
            read_until(connection, b'"role"')
        time.sleep(0.3)
        gate.opened.set()
        data = read_until(connection, b"[DONE]" if stream else b"}}")
        assert b'"code":"timeout"' in data
        assert (b"HTTP/1.1 504" in data) is not stream
        assert eventually(lambda: is_empty(engine))


@pytest.mark.parametrize("stream", [True, False])
def test_time_that_ends_after_the_first_token_ends_the_answer(stream: bool) -> None:
    engine = fake_engine(FakeModel(on_call=slow))
    # Time enough for the first token on a busy machine.
    with served(engine) as url, connected(url, body_of(count=10**6, stream=stream, timeout=2)) as connection:
        data = read_until(connection, b"[DONE]" if stream else b'"usage"')
        assert b'"finish_reason":"length"' in data
        assert b"HTTP/1.1 200" in data
        assert b'"error"' not in data


def test_too_many_requests_are_told_when_to_come_back() -> None:
    gate = Gate()
    engine = fake_engine(FakeModel(on_call=gate), max_rows=1, max_queue=2)
    with served(engine) as url, client_of(url) as client, connected(url, body_of()) as first:
        assert gate.entered.wait(20)
        second = connected(url, body_of())
        assert eventually(lambda: (engine.stats().running, engine.stats().waiting) == (1, 1))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="fake", n=2, **body_of())
        assert (caught.value.type, caught.value.code) == ("rate_limit_error", "rate_limit_exceeded")
        assert caught.value.response.headers["retry-after"] == "2"
        gate.opened.set()
        for connection in (first, second):
            read_until(connection, b'"finish_reason":"length"')
        second.close()
        assert eventually(lambda: is_empty(engine))
        assert engine.stats().generated_tokens == 2 * 5, "the choice that got in is cancelled"


@pytest.mark.parametrize("patience", [Patience(max_unread=100), Patience(send_timeout_s=0.1)], ids=["behind", "still"])
def test_a_reader_that_does_not_read_is_cut_off(patience: Patience) -> None:
    engine = fake_engine(FakeModel(on_call=slow))
    with served(engine, patience, small=True) as url:
        with connected(url, body_of(count=LONG, stream=True, return_token_ids=True), small=True) as connection:
            assert eventually(lambda: engine.stats().generated_tokens > 0)
            assert eventually(lambda: is_empty(engine))
            assert engine.stats().generated_tokens < LONG
            assert b"[DONE]" not in read_to_end(connection)
        with client_of(url) as client:
            completion = client.chat.completions.create(model="fake", **body_of())
            assert completion.choices[0].message.content == text_of(answer([1, 2], 5))
