"""POST /v1/messages and /v1/messages/count_tokens: chats in Anthropic's shape."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from mlxvlm.api.anthropic.answers import Ping, TokenCount
from mlxvlm.api.anthropic.assemble import MessageAssembler
from mlxvlm.api.anthropic.convert import NAMES, chat_request
from mlxvlm.api.anthropic.request import CountTokensRequest, MessagesRequest
from mlxvlm.api.base import parse
from mlxvlm.api.naming import named
from mlxvlm.api.plan import blame_of, chat_plan
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.server.chat_completions import chat_answering
from mlxvlm.server.connection import unless_gone
from mlxvlm.server.doors import Doors
from mlxvlm.server.outgoing import Framing, Reply
from mlxvlm.server.replies import failed_message, json_reply
from mlxvlm.server.sse import named_frame

FRAMING = Framing(named_frame, failed_message, silence=named_frame(Ping()), done=b"")


def message_routes(doors: Doors) -> list[BaseRoute]:
    """Where they are."""
    return [
        Route("/v1/messages", Messages(doors), methods=["POST"]),
        Route("/v1/messages/count_tokens", partial(count_tokens, doors), methods=["POST"]),
    ]


class Messages:
    """The endpoint, an ASGI application: all that a request holds ends with its call."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = parse(MessagesRequest, await self._doors.read_json(Request(scope, receive)))
        await unless_gone(receive, self._answer(chat_request(body), scope, send))

    async def _answer(self, body: ChatCompletionRequest, scope: Scope, send: Send) -> None:
        doors = self._doors
        async with (
            doors.models.acquire(body.model) as model,
            chat_answering(doors, body, model, NAMES) as (answering, assembler),
        ):
            message = MessageAssembler(assembler, model.name)
            reply = Reply(message, answering, partial(doors.note_usage, scope, model.name), FRAMING)
            await reply.send(send, doors.patience.send_timeout_s, stream=bool(body.stream))


async def count_tokens(doors: Doors, request: Request) -> Response:
    """The length of the prompt that the same chat would make, pictures included."""
    body = chat_request(parse(CountTokensRequest, await doors.read_json(request)))
    async with doors.models.acquire(body.model) as model:
        with named(NAMES):
            offered = doors.tools.offered(body, model)
            plan = chat_plan(body, model.engine.config.sampling, model.tools, offered.tools)
        asked, *_ = await doors.with_pictures(plan.requests, blame_of(body, NAMES))
        process = model.engine.processor
        prompt = await asyncio.to_thread(process, asked.messages, asked.template, asked.image_options)
    return json_reply(TokenCount(input_tokens=len(prompt.token_ids)))
