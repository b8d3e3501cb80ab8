"""POST /v1/chat/completions: the engine's answers as OpenAI's, at once or streamed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from starlette.requests import Request as HTTPRequest
from starlette.types import Receive, Scope, Send

from mlxvlm.agent.rounds import Said
from mlxvlm.api.answers import ChatCompletion
from mlxvlm.api.assemble import ChatAssembler, ChoiceAssembler
from mlxvlm.api.base import parse
from mlxvlm.api.plan import ChatPlan, chat_plan
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.api.truncate import truncated
from mlxvlm.api.usage import together
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.request import Request, Usage
from mlxvlm.errors import ContextLengthError, MlxvlmError
from mlxvlm.messages import ImagePart, Message
from mlxvlm.server.answering import Answering, Arrived, Patience
from mlxvlm.server.connection import unless_gone
from mlxvlm.server.models import LoadedModel, Models
from mlxvlm.server.replies import error_body, log_failure, send_at_once
from mlxvlm.server.sse import DONE, KEEP_ALIVE, frame, send_events
from mlxvlm.server.tool_rounds import ServerTools

_log = logging.getLogger(__name__)

_ANSWER_PART = 4  # of the context: a fourth is kept free for the answer, where a chat is truncated

ReadJSON: TypeAlias = Callable[[HTTPRequest], Awaitable[Any]]
FetchPicture: TypeAlias = Callable[[str], Awaitable[Any]]  # an image_url's text -> what processors take
NoteUsage: TypeAlias = Callable[[Scope, str, Usage], None]  # the model's name, and what all choices took


@dataclass(frozen=True, slots=True)
class Doors:
    """What every endpoint works with."""

    models: Models
    read_json: ReadJSON
    fetch_picture: FetchPicture
    patience: Patience
    note_usage: NoteUsage
    tools: ServerTools


class ChatCompletions:
    """The endpoint, an ASGI application: all that a request holds ends with its call."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = parse(ChatCompletionRequest, await self._doors.read_json(HTTPRequest(scope, receive)))
        try:
            await unless_gone(receive, self._answer(body, scope, send))
        except TimeoutError:
            _log.warning("a client that takes too long to read its answer is cut off")

    async def _answer(self, body: ChatCompletionRequest, scope: Scope, send: Send) -> None:
        doors = self._doors
        async with doors.models.acquire(body.model) as model:
            offered = doors.tools.offered(body, model)
            plan = chat_plan(body, model.engine.config.sampling, model.tools, offered.tools)
            rounds = offered.submitter(plan)
            requests = await with_pictures(plan.requests, doors.fetch_picture)
            if body.truncate_sequence:
                requests = await asyncio.to_thread(fitting, model.engine, requests)
            async with Answering(rounds or model.engine, requests, doors.patience) as answering:
                is_prepared = await answering.prepared()
                note = partial(doors.note_usage, scope, model.name)
                reply = _Reply(body, chat_assembler(body, plan, model, has_rounds=rounds is not None), answering, note)
                if body.stream:
                    await send_events(send, reply.events(is_prepared), doors.patience.send_timeout_s)
                else:
                    await send_at_once(send, await reply.whole())


@dataclass(frozen=True, slots=True)
class _Reply:
    """One request's answer on its way out."""

    body: ChatCompletionRequest
    assembler: ChatAssembler
    answering: Answering
    note: Callable[[Usage], None]

    async def whole(self) -> ChatCompletion:
        """Raises the error of any choice."""
        deltas: Arrived = []
        async for arrived in self.answering:
            deltas += arrived
        completion = self.assembler.whole(
            deltas,
            self._prompt_token_ids(),
            with_logprobs=bool(self.body.logprobs),
            with_token_ids=bool(self.body.return_token_ids),
        )
        self.note(together(self.assembler.usages))
        return completion

    async def events(self, is_prepared: bool) -> AsyncGenerator[bytes, None]:
        """An error becomes an event, which ends the stream."""
        try:
            while not is_prepared:
                yield KEEP_ALIVE
                is_prepared = await self.answering.prepared()
            yield b"".join(map(frame, self.assembler.first(self._prompt_token_ids())))
            async for arrived in self.answering:
                chunks = [chunk for index, delta in arrived for chunk in self.assembler.feed(index, delta)]
                if chunks or not arrived:
                    yield b"".join(map(frame, chunks)) or KEEP_ALIVE
        except MlxvlmError as error:
            log_failure(error)
            yield frame(error_body(error)) + DONE
            return
        # Before the last write: after it, the client may be gone.
        self.note(together(self.assembler.usages))
        options = self.body.stream_options
        usage = frame(self.assembler.last()) if options is not None and options.include_usage else b""
        yield usage + DONE

    def _prompt_token_ids(self) -> tuple[int, ...] | None:
        return self.answering.prompt_token_ids if self.body.return_token_ids else None


def chat_assembler(
    body: ChatCompletionRequest, plan: ChatPlan, model: LoadedModel, *, has_rounds: bool = False
) -> ChatAssembler:
    """For the choices of one request. has_rounds: their Deltas are RoundDeltas."""
    engine = model.engine
    choices = [
        ChoiceAssembler(
            index,
            engine.processor.tokenizer.token_bytes if body.logprobs else None,
            frozenset() if body.ignore_eos else engine.config.eos_token_ids,
            Said() if has_rounds else plan.parser(),
            max_calls=plan.max_calls,
            with_token_ids=bool(body.return_token_ids),
        )
        for index in range(len(plan.requests))
    ]
    return ChatAssembler(choices, model.name)


async def with_pictures(requests: tuple[Request, ...], fetch_picture: FetchPicture) -> tuple[Request, ...]:
    """The requests of one plan, which share their messages, with their pictures fetched, each once."""
    fetched: dict[str, Any] = {}
    messages: list[Message] = []
    for message in requests[0].messages:
        for image in message.images:
            if image.source not in fetched:
                fetched[image.source] = await fetch_picture(image.source)
        parts = tuple(
            ImagePart(fetched[part.source]) if isinstance(part, ImagePart) else part for part in message.parts
        )
        messages.append(replace(message, parts=parts) if message.images else message)
    return tuple(replace(request, messages=messages) for request in requests)


def fitting(engine: Engine, requests: tuple[Request, ...]) -> tuple[Request, ...]:
    """The requests of one plan without the turns that the context has no room for."""
    first, max_context = requests[0], engine.config.max_context
    wanted = None if first.sampling is None else first.sampling.max_tokens
    room = min(wanted or max_context, max_context // _ANSWER_PART)

    def fits(messages: Sequence[Message]) -> bool:
        try:
            prompt = engine.processor(messages, first.template, first.image_options)
        except ContextLengthError:
            return False
        return len(prompt.token_ids) + room <= max_context

    messages = truncated(first.messages, fits)
    return tuple(replace(request, messages=messages) for request in requests)
