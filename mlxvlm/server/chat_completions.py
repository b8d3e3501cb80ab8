"""POST /v1/chat/completions: the engine's answers as OpenAI's, at once or streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from pydantic import BaseModel
from starlette.requests import Request as HTTPRequest
from starlette.types import Receive, Scope, Send

from mlxvlm.agent.rounds import Said
from mlxvlm.api.assemble import ChatAssembler, plan_choices
from mlxvlm.api.base import parse
from mlxvlm.api.naming import named
from mlxvlm.api.plan import ChatPlan, blame_of, chat_plan
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.api.usage import together
from mlxvlm.engine.request import Delta, Usage
from mlxvlm.server.answering import Answering
from mlxvlm.server.connection import unless_gone
from mlxvlm.server.doors import Doors
from mlxvlm.server.models import LoadedModel
from mlxvlm.server.outgoing import Reply


class ChatCompletions:
    """The endpoint, an ASGI application: all that a request holds ends with its call."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = parse(ChatCompletionRequest, await self._doors.read_json(HTTPRequest(scope, receive)))
        await unless_gone(receive, self._answer(body, scope, send))

    async def _answer(self, body: ChatCompletionRequest, scope: Scope, send: Send) -> None:
        doors = self._doors
        async with (
            doors.models.acquire(body.model) as model,
            chat_answering(doors, body, model) as (answering, assembler),
        ):
            note = partial(doors.note_usage, scope, model.name)
            reply = Reply(_Chat(body, assembler), answering, note)
            await reply.send(send, doors.patience.send_timeout_s, stream=bool(body.stream))


@dataclass(frozen=True, slots=True)
class _Chat:
    """An Assembler: what the request wants to be told."""

    body: ChatCompletionRequest
    assembler: ChatAssembler

    def begin(self, prompts: Sequence[tuple[int, ...]]) -> Iterable[BaseModel]:
        return self.assembler.first(self._shown(prompts))

    def feed(self, index: int, delta: Delta) -> Iterable[BaseModel]:
        return self.assembler.feed(index, delta)

    def end(self) -> Iterable[BaseModel]:
        options = self.body.stream_options
        return [self.assembler.last()] if options is not None and options.include_usage else []

    def whole(self, prompts: Sequence[tuple[int, ...]], deltas: Iterable[tuple[int, Delta]]) -> BaseModel:
        return self.assembler.whole(
            deltas,
            self._shown(prompts),
            with_logprobs=bool(self.body.logprobs),
            with_token_ids=bool(self.body.return_token_ids),
        )

    @property
    def usage(self) -> Usage:
        return together(self.assembler.usages)

    def _shown(self, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
        return prompts[0] if self.body.return_token_ids else None


@asynccontextmanager
async def chat_answering(
    doors: Doors, body: ChatCompletionRequest, model: LoadedModel, names: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Answering, ChatAssembler]]:
    """A chat on its way, with the server's tools where they are asked for, and what reads it.

    names: a chat request's field -> that of the request which it was made of.
    """
    with named(names or {}):
        offered = doors.tools.offered(body, model)
        plan = chat_plan(body, model.engine.config.sampling, model.tools, offered.tools)
    rounds, blame = offered.submitter(plan), blame_of(body, names)
    requests = await doors.with_pictures(plan.requests, blame)
    async with doors.answering(model, requests, blame, rounds) as answering:
        yield answering, _assembler(body, plan, model, has_rounds=rounds is not None)


def _assembler(body: ChatCompletionRequest, plan: ChatPlan, model: LoadedModel, *, has_rounds: bool) -> ChatAssembler:
    """For the choices of one request. has_rounds: their Deltas are RoundDeltas."""
    engine = model.engine
    parser = Said if has_rounds else plan.parser
    choices = plan_choices(body, plan, engine.processor.tokenizer.token_bytes, engine.config.eos_token_ids, parser)
    return ChatAssembler(choices, model.name)
