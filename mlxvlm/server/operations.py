"""Tokens, loading and re-quantising over HTTP. Knows no answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from mlxvlm.api.base import parse
from mlxvlm.api.operations import (
    DetokenizeRequest,
    IsqRequest,
    ModelRequest,
    ModelState,
    Text,
    TokenizeRequest,
    Tokens,
)
from mlxvlm.api.plan import blame_of, chat_plan
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.errors import RequestError, UsageError
from mlxvlm.processors.base import Prompt, check_messages
from mlxvlm.server.doors import Doors, ReadJSON
from mlxvlm.server.models import LoadedModel
from mlxvlm.server.replies import json_reply


class Switchboard(Protocol):
    """What a registry of models that come and go has."""

    def resolve(self, name: str) -> str: ...

    def state(self, name: str) -> ModelState: ...

    async def load(self, name: str | None = None) -> None: ...

    async def unload(self, name: str) -> None: ...

    async def re_isq(self, name: str, isq: str | int | None) -> None: ...


class TokenRoutes:
    """POST /tokenize and /detokenize."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    async def tokenize(self, request: HTTPRequest) -> Response:
        """Counts, ids and texts of a text or a chat's prompt."""
        body = parse(TokenizeRequest, await self._doors.read_json(request))
        if (body.text is None) == (body.messages is None):
            raise RequestError("give either text or messages", "text")
        if body.messages is None and (body.tools or body.chat_template_kwargs):
            raise RequestError("tools and chat_template_kwargs belong to messages", "tools")
        if body.messages is not None and body.add_special_tokens is not None:
            raise RequestError("a chat's special tokens are its template's: leave it out", "add_special_tokens")
        async with self._doors.models.acquire(body.model) as model:
            ids = await (self._of_text(body, model) if body.messages is None else self._of_chat(body, model))
            token_bytes = model.engine.processor.tokenizer.token_bytes
            texts = {token: token_bytes(token).decode("utf-8", "replace") for token in {*ids}}
            found = Tokens(
                model=model.name,
                count=len(ids),
                tokens=list(ids),
                texts=[texts[token] for token in ids],
                max_context=model.engine.config.max_context,
            )
        return json_reply(found)

    async def _of_text(self, body: TokenizeRequest, model: LoadedModel) -> Sequence[int]:
        special = body.add_special_tokens is not False
        encode = model.engine.processor.tokenizer.encode
        return await asyncio.to_thread(encode, body.text or "", add_special_tokens=special)

    async def _of_chat(self, body: TokenizeRequest, model: LoadedModel) -> Sequence[int]:
        given = {name: getattr(body, name) for name in ("messages", "tools", "chat_template_kwargs")}
        # Checked already: the same models are inside.
        chat = ChatCompletionRequest.model_construct(**{name: each for name, each in given.items() if each is not None})
        own = self._doors.tools.offered(chat, model).tools
        plan = chat_plan(chat, model.engine.config.sampling, model.tools, own)
        blame = blame_of(chat)
        [asked] = await self._doors.with_pictures(plan.requests, blame)

        def prompt() -> Prompt:
            check_messages(asked.messages)
            return model.engine.processor(asked.messages, asked.template, asked.image_options)

        with blame.laid():
            return (await asyncio.to_thread(prompt)).token_ids

    async def detokenize(self, request: HTTPRequest) -> Response:
        """The text of token ids."""
        body = parse(DetokenizeRequest, await self._doors.read_json(request))
        async with self._doors.models.acquire(body.model) as model:
            tokenizer = model.engine.processor.tokenizer
            special = body.skip_special_tokens is False
            text = await asyncio.to_thread(tokenizer.decode_all if special else tokenizer.decode, body.tokens)
        return json_reply(Text(model=model.name, text=text))


def switch_routes(models: Switchboard, read_json: ReadJSON) -> list[Route]:
    """POST /v1/models/{id}/load and /unload; mistral.rs's with the id in the body; /re_isq."""
    switches = SwitchRoutes(models, read_json)
    return [
        Route("/v1/models/load", switches.load, methods=["POST"]),
        Route("/v1/models/reload", switches.load, methods=["POST"]),
        Route("/v1/models/unload", switches.unload, methods=["POST"]),
        Route("/v1/models/status", switches.status, methods=["POST"]),
        Route("/v1/models/{id:path}/load", switches.load, methods=["POST"]),
        Route("/v1/models/{id:path}/unload", switches.unload, methods=["POST"]),
        Route("/re_isq", switches.re_isq, methods=["POST"]),
    ]


class SwitchRoutes:
    """Models that are loaded, unloaded and re-quantised."""

    def __init__(self, models: Switchboard, read_json: ReadJSON) -> None:
        self._models, self._read_json = models, read_json

    async def load(self, request: HTTPRequest) -> Response:
        """Answers when the model is loaded."""
        name = await self._name(request)
        await self._models.load(name)
        return json_reply(self._models.state(name))

    async def unload(self, request: HTTPRequest) -> Response:
        """Answers when its memory is free; the next request that names it loads it again."""
        name = await self._name(request)
        await self._models.unload(name)
        return json_reply(self._models.state(name))

    async def status(self, request: HTTPRequest) -> Response:
        """What has become of it."""
        return json_reply(self._models.state(await self._name(request)))

    async def re_isq(self, request: HTTPRequest) -> Response:
        """Answers when the model is loaded again from its source, quantised as it is now said."""
        body = parse(IsqRequest, await self._read_json(request))
        if (body.ggml_type is None) == (body.isq is None):
            raise RequestError("give one of ggml_type and isq", "ggml_type")
        wanted, param = (body.isq, "isq") if body.ggml_type is None else (body.ggml_type, "ggml_type")
        name = self._models.resolve(body.model)
        try:
            await self._models.re_isq(name, None if wanted == "none" else wanted)
        except UsageError as error:
            error.param = param
            raise
        return json_reply(self._models.state(name))

    async def _name(self, request: HTTPRequest) -> str:
        """Of the path, else of the body."""
        given = request.path_params.get("id")
        if given is None:
            body = parse(ModelRequest, await self._read_json(request))
            if (body.model is None) == (body.model_id is None):
                raise RequestError("give the model's name", "model")
            given = body.model or body.model_id or ""
        return self._models.resolve(given)
