"""GET /openapi.json: what the server takes and gives, from the models that validate it. Knows no request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, RootModel
from pydantic.json_schema import models_json_schema

from mlxvlm import __version__
from mlxvlm.api.answers import ChatCompletion, ChatCompletionChunk, ErrorBody, ModelCard, ModelList
from mlxvlm.api.anthropic import answers as anthropic
from mlxvlm.api.anthropic.answers import MessagesErrorBody, TokenCount
from mlxvlm.api.anthropic.request import CountTokensRequest, MessagesRequest
from mlxvlm.api.completions import CompletionRequest, TextCompletion
from mlxvlm.api.operations import (
    DetokenizeRequest,
    Health,
    IsqRequest,
    ModelRequest,
    ModelState,
    Text,
    TokenizeRequest,
    Tokens,
)
from mlxvlm.api.responses import answers as responses
from mlxvlm.api.responses.answers import Deleted, ItemList
from mlxvlm.api.responses.request import ResponsesRequest
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.server.refusals import is_anthropics

_REF = "#/components/schemas/{model}"
# Of any request, by the guard; then those with a body.
_REFUSALS = {"400": "The request is wrong.", "401": "The API key is wrong.", "403": "Host or Origin are not allowed."}
_BODY_REFUSALS = {
    "404": "There is no such model.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests wait; Retry-After says when to come back.",
    "500": "The server has made a mistake.",
    "503": "The server is starting or ending.",
}
_TOO_LATE = {"504": "The request's own time was over before there was anything of an answer."}
_EVENTS = "Server-sent events: each `data:` is one of these as JSON, or an error; `data: [DONE]` is the last."
_NAMED_EVENTS = "Server-sent events: each `data:` is one of these as JSON, with its type as `event:`."
_PAGES: Mapping[str, Any] = {
    "order": {"enum": ["asc", "desc"], "default": "desc"},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    "after": {"type": "string", "description": "The id of an item: those that follow it."},
}


class ResponseStreamEvent(RootModel[responses.Event]):
    """One event of a streamed response."""


class MessageStreamEvent(RootModel[anthropic.Event | MessagesErrorBody]):
    """One event of a streamed message."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. text: the media type of an answer that is not JSON. query: parameters, with their schemas."""

    method: Literal["get", "post", "delete"]
    path: str
    summary: str
    request: type[BaseModel] | None = None
    response: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    text: str | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    is_open: bool = False  # also without the key

    @property
    def parameters(self) -> list[str]:
        """Names in the path."""
        return [piece[1:-1] for piece in self.path.split("/") if piece.startswith("{")]


OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "A chat, answered at once or streamed.",
        ChatCompletionRequest,
        ChatCompletion,
        ChatCompletionChunk,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Texts that are gone on with, without a chat template.",
        CompletionRequest,
        TextCompletion,
        TextCompletion,
    ),
    Operation(
        "post",
        "/v1/responses",
        "OpenAI's Responses API: an answer that is kept.",
        ResponsesRequest,
        responses.Response,
        ResponseStreamEvent,
    ),
    Operation("get", "/v1/responses/{id}", "A kept response.", None, responses.Response),
    Operation("delete", "/v1/responses/{id}", "Forgets a response.", None, Deleted),
    Operation(
        "post", "/v1/responses/{id}/cancel", "Ends a response that is made in the background.", None, responses.Response
    ),
    Operation("get", "/v1/responses/{id}/input_items", "What a response was asked.", None, ItemList, query=_PAGES),
    Operation(
        "post", "/v1/messages", "Anthropic's Messages API.", MessagesRequest, anthropic.Message, MessageStreamEvent
    ),
    Operation("post", "/v1/messages/count_tokens", "The tokens of a prompt.", CountTokensRequest, TokenCount),
    Operation("get", "/v1/models", "The models that requests can name; `default` is the first.", None, ModelList),
    Operation("get", "/v1/models/{id}", "One of them.", None, ModelCard),
    Operation("post", "/v1/models/{id}/load", "Loads a model, and answers when it is.", None, ModelState),
    Operation("post", "/v1/models/{id}/unload", "Frees a model's memory.", None, ModelState),
    Operation("post", "/v1/models/load", "The same with the name in the body.", ModelRequest, ModelState),
    Operation("post", "/v1/models/unload", "The same with the name in the body.", ModelRequest, ModelState),
    Operation("post", "/v1/models/reload", "mistral.rs's word for load.", ModelRequest, ModelState),
    Operation("post", "/v1/models/status", "What has become of a model.", ModelRequest, ModelState),
    Operation("post", "/re_isq", "Loads a model again, quantised otherwise.", IsqRequest, ModelState),
    Operation("post", "/tokenize", "The tokens of a text, or of a chat's prompt.", TokenizeRequest, Tokens),
    Operation("post", "/detokenize", "The text of tokens.", DetokenizeRequest, Text),
    Operation("get", "/health", "503 while the first model is loading, then 200.", None, Health, is_open=True),
    Operation("get", "/metrics", "Counters as Prometheus reads them.", text="text/plain"),
    Operation("get", "/openapi.json", "What this page is made of.", text="application/json", is_open=True),
    Operation("get", "/docs", "The endpoints and their fields, as a page.", text="text/html", is_open=True),
)


