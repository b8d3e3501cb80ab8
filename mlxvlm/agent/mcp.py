"""Tools of MCP servers: subprocesses that speak over their pipes, or HTTP addresses. Knows the `mcp` package.

Source: https://modelcontextprotocol.io. The package comes with the extra "mcp" and is imported when servers start.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvlm.agent.loop import TIMEOUT_S, BoundTool
from mlxvlm.agent.tools import Tool
from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mcp import Client

START_TIMEOUT_S = 30.0  # package runners download what they run
MAX_PAGES = 100  # of a server's list of tools
_MAX_NAME_CHARS = 64  # OpenAI's limit
_KEYS = {"type", "command", "args", "env", "cwd", "url", "headers", "disabled"}


@dataclass(frozen=True, slots=True)
class McpServer:
    """One server: a command with arguments, or a URL with headers. Secrets stay out of its repr."""

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def read_servers(path: Path) -> list[McpServer]:
    """Servers of a file {"mcpServers": {name: {"command", "args", "env", "cwd"} or {"url", "headers"}}}.

    Raises UsageError naming the file and the key.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} can't be read as JSON: {error}") from error
    servers = config.get("mcpServers") if isinstance(config, dict) else None
    if not isinstance(servers, dict):
        raise UsageError(f'{path} has no object "mcpServers"')
    entries = [
        (name, entry) for name, entry in servers.items() if not (isinstance(entry, dict) and entry.get("disabled"))
    ]
    return [_server(name, entry, path) for name, entry in entries]


def _server(name: str, entry: Any, path: Path) -> McpServer:
    where = f"{path}: the MCP server {name!r}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is no object")
    unknown = sorted(entry.keys() - _KEYS)
    if unknown:
        raise UsageError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    if bool(entry.get("command")) == bool(entry.get("url")):
        raise UsageError(f"{where} needs either a command or a url")
    for key in ("command", "url", "cwd"):
        if not isinstance(entry.get(key, ""), str):
            raise UsageError(f"{where}: {key} must be a text")
    args = entry.get("args", [])
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise UsageError(f"{where}: args must be a list of texts")
    for key in ("env", "headers"):
        values = entry.get(key, {})
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise UsageError(f"{where}: {key} must be an object of texts")
    known = {key: entry[key] for key in ("command", "env", "cwd", "url", "headers") if key in entry}
    return McpServer(name, args=tuple(args), **known)


class McpTools:
    """The tools of running servers. Close it, or use it in `with`: subprocesses end with it.

    A thread of its own has the connections' loop, so that tools can be called from any loop. A server that dies makes
    its tools' calls errors; the others go on.
    """

    def __init__(self, servers: Sequence[McpServer], *, timeout_s: float = TIMEOUT_S) -> None:
        """Starts all servers and asks for their tools. Raises UsageError naming the server that does not start."""
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise UsageError("MCP servers need the package mcp: pip install 'mlxvlm[mcp]'") from error
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mlxvlm-mcp", daemon=True)
        self._thread.start()
        self._stops: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.tools: list[BoundTool] = []
        try:
            self.tools = _named(asyncio.run_coroutine_threadsafe(self._start(servers), self._loop).result())
        except BaseException:
            self.close()
            raise

    async def _start(self, servers: Sequence[McpServer]) -> list[tuple[str, BoundTool]]:
        ready = [self._loop.create_future() for _ in servers]
        for listed in ready:  # of several errors one is raised
            listed.add_done_callback(lambda one: one.cancelled() or one.exception())
        self._stops = [asyncio.Event() for _ in servers]
        # A connection must be closed by the task that opened it.
        self._tasks = [
            self._loop.create_task(self._serve(*each)) for each in zip(servers, self._stops, ready, strict=True)
        ]
        found: list[tuple[str, BoundTool]] = []
        for server, listed in zip(servers, ready, strict=True):
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    tools = await listed
            except TimeoutError:
                raise UsageError(f"the MCP server {server.name!r} gave no tools in {START_TIMEOUT_S:g} s") from None
            found += [(server.name, tool) for tool in tools]
        return found

    async def _serve(self, server: McpServer, stop: asyncio.Event, ready: asyncio.Future[list[BoundTool]]) -> None:
        try:
            async with AsyncExitStack() as stack:
                client = await _connect(server, stack, self._timeout_s)
                ready.set_result(await self._list(client))
                await stop.wait()
        except Exception as error:  # noqa: BLE001 - whatever a server and its transport do
            if not ready.done():
                reason = _reason(error)
                ready.set_exception(UsageError(f"the MCP server {server.name!r} does not start: {reason}"))

    async def _list(self, client: Client) -> list[BoundTool]:
        tools: list[BoundTool] = []
        cursor = None
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            for one in page.tools:
                tool = Tool(one.name, one.description or "", dict(one.input_schema))
                tools.append(BoundTool(tool, partial(self._call, client, one.name), self._timeout_s))
            cursor = page.next_cursor
            if cursor is None:
                break
        return tools

    async def _call(self, client: Client, name: str, arguments: dict[str, Any]) -> str:
        asked = asyncio.run_coroutine_threadsafe(client.call_tool(name, arguments), self._loop)
        return _text_of(await asyncio.wrap_future(asked))

    def close(self) -> None:
        """Ends all servers. May be called more than once."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        for stop in self._stops:
            stop.set()
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=START_TIMEOUT_S)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def __enter__(self) -> McpTools:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


async def _connect(server: McpServer, stack: AsyncExitStack, timeout_s: float) -> Client:
    import httpx2
    from mcp import Client, StdioServerParameters
    from mcp.client.streamable_http import streamable_http_client

    if server.url:
        http = await stack.enter_async_context(httpx2.AsyncClient(headers=dict(server.headers), timeout=timeout_s))
        target: Any = streamable_http_client(server.url, http_client=http)
    else:
        target = StdioServerParameters(
            command=server.command, args=list(server.args), env=dict(server.env), cwd=server.cwd
        )
    return await stack.enter_async_context(Client(target, read_timeout_seconds=timeout_s))


def _named(tools: Sequence[tuple[str, BoundTool]]) -> list[BoundTool]:
    """Under names that models can write; with the server's name in front where two servers have the same."""
    plain = [_clean(bound.tool.name) for _, bound in tools]
    counts = Counter(plain)
    names = [
        _clean(f"{server}_{name}") if counts[name] > 1 else name for (server, _), name in zip(tools, plain, strict=True)
    ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"the MCP servers have two tools that would be called {twice[0]!r}: rename a server")
    return [replace(bound, tool=replace(bound.tool, name=name)) for (_, bound), name in zip(tools, names, strict=True)]


def _clean(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:_MAX_NAME_CHARS]


def _text_of(result: Any) -> str:
    """What a model reads of a tool's result; pictures and sounds are only named."""
    texts = [
        part.text if part.type == "text" else f"({part.type} left out: it can't be read as text)"
        for part in result.content
    ]
    if not texts and result.structured_content is not None:
        texts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return f"{'Error: ' if result.is_error else ''}{chr(10).join(texts)}"


def _reason(error: BaseException) -> str:
    """The first of a group's errors, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split())[:300] or type(error).__name__
