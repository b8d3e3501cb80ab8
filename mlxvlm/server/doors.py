"""What every endpoint that answers works with. Knows no shape of requests or answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from starlette.requests import Request as HTTPRequest
from starlette.types import Scope

from mlxvlm.api.naming import Blame
from mlxvlm.engine.request import Delta, Request, Usage
from mlxvlm.messages import ImagePart, Message
from mlxvlm.server.answering import Answering, Deltas, Patience, Submitter
from mlxvlm.server.models import LoadedModel, Models
from mlxvlm.server.tool_rounds import ServerTools

ReadJSON: TypeAlias = Callable[[HTTPRequest], Awaitable[Any]]
FetchPicture: TypeAlias = Callable[[str], Awaitable[Any]]  # an image_url's text -> what processors take
NoteUsage: TypeAlias = Callable[[Scope, str, Usage], None]  # the model's name, and what all choices took
Timed: TypeAlias = Callable[[str, Deltas], AsyncGenerator[Delta, None]]  # the model's name


@dataclass(frozen=True, slots=True)
class Doors:
    """timed: the Deltas of a stream, whatever is counted of them; None: nothing is. tools: that the server answers."""

    models: Models
    read_json: ReadJSON
    fetch_picture: FetchPicture
    patience: Patience
    note_usage: NoteUsage
    timed: Timed | None = None
    tools: ServerTools = field(default_factory=ServerTools)

    def answering(
        self, model: LoadedModel, requests: Sequence[Request], blame: Blame, submitter: Submitter | None = None
    ) -> Answering:
        """The streams of these requests. submitter: what stands before the model's engine."""
        timed = self.timed
        counted = None if timed is None else (lambda stream: timed(model.name, stream))
        return Answering(submitter or model.engine, requests, self.patience, counted, blame.lay)

    async def with_pictures(self, requests: Sequence[Request], blame: Blame) -> tuple[Request, ...]:
        """The requests of one plan, which share their messages, with their pictures fetched, each once."""
        with blame.laid():
            return await self._with_pictures(requests)

    async def _with_pictures(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        fetched: dict[str, Any] = {}
        messages: list[Message] = []
        for message in requests[0].messages:
            for image in message.images:
                if image.source not in fetched:
                    fetched[image.source] = await self.fetch_picture(image.source)
            parts = tuple(
                ImagePart(fetched[part.source]) if isinstance(part, ImagePart) else part for part in message.parts
            )
            messages.append(replace(message, parts=parts) if message.images else message)
        return tuple(replace(request, messages=messages) for request in requests)
