"""Flags for tools that are answered here: web search and MCP servers. Knows names and help texts, no engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.agent.loop import BoundTool
    from mlxvlm.agent.rounds import Rounds, ToolAnswer
    from mlxvlm.checkpoint.load import ModelSource
    from mlxvlm.cli.chat_tools import ChatTools
    from mlxvlm.engine.engine import Engine
    from mlxvlm.messages import ToolCall

_MAX_SHOWN_CHARS = 80  # of a call's arguments


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


def chat_tools(args: argparse.Namespace, source: ModelSource, mcp: Sequence[BoundTool]) -> ChatTools:
    """What add_tool_options gave. Raises UsageError."""
    from mlxvlm.agent.formats import tool_format
    from mlxvlm.agent.loop import MAX_ROUNDS, MOST_ROUNDS
    from mlxvlm.agent.web_search import check_search
    from mlxvlm.cli.chat_tools import ChatTools

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
