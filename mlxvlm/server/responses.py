"""POST /v1/responses, and the responses that are kept: OpenAI's Responses API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response as HTTPResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from mlxvlm.agent.reader import is_json
from mlxvlm.api.base import parse
from mlxvlm.api.messages import ChatMessage
from mlxvlm.api.naming import named
from mlxvlm.api.responses.answers import Deleted, ItemList, OutputMessage, Response, ResponseError
from mlxvlm.api.responses.assemble import ResponseAssembler
from mlxvlm.api.responses.convert import NAMES, chat_request, turns_of
from mlxvlm.api.responses.request import ResponsesRequest
from mlxvlm.api.responses.shown import response_of, shown_items
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.api.turns import Turns, with_sources
from mlxvlm.engine.request import Usage
from mlxvlm.errors import ImageError, MlxvlmError, OverloadedError, RequestError
from mlxvlm.server.chat_completions import chat_answering
from mlxvlm.server.connection import unless_gone
from mlxvlm.server.doors import Doors, FetchPicture
from mlxvlm.server.models import LoadedModel
from mlxvlm.server.outgoing import Framing, Reply
from mlxvlm.server.replies import error_body, json_reply, log_failure, send_at_once
from mlxvlm.server.response_store import Kept, ResponseStore, picture_name
from mlxvlm.server.sse import KEEP_ALIVE, named_frame

MAX_BACKGROUND = 64  # that run at once: more would only wait in the engine's queue, with all that they hold
_PAGE = 20  # items of an input in one answer
_MAX_PAGE = 100
_RUNNING = ("queued", "in_progress")
_log = logging.getLogger(__name__)


def response_routes(doors: Doors, store: ResponseStore | None = None) -> list[BaseRoute]:
    """Where they are. store: for tests."""
    endpoint = Responses(doors, store or ResponseStore())
    one = "/v1/responses/{id}"
    return [
        Route("/v1/responses", endpoint, methods=["POST"]),
        Route(one, endpoint.one, methods=["GET", "DELETE"]),  # one route, so that a 405's Allow names both
        Route(f"{one}/cancel", endpoint.cancel, methods=["POST"]),
        Route(f"{one}/input_items", endpoint.input_items, methods=["GET"]),
    ]


@dataclass(slots=True)
class _Seen:
    """Fetches a request's pictures, those of earlier responses from where they are kept, and remembers them."""

    fetch: FetchPicture
    kept: Mapping[str, bytes]
    pictures: dict[str, bytes] = field(default_factory=dict)  # by the sources in the turns

    async def __call__(self, source: str) -> Any:
        data = self.kept[source] if source in self.kept else await self.fetch(source)
        if isinstance(data, bytes):
            self.pictures[source] = data
        return data


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request with all that came before it."""

    body: ResponsesRequest
    turns: Sequence[ChatMessage]
    chat: ChatCompletionRequest
    seen: _Seen

    def kept(self, response: Response) -> Kept:
        """What of it is stored."""
        items = shown_items(self.body)
        if response.status in _RUNNING:
            return Kept(response, items, self.turns, self.seen.kept)
        turns = Turns(self.turns)
        for item in response.output:
            if isinstance(item, OutputMessage):
                turns.answer("".join(part.text for part in item.content))
            elif is_json(item.arguments):
                turns.call(item.call_id, item.name, item.arguments)
            else:  # it was cut off while it was streamed: no template takes half a call, and nobody can answer it
                turns.answer(f"{item.name} {item.arguments}")
        names = {source: picture_name(data) for source, data in self.seen.pictures.items()}
        pictures = {names[source]: data for source, data in self.seen.pictures.items()}
        return Kept(response, items, with_sources(turns.messages(), names), pictures)


class Responses:
    """The endpoints. Called itself, an ASGI application, it makes a response."""

    def __init__(self, doors: Doors, store: ResponseStore) -> None:
        self._doors, self._store = doors, store
        self._running: dict[str, asyncio.Task[None]] = {}  # in the background, by response
        store.on_drop = self._stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = parse(ResponsesRequest, await self._doors.read_json(Request(scope, receive)))
        asked = self._asked(body)
        if body.background:
            await send_at_once(send, self._start(asked))
            return
        await unless_gone(receive, self._answer(asked, scope, send))

    async def one(self, request: Request) -> HTTPResponse:
        """A stored response: shown, or forgotten."""
        return await (self.delete if request.method == "DELETE" else self.retrieve)(request)

    async def retrieve(self, request: Request) -> HTTPResponse:
        """A response as it is now."""
        if request.query_params.get("stream", "false") != "false":
            raise RequestError("a stored response is not streamed: leave stream out", "stream", "unsupported_parameter")
        return json_reply(self._store.get(request.path_params["id"]).response)

    async def delete(self, request: Request) -> HTTPResponse:
        """One that runs is stopped."""
        name = request.path_params["id"]
        self._store.drop(name)
        return json_reply(Deleted(id=name))

    async def cancel(self, request: Request) -> HTTPResponse:
        """Stops a response in the background; one that has ended stays as it is."""
        kept = self._store.get(request.path_params["id"])
        if not kept.response.background:
            raise RequestError("only a response with background: true can be cancelled: close the connection")
        if kept.response.status in _RUNNING:
            kept = replace(kept, response=kept.response.model_copy(update={"status": "cancelled"}))
            self._stop(kept.response.id)
            self._store.put(kept)
        return json_reply(kept.response)

    async def input_items(self, request: Request) -> HTTPResponse:
        """What was asked, the last first unless order=asc; without what previous responses were asked."""
        items = list(self._store.get(request.path_params["id"]).items)
        query = request.query_params
        order, limit, after = query.get("order", "desc"), query.get("limit", str(_PAGE)), query.get("after")
        if order not in ("asc", "desc"):
            raise RequestError("order is asc or desc", "order")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= _MAX_PAGE):
            raise RequestError(f"limit is a number from 1 to {_MAX_PAGE}", "limit")
        if order == "desc":
            items.reverse()
        if after is not None:
            ids = [item.id for item in items]
            if after not in ids:
                raise RequestError("after names none of the items", "after")
            items = items[ids.index(after) + 1 :]
        page = items[: int(limit)]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return json_reply(ItemList(data=page, first_id=first, last_id=last, has_more=len(items) > len(page)))

    def _asked(self, body: ResponsesRequest) -> _Asked:
        if body.background and body.stream:
            raise RequestError(
                "a response in the background is not streamed: ask for it by its id", "stream", "unsupported_parameter"
            )
        if body.background and body.store is False:
            raise RequestError("a response in the background must be stored", "store")
        name = body.previous_response_id
        if name is None:
            turns, pictures = turns_of(body), {}
        else:
            earlier = self._store.get(name)
            status = earlier.response.status
            if status not in ("completed", "incomplete"):
                raise RequestError(f"the previous response is {status}: it has no answer", "previous_response_id")
            turns, pictures = turns_of(body, earlier.turns), dict(earlier.pictures)
        return _Asked(body, turns, chat_request(body, turns), _Seen(self._doors.fetch_picture, pictures))

    async def _answer(self, asked: _Asked, scope: Scope, send: Send) -> None:
        async with self._doors.models.acquire(asked.chat.model) as model:
            response = response_of(asked.body, model.name)
            note = partial(self._doors.note_usage, scope, model.name)
            async with self._replying(asked, model, response, note) as reply:
                await reply.send(send, self._doors.patience.send_timeout_s, stream=bool(asked.body.stream))

    @asynccontextmanager
    async def _replying(
        self, asked: _Asked, model: LoadedModel, response: Response, note: Callable[[Usage], None]
    ) -> AsyncIterator[Reply]:
        """The answer on its way, which is stored at its end."""
        doors = replace(self._doors, fetch_picture=asked.seen)
        async with chat_answering(doors, asked.chat, model, NAMES) as (answering, chat):
            assembler = ResponseAssembler(chat, response)

            def end(usage: Usage) -> None:
                note(usage)
                self._keep(asked, assembler.response)

            def failed(error: Exception) -> Iterable[BaseModel]:
                events = list(assembler.fail(_told(error)))
                self._keep(asked, assembler.response)
                return events

            yield Reply(assembler, answering, end, Framing(named_frame, failed, KEEP_ALIVE, b""))

    def _keep(self, asked: _Asked, response: Response) -> None:
        """One that was deleted in the meantime stays deleted."""
        if response.store and (not response.background or response.id in self._store):
            self._store.put(asked.kept(response))

    def _start(self, asked: _Asked) -> Response:
        """A response that is made in the background. What is wrong without its model being loaded is told at once."""
        name = self._doors.models.resolve(asked.chat.model)
        with named(NAMES):
            self._doors.tools.check(asked.chat)
        if len(self._running) >= MAX_BACKGROUND:
            raise OverloadedError(f"{MAX_BACKGROUND} responses are being made in the background: try again later")
        response = response_of(asked.body, name)
        self._store.put(asked.kept(response))
        if response.id not in self._store:
            raise RequestError("the request is too large to be kept: send it without background", "background")
        task = asyncio.create_task(self._run(asked, response))
        self._running[response.id] = task
        task.add_done_callback(partial(self._ended, asked, response))
        return response

    async def _run(self, asked: _Asked, response: Response) -> None:
        async with self._doors.models.acquire(asked.chat.model) as model:
            response = response.model_copy(update={"model": model.name, "status": "in_progress"})
            async with self._replying(asked, model, response, lambda usage: None) as reply:
                self._keep(asked, response)
                await reply.whole()

    def _ended(self, asked: _Asked, response: Response, task: asyncio.Task[None]) -> None:
        """Tells of an error where the answer will be looked for."""
        self._running.pop(response.id, None)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, MlxvlmError):
            log_failure(error)
        elif error is not None:
            _log.error("a defect in a response in the background", exc_info=error)
        if isinstance(error, Exception):
            self._keep(asked, response.model_copy(update={"status": "failed", "error": _told(error)}))

    def _stop(self, name: str) -> None:
        task = self._running.pop(name, None)
        if task is not None:
            task.cancel()


def _told(error: Exception) -> ResponseError:
    # The codes are those that the `openai` package knows.
    status = error.http_status if isinstance(error, MlxvlmError) else 500
    if isinstance(error, OverloadedError):
        code = "rate_limit_exceeded"
    elif isinstance(error, ImageError):
        code = "invalid_image"
    else:
        code = "invalid_prompt" if status < 500 else "server_error"
    return ResponseError(code=code, message=error_body(error).error.message)
