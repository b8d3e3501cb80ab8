"""A server that plays the API's part: canned answers, streamed as OpenAI frames them, and the page on top."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlxvlm.server.page import routes


@dataclass
class Answer:
    """What the fake says to one question: text in pieces, or an error instead of it or in its middle."""

    text: str = "A red heart and a black square on a white background."
    piece: int = 4  # characters
    pause_s: float = 0.0  # after each piece
    finish: str | None = "stop"  # None: the connection ends in the middle
    error: tuple[int, str] | None = None  # status, message; 200: an event in the stream after the text
    retry_after_s: int | None = None
    is_broken: bool = False  # the connection is cut after the text
    is_measured: bool = True  # usage with the times that OpenAI's has not


@dataclass
class FakeApi:
    """`answers` are used up in turn; the last one goes on. `bodies` are the requests that came."""

    answers: list[Answer] = field(default_factory=lambda: [Answer()])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    key: str | None = None
    num_disconnected: int = 0

    def app(self) -> Starlette:
        api = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            # A picture of the server's own, for answers that try to load it.
            Route("/beacon/{rest:path}", self.beacon),
        ]
        return Starlette(routes=[*routes(), *api])

    def say(self, *answers: Answer | str) -> None:
        self.answers = [Answer(each) if isinstance(each, str) else each for each in answers]

    async def beacon(self, request: Request) -> Response:
        self.paths.append(request.url.path)
        return Response("", media_type="image/png")

    async def models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"data": [{"id": "demo"}, {"id": "Qwen/Qwen2-VL-2B-Instruct"}]})

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "This server needs an API key.")

    async def chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        self.bodies.append(await request.json())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer.error and answer.error[0] != 200:
            return _error(*answer.error, retry_after_s=answer.retry_after_s)
        return StreamingResponse(self._stream(answer), media_type="text/event-stream")

    async def _stream(self, answer: Answer) -> AsyncIterator[str]:
        try:
            yield ": waiting\n\n"
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for start in range(0, len(answer.text), answer.piece):
                piece = answer.text[start : start + answer.piece]
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
                await asyncio.sleep(answer.pause_s)
        except asyncio.CancelledError:
            self.num_disconnected += 1
            raise
        if answer.is_broken:
            raise RuntimeError
        if answer.error:
            yield "event: error\n" + _event({"error": {"message": answer.error[1], "type": "server_error"}})
            return
        if answer.finish is None:
            return
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish}]})
        yield _event({"choices": [], "usage": usage(answer)})
        yield "data: [DONE]\n\n"


def usage(answer: Answer) -> dict[str, Any]:
    num_words = len(answer.text.split())
    if not answer.is_measured:
        return {"prompt_tokens": 7, "completion_tokens": num_words}
    return {
        "prompt_tokens": 312,
        "completion_tokens": num_words,
        "prompt_tokens_details": {"cached_tokens": 280},
        "avg_compl_tok_per_sec": 41.27,
        "time_to_first_token_sec": 0.384,
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error(status: int, message: str, retry_after_s: int | None = None) -> JSONResponse:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse({"error": {"message": message, "type": "error"}}, status_code=status, headers=headers)


@contextmanager
def serving(app: Starlette, port: int = 0) -> Iterator[str]:
    """Serves on a free port of loopback; gives the address without a slash."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
