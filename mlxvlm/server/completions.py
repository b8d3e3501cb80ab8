"""POST /v1/completions: the engine goes on with texts, at once or streamed."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request as HTTPRequest
from starlette.types import Receive, Scope, Send

from mlxvlm.api.base import parse
from mlxvlm.api.completions import CompletionAssembler, CompletionPlan, CompletionRequest, TextChoice, completion_plan
from mlxvlm.api.naming import Blame
from mlxvlm.processors.base import check_length
from mlxvlm.server.connection import unless_gone
from mlxvlm.server.doors import Doors
from mlxvlm.server.models import LoadedModel
from mlxvlm.server.outgoing import Reply


class Completions:
    """The endpoint, an ASGI application: all that a request holds ends with its call."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = parse(CompletionRequest, await self._doors.read_json(HTTPRequest(scope, receive)))
        await unless_gone(receive, self._answer(body, scope, send))

    async def _answer(self, body: CompletionRequest, scope: Scope, send: Send) -> None:
        doors = self._doors
        async with doors.models.acquire(body.model) as model:
            blame = Blame("prompt")
            with blame.laid():
                plan = await asyncio.to_thread(_plan, body, model)
            async with doors.answering(model, plan.requests, blame) as answering:
                note = partial(doors.note_usage, scope, model.name)
                reply = Reply(_assembler(body, plan, model), answering, note)
                await reply.send(send, doors.patience.send_timeout_s, stream=bool(body.stream))


def _plan(body: CompletionRequest, model: LoadedModel) -> CompletionPlan:
    config, tokenizer = model.engine.config, model.engine.processor.tokenizer

    def encode(text: str) -> list[int]:
        check_length(text, tokenizer, config.max_context)
        return tokenizer.encode_prompt(text)

    return completion_plan(body, config.sampling, encode, tokenizer.decode)


def _assembler(body: CompletionRequest, plan: CompletionPlan, model: LoadedModel) -> CompletionAssembler:
    engine = model.engine
    token_bytes = engine.processor.tokenizer.token_bytes
    end_ids = frozenset() if body.ignore_eos else engine.config.eos_token_ids
    choices = [TextChoice(index, token_bytes, end_ids, body, echo) for index, echo in enumerate(plan.echoes)]
    options = body.stream_options
    return CompletionAssembler(
        choices, model.name, plan.n, with_usage=options is not None and bool(options.include_usage)
    )
