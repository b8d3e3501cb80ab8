"""Tools that the server itself answers: web search for requests that ask for it, tools of MCP servers for all.

A round's calls of these tools run here, and the model goes on; calls of the request's own tools end the answer.
`ToolRounds` stands between Answering and an engine, so that waiting, leaving and errors are as without tools.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from mlxvlm.agent.loop import MAX_ROUNDS, BoundTool
from mlxvlm.agent.rounds import TOO_LONG, Offer, Rounds
from mlxvlm.agent.tools import Tool
from mlxvlm.agent.web_search import Fetch, Search, SearchOptions, WebSearch
from mlxvlm.api.plan import ChatPlan
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.request import Delta, Request
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import RequestError
from mlxvlm.server.answering import Submitter
from mlxvlm.server.models import LoadedModel

ROOM_PART = 4  # of the context, that one search's result may fill

SearchFor: TypeAlias = Callable[[SearchOptions], Search]


@dataclass(frozen=True, slots=True)
class ServerTools:
    """All that a server was started with. search: None where requests can't ask for it; fetch_page: see WebSearch."""

    search: SearchFor | None = None
    fetch_page: Fetch | None = None
    mcp: tuple[BoundTool, ...] = ()
    max_rounds: int = MAX_ROUNDS

    def check(self, body: ChatCompletionRequest) -> None:
        """Raises RequestError where a request asks for a search that there is not."""
        if body.web_search_options is not None and self.search is None:
            raise RequestError(
                "this server was started without web search: start it with --enable-search, or leave "
                "web_search_options out",
                "web_search_options",
                "unsupported_parameter",
            )

    def offered(self, body: ChatCompletionRequest, model: LoadedModel) -> Offered:
        """What one request gets. Raises what check() raises."""
        self.check(body)
        wanted = body.web_search_options
        options = None if wanted is None else SearchOptions.from_openai(wanted.model_dump(exclude_none=True))
        # A form binds the whole answer: tools that the request did not ask for must not be in its way.
        is_bound = body.grammar is not None or (
            body.response_format is not None and body.response_format.type != "text"
        )
        mcp = () if model.tools is None or is_bound else self.mcp
        return Offered(self, model.engine, options, mcp, frozenset(tool.function.name for tool in body.tools or ()))


@dataclass(frozen=True, slots=True)
class Offered:
    """The server's tools for one request. options: of its search, if it may search. theirs: the request's own tools."""

    server: ServerTools
    engine: Engine
    options: SearchOptions | None
    mcp: tuple[BoundTool, ...]
    theirs: frozenset[str]

    @property
    def tools(self) -> list[Tool]:
        """For chat_plan()."""
        return [bound.tool for bound in self._bound(self._search()).values()]

    def submitter(self, plan: ChatPlan) -> Submitter | None:
        """What answers the plan's requests in rounds, as RoundDeltas; None where none of these tools may be called."""
        names = {tool.name for tool in plan.tools} & {tool.name for tool in self.tools}
        return ToolRounds(self.engine, partial(self._rounds, plan, names)) if names else None

    def _rounds(self, plan: ChatPlan, names: set[str], request: Request) -> Rounds:
        assert plan.format is not None
        search = self._search()  # sources are numbered anew for each choice
        bound = tuple(each for name, each in self._bound(search).items() if name in names)
        offer = Offer(plan.format, plan.tools, bound, plan.max_calls is None, plan.is_streamed)
        return Rounds(request, offer, max_rounds=self.server.max_rounds, search=search)

    def _search(self) -> WebSearch | None:
        if self.options is None or self.server.search is None:
            return None
        encode = self.engine.processor.tokenizer.encode
        return WebSearch(
            self.server.search(self.options),
            self.server.fetch_page,
            self.options,
            lambda text: len(encode(text, add_special_tokens=False)),
            self.engine.config.max_context // ROOM_PART,
        )

    def _bound(self, search: WebSearch | None) -> Mapping[str, BoundTool]:
        """By name. Of one name the request's own tool comes first, then the search's."""
        bound = (*self.mcp, *(search.tools() if search is not None else ()))
        return {each.tool.name: each for each in bound if each.tool.name not in self.theirs}


class ToolRounds:
    """A Submitter whose answers have several rounds."""

    def __init__(self, engine: Engine, rounds: Callable[[Request], Rounds]) -> None:
        self._engine, self._rounds = engine, rounds

    def submit(self, request: Request) -> RoundStream:
        """Raises what the engine's submit raises."""
        return RoundStream(self._engine, self._rounds(request))


class RoundStream:
    """One answer, as the engine's Stream is one, for one event loop."""

    def __init__(self, engine: Engine, rounds: Rounds) -> None:
        self._engine, self._rounds = engine, rounds
        self._first: Stream = engine.submit(rounds.request)
        self._stream = self._first
        self._cancelled = False

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """Of the first round."""
        return self._first.prompt_token_ids

    async def prepared(self) -> None:
        await self._first.prepared()

    def cancel(self) -> None:
        """Ends a round that is under way; who reads must be cancelled to end tools that run."""
        self._cancelled = True
        self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        rounds = self._rounds
        while True:
            try:
                async for delta in self._stream:
                    yield rounds.feed(delta)
            except TOO_LONG:
                if not rounds.shorten():
                    raise
            else:
                if rounds.is_over:
                    return
                await rounds.answer_calls()
            if self._cancelled:
                yield rounds.cut("cancelled")
                return
            self._stream = self._engine.submit(rounds.request)
