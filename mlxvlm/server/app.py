"""The HTTP door: which path leads where. What guards it is given by the caller."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlxvlm.errors import MlxvlmError, RequestError
from mlxvlm.server.answering import Patience
from mlxvlm.server.chat_completions import ChatCompletions
from mlxvlm.server.completions import Completions
from mlxvlm.server.doors import Doors, FetchPicture, NoteUsage, ReadJSON, Timed
from mlxvlm.server.messages import message_routes
from mlxvlm.server.models import ModelRoutes, Models
from mlxvlm.server.operations import TokenRoutes
from mlxvlm.server.replies import error_reply
from mlxvlm.server.responses import response_routes
from mlxvlm.server.tool_rounds import ServerTools

CLIENT_LEFT = 499  # nginx's code: nobody reads it but logs


async def read_json(request: Request) -> Any:
    """The body without limits of its own, for servers that nobody else can reach."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not JSON") from error


async def any_picture(source: str) -> Any:
    """The source as it is: processors fetch from anywhere, without a policy."""
    return source


def create_app(
    models: Models,
    *,
    read_json: ReadJSON = read_json,
    fetch_picture: FetchPicture = any_picture,
    note_usage: NoteUsage = lambda scope, model, usage: None,
    timed: Timed | None = None,
    middleware: Sequence[Middleware] = (),
    routes: Sequence[BaseRoute] = (),
    patience: Patience | None = None,
    tools: ServerTools | None = None,
) -> Starlette:
    """An ASGI application over these models.

    read_json: a request's body -> its value, within limits. fetch_picture: an image_url's text -> bytes, after the
    server's policy. note_usage: told of each answer, for a log; timed: stands between streams and their readers, to
    count. middleware: pure ASGI, outermost first. routes: more endpoints. patience: waiting times and bounds. tools:
    those that the server itself answers.
    """
    doors = Doors(models, read_json, fetch_picture, patience or Patience(), note_usage, timed, tools or ServerTools())
    about, tokens = ModelRoutes(models), TokenRoutes(doors)
    own = [
        Route("/v1/chat/completions", ChatCompletions(doors), methods=["POST"]),
        Route("/v1/completions", Completions(doors), methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        *response_routes(doors),
        *message_routes(doors),
        Route("/v1/models", about.all, methods=["GET"]),
        Route("/v1/models/{id:path}", about.one, methods=["GET"]),
        Route("/health", about.health, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {
        MlxvlmError: error_reply,
        HTTPException: error_reply,
        ClientDisconnect: _left,
        Exception: error_reply,
    }
    return Starlette(routes=[*routes, *own], middleware=middleware, exception_handlers=handlers)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)