def document(*, has_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document. has_key: the server asks for one. Source: https://spec.openapis.org/oas/v3.1.1"""
    requests = {each.request for each in OPERATIONS if each.request}
    answers = {each for one in OPERATIONS for each in (one.response, one.event, _error(one)) if each}
    wanted: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((each, "validation") for each in sorted(requests, key=_name)),
        *((each, "serialization") for each in sorted(answers, key=_name)),
    ]
    refs, schemas = models_json_schema(wanted, ref_template=_REF)
    known: dict[Any, Any] = {model: schema for (model, _), schema in refs.items()}
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = _operation(each, known, has_key=has_key)
    components: dict[str, Any] = {"schemas": schemas.get("$defs", {})}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mlxvlm", "version": __version__, "license": {"name": "MIT", "identifier": "MIT"}},
        "paths": paths,
        "components": components,
    }
    if has_key:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        found["security"] = [{"bearer": []}, {"key": []}]
    return found


def _operation(each: Operation, known: dict[Any, Any], *, has_key: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": each.summary,
        "operationId": "_".join([each.method, *_words(each.path)]),
        "responses": {"200": {"description": "The answer.", "content": dict(_contents(each, known))}},
    }
    path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in each.parameters]
    query = [{"name": name, "in": "query", "schema": schema} for name, schema in each.query.items()]
    if path or query:
        found["parameters"] = path + query
    if each.request is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": known[each.request]}}}
    refusals = _REFUSALS | (_BODY_REFUSALS if each.method == "post" or each.parameters else {})
    refusals |= _TOO_LATE if each.event is not None else {}
    error = {"application/json": {"schema": known[_error(each)]}}
    found["responses"] |= {status: {"description": why, "content": error} for status, why in refusals.items()}
    if each.response is Health:
        content = {"application/json": {"schema": known[Health]}}
        found["responses"]["503"] = {"description": "The first model is loading.", "content": content}
    if has_key and each.is_open:
        found["security"] = []
    return found


def _error(each: Operation) -> type[BaseModel]:
    return MessagesErrorBody if is_anthropics(each.path) else ErrorBody


def _contents(each: Operation, known: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    if each.response is not None:
        yield "application/json", {"schema": known[each.response]}
    if each.event is not None:
        inside = {"contentMediaType": "application/json", "contentSchema": known[each.event]}
        told = _NAMED_EVENTS if each.event in (ResponseStreamEvent, MessageStreamEvent) else _EVENTS
        yield "text/event-stream", {"schema": {"type": "string", "description": told, **inside}}
    if each.text is not None:
        yield each.text, {"schema": {"type": "object" if each.text.endswith("json") else "string"}}


def _words(path: str) -> list[str]:
    return [piece.strip("{}").replace(".", "_") for piece in path.split("/") if piece]


def _name(model: type[BaseModel]) -> str:
    return model.__name__
