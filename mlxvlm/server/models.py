"""The models that a server answers with, and GET /v1/models. Knows nothing of how they are loaded."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from mlxvlm.api.answers import ModelCard, ModelList
from mlxvlm.api.plan import ToolFormat
from mlxvlm.engine.engine import Engine
from mlxvlm.errors import UnknownModelError
from mlxvlm.server.replies import json_reply

DEFAULT = "default"  # names the first model
_SHOWN_CHARS = 100  # of a name that is unknown


class LoadedModel(Protocol):
    """A model that is kept loaded while a request uses it."""

    @property
    def name(self) -> str: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def tools(self) -> ToolFormat | None: ...


class Models(Protocol):
    """All models that requests can name."""

    def acquire(self, name: str | None) -> AbstractAsyncContextManager[LoadedModel]:
        """The model of that name, loaded; None and "default" are the first. Raises UnknownModelError."""
        ...

    def resolve(self, name: str) -> str:
        """The served name behind a name. Raises UnknownModelError."""
        ...

    def cards(self) -> Sequence[ModelCard]:
        """The default model first."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether the first model is loaded."""
        ...


@dataclass(frozen=True, slots=True)
class SingleModel:
    """One engine that is always loaded."""

    name: str
    engine: Engine
    tools: ToolFormat | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @asynccontextmanager
    async def acquire(self, name: str | None) -> AsyncIterator[LoadedModel]:
        """Itself. Raises UnknownModelError for another's name."""
        self.resolve(DEFAULT if name is None else name)
        yield self

    def resolve(self, name: str) -> str:
        """Its name. Raises UnknownModelError for another's."""
        if name not in (DEFAULT, self.name):
            raise UnknownModelError(f"there is no model {name[:_SHOWN_CHARS]!r} here: name {self.name} or {DEFAULT!r}")
        return self.name

    def cards(self) -> Sequence[ModelCard]:
        return [ModelCard(id=self.name, created=self.created)]

    @property
    def is_ready(self) -> bool:
        return True


class ModelRoutes:
    """GET /v1/models, /v1/models/{id} and /health."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def all(self, request: Request) -> Response:
        """Every model that a request can name."""
        return json_reply(ModelList(data=list(self._models.cards())))

    async def one(self, request: Request) -> Response:
        """One of them; ids may hold slashes."""
        name = self._models.resolve(request.path_params["id"])
        return json_reply(next(card for card in self._models.cards() if card.id == name))

    async def health(self, request: Request) -> Response:
        """503 while the first model is loading, then 200."""
        ready = self._models.is_ready
        return Response(
            b'{"status": "ok"}' if ready else b'{"status": "loading"}',
            200 if ready else 503,
            {} if ready else {"Retry-After": "2"},
            "application/json",
        )
