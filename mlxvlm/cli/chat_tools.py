"""What the model of one chat may call: web search and the tools of MCP servers. Knows no flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.agent.formats import ToolFormat
    from mlxvlm.agent.loop import BoundTool
    from mlxvlm.agent.rounds import Rounds
    from mlxvlm.agent.web_search import WebSearch
    from mlxvlm.engine.engine import Engine
    from mlxvlm.engine.request import Request
    from mlxvlm.messages import ToolCall

_ROOM_PART = 4  # of the context, that one search's result may fill

OnCalls = Callable[["Sequence[ToolCall]"], None]


@dataclass
class ChatTools:
    """What one chat's model may call. search_url: of a service; None: ddgs. searches: whether the search is on."""

    format: ToolFormat
    mcp: Sequence[BoundTool] = ()
    searches: bool = False
    search_url: str | None = None
    max_rounds: int = 8

    @property
    def names(self) -> list[str]:
        """Of all tools that are on."""
        return [bound.tool.name for bound in self._bound(self._search(lambda text: 0, None))]

    def rounds(self, engine: Engine, request: Request, on_calls: OnCalls) -> Rounds | None:
        """One answer's; None where nothing is on. Raises UsageError for an answer whose form is bound."""
        from mlxvlm.agent.rounds import Offer, Rounds

        encode = engine.processor.tokenizer.encode
        room = engine.config.max_context // _ROOM_PART
        search = self._search(lambda text: len(encode(text, add_special_tokens=False)), room)
        bound = tuple(self._bound(search))
        if not bound:
            return None
        if request.sampling is not None and request.sampling.grammar is not None:
            raise UsageError("a grammar binds the whole answer, which then can't call tools: leave one of them out")
        offer = Offer(self.format, tuple(each.tool for each in bound), bound)
        return Rounds(offer.first(request), offer, max_rounds=self.max_rounds, search=search, on_calls=on_calls)

    def _search(self, count_tokens: Callable[[str], int], room: int | None) -> WebSearch | None:
        from mlxvlm.agent.web_search import SearchOptions, WebSearch, search_by

        if not self.searches:
            return None
        options = SearchOptions()
        return WebSearch(search_by(self.search_url, options), _fetch_page, options, count_tokens, room)

    def _bound(self, search: WebSearch | None) -> list[BoundTool]:
        named = {bound.tool.name: bound for bound in (*self.mcp, *(search.tools() if search is not None else ()))}
        return list(named.values())


async def _fetch_page(url: str) -> bytes:
    from mlxvlm.server.fetch import PAGE, PAGE_LIMITS, Fetcher

    fetcher = Fetcher(False, PAGE_LIMITS, wanted=PAGE)  # each search has a loop of its own
    try:
        return await fetcher(url)
    finally:
        fetcher.close()
