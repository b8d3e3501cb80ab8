"""JSON answers and errors in OpenAI's shape. Nothing internal leaves through here."""

from __future__ import annotations

import logging
from http import HTTPStatus

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from mlxvlm.api.answers import Error, ErrorBody
from mlxvlm.api.anthropic.answers import error_of
from mlxvlm.api.base import MAX_PATH_CHARS
from mlxvlm.errors import AnswerTimeoutError, InternalError, MlxvlmError, ModelError
from mlxvlm.server.refusals import is_anthropics

_log = logging.getLogger(__name__)

INTERNAL = "the server has made a mistake; its log says more"
NOT_LOADED = "the model can't be loaded; the server's log says why"  # the reason names its files


def json_reply(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A body of ours."""
    return Response(body.model_dump_json().encode(), status, headers, "application/json")


async def send_at_once(send: Send, body: BaseModel) -> None:
    """A body of ours from inside an ASGI application."""
    data = body.model_dump_json().encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def error_body(error: Exception) -> ErrorBody:
    """What a client is told."""
    if isinstance(error, ModelError) and error.http_status >= 500:
        return _body(NOT_LOADED, error.http_status)
    if isinstance(error, MlxvlmError) and not isinstance(error, InternalError):
        return _body(str(error), error.http_status, error.param, error.code)
    if isinstance(error, HTTPException):
        return _body(error.detail, error.status_code)
    return _body(INTERNAL, 500)


def _body(message: str, status: int, param: str | None = None, code: str | None = None) -> ErrorBody:
    # Source: https://platform.openai.com/docs/guides/error-codes
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return ErrorBody(error=Error(message=message, type=kind, param=param, code=code))


async def error_reply(request: Request, error: Exception) -> Response:
    """The answer to a request that failed before its answer began."""
    if isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        error = HTTPException(status, _of_route(request, error), headers)
    else:
        status = error.http_status if isinstance(error, MlxvlmError) else HTTPStatus.INTERNAL_SERVER_ERROR
        headers = _retrying(error)
    log_failure(error)
    body: BaseModel = error_body(error)
    if is_anthropics(request.url.path):
        body = error_of(status, error_body(error).error.message)
    return json_reply(body, status, headers)


def _retrying(error: Exception) -> dict[str, str]:
    """When to ask again. Left alone, the clients ask thrice for what the same limit would end again."""
    if isinstance(error, AnswerTimeoutError):
        return {"X-Should-Retry": "false"}  # source: `_should_retry` of the `openai` and `anthropic` packages
    retry_after_s = getattr(error, "retry_after_s", None)
    return {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}


def _of_route(request: Request, error: HTTPException) -> str:
    """Starlette says no more than the status's name."""
    path = request.url.path[:MAX_PATH_CHARS]
    if error.status_code == HTTPStatus.NOT_FOUND:
        return f"there is no endpoint {path} here: /docs lists them"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return f"{path} is not for {request.method}: /docs lists the endpoints"
    return error.detail


def failed_message(error: Exception) -> list[BaseModel]:
    """The event that ends a stream of Anthropic's shape."""
    status = error.http_status if isinstance(error, MlxvlmError) else HTTPStatus.INTERNAL_SERVER_ERROR
    return [error_of(status, error_body(error).error.message)]


def log_failure(error: Exception) -> None:
    """What clients are not told; other exceptions are logged with their frames where they end."""
    if isinstance(error, InternalError | ModelError) and error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("%s\n%s", error, "\n".join(getattr(error, "__notes__", ())))
