"""Flags for tools that are answered here: web search and MCP servers. Knows names and help texts, no engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.agent.formats import ToolFormat
    from mlxvlm.agent.loop import BoundTool
    from mlxvlm.agent.rounds import Rounds, ToolAnswer
    from mlxvlm.agent.web_search import WebSearch
    from mlxvlm.checkpoint.load import ModelSource
    from mlxvlm.engine.engine import Engine
    from mlxvlm.engine.request import Request
    from mlxvlm.messages import ToolCall

_MAX_SHOWN_CHARS = 80  # of a call's arguments
_ROOM_PART = 4  # of the context, that one search's result may fill

OnCalls = Callable[["Sequence[ToolCall]"], None]


def add_tool_options(parser: argparse.ArgumentParser) -> None:
    """--enable-search, --search-url, --mcp-config, --max-tool-rounds."""
    group = parser.add_argument_group("tools that the model may use (docs/tools.md)")
    group.add_argument("--enable-search", action="store_true", help="web search (pip install 'mlxvlm[search]')")
    group.add_argument("--search-url", metavar="URL", help="search by this service, which answers JSON; {query} in it")
    group.add_argument(
        "--mcp-config", type=Path, metavar="FILE", help="tools of the MCP servers of a JSON file {'mcpServers': ...}"
    )
    group.add_argument("--max-tool-rounds", type=int, metavar="N", help="of calls in one answer (default: 8)")


@contextmanager
def mcp_tools(path: Path | None) -> Iterator[list[BoundTool]]:
    """The tools of a file's servers, which run until the block ends; they are listed on stderr. Raises UsageError."""
    if path is None:
        yield []
        return
    from mlxvlm.agent.mcp import McpTools, read_servers

    with McpTools(read_servers(path)) as servers:
        names = ", ".join(bound.tool.name for bound in servers.tools) or "none"
        print(f"mlxvlm: MCP tools: {names}", file=sys.stderr)
        yield servers.tools


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


def chat_tools(args: argparse.Namespace, source: ModelSource, mcp: Sequence[BoundTool]) -> ChatTools:
    """What add_tool_options gave. Raises UsageError."""
    from mlxvlm.agent.formats import tool_format
    from mlxvlm.agent.loop import MAX_ROUNDS, MOST_ROUNDS
    from mlxvlm.agent.web_search import check_search

    searches = args.enable_search or args.search_url is not None
    if searches:
        check_search(args.search_url)
    max_rounds = MAX_ROUNDS if args.max_tool_rounds is None else args.max_tool_rounds
    if not 1 <= max_rounds <= MOST_ROUNDS:
        raise UsageError(f"--max-tool-rounds is a number from 1 to {MOST_ROUNDS}, not {max_rounds}")
    format = tool_format(source.processor.template, source.processor.tokenizer)
    return ChatTools(format, mcp, searches, args.search_url, max_rounds)


def tool_answer(engine: Engine, rounds: Rounds) -> ToolAnswer:
    """Asks the engine."""
    from mlxvlm.agent.rounds import ToolAnswer

    return ToolAnswer(engine.submit, rounds)


def call_text(call: ToolCall) -> str:
    """A call on one short line."""
    arguments = " ".join((call.arguments or "{}").split())
    return f"{call.name} {arguments if len(arguments) <= _MAX_SHOWN_CHARS else arguments[:_MAX_SHOWN_CHARS] + '...'}"
