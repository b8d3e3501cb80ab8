"""Tools of real MCP servers, tiny ones."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mlxvlm.agent.loop import Answer, BoundTool, run_in_thread, run_tools
from mlxvlm.agent.mcp import McpServer, McpTools, read_servers
from mlxvlm.errors import UsageError
from mlxvlm.messages import ToolCall, user

pytest.importorskip("mcp")
SCRIPT = str(Path(__file__).with_name("mcp_server.py"))
TINY = McpServer("tiny", sys.executable, (SCRIPT,), {"WHO": "me"})


@pytest.fixture(scope="module")
def tiny() -> Iterator[McpTools]:
    with McpTools([TINY]) as tools:
        yield tools


def ask(tools: list[BoundTool], name: str, arguments: str = "{}") -> str:
    """The result of one call, as the loop gives it to the model."""
    answers = [Answer("", (ToolCall("1", name, arguments),)), Answer()]
    return run_in_thread(lambda: run_tools([user("?")], tools, lambda *_: answers.pop(0))).turns[-1].text


def test_tools(tiny: McpTools) -> None:
    tools = {bound.tool.name: bound.tool for bound in tiny.tools}
    assert sorted(tools) == ["add", "data", "die", "fail", "hang", "picture", "who_am_I"]
    assert tools["add"].description == "Adds two numbers."
    assert tools["add"].parameters["required"] == ["a", "b"]
    assert ask(tiny.tools, "add", '{"a": 1, "b": 2}') == "3"
    assert ask(tiny.tools, "who_am_I") == "me"
    assert ask(tiny.tools, "data") == '{"é": 1}'
    assert ask(tiny.tools, "picture") == "(image left out: it can't be read as text)"


def test_errors_of_a_tool(tiny: McpTools) -> None:
    assert ask(tiny.tools, "fail") == "Error: on purpose"
    assert ask(tiny.tools, "add", '{"a": 2, "b": 2}') == "4"


def test_a_server_that_dies_and_one_that_does_not() -> None:
    with McpTools([McpServer("one", *(TINY.command, TINY.args)), McpServer("two", TINY.command, TINY.args)]) as tools:
        names = {bound.tool.name for bound in tools.tools}
        assert {"one_add", "two_add", "one_die", "one_who_am_I"} <= names
        assert ask(tools.tools, "one_die") == "Error: MCPError: Connection closed"
        assert ask(tools.tools, "one_add", '{"a": 1, "b": 2}') == "Error: MCPError: Connection closed"
        assert ask(tools.tools, "two_add", '{"a": 1, "b": 2}') == "3"
        assert ask(tools.tools, "two_who_am_I") == "nobody"


def test_a_call_that_takes_too_long() -> None:
    tools = McpTools([TINY], timeout_s=0.5)
    assert ask(tools.tools, "hang").startswith("Error: ")
    tools.close()
    tools.close()


def test_over_http() -> None:
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("http", log_level="ERROR")

    @server.tool()
    def add(a: int, b: int) -> int:
        return a + b

    config = uvicorn.Config(server.streamable_http_app(), port=0, log_level="error")
    serving = uvicorn.Server(config)
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    while not serving.started:
        time.sleep(0.01)
    port = serving.servers[0].sockets[0].getsockname()[1]
    with McpTools([McpServer("http", url=f"http://127.0.0.1:{port}/mcp")]) as tools:
        assert ask(tools.tools, "add", '{"a": 1, "b": 2}') == "3"
    serving.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    "server",
    [McpServer("x", "/no/such/program"), McpServer("x", "true"), McpServer("x", url="http://127.0.0.1:9/mcp")],
    ids=["no program", "ends at once", "nobody listens"],
)
def test_a_server_that_does_not_start(server: McpServer) -> None:
    with pytest.raises(UsageError, match="the MCP server 'x' does not start: "):
        McpTools([TINY, server])


def test_names_that_can_not_be_told_apart() -> None:
    twice = McpServer("tiny", TINY.command, TINY.args)
    with pytest.raises(UsageError, match="two tools that would be called 'tiny_add'"):
        McpTools([twice, twice])


def test_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    servers = {
        "pipe": {"command": "npx", "args": ["-y"], "env": {"KEY": "secret"}, "cwd": "/"},
        "http": {"type": "http", "url": "https://x.example/mcp", "headers": {"Authorization": "secret"}},
        "off": {"command": "x", "disabled": True},
    }
    file.write_text(json.dumps({"mcpServers": servers}))
    found = read_servers(file)
    assert found == [
        McpServer("pipe", "npx", ("-y",), {"KEY": "secret"}, "/"),
        McpServer("http", url="https://x.example/mcp", headers={"Authorization": "secret"}),
    ]
    assert "secret" not in repr(found)


WRONG: list[tuple[Any, str]] = [
    ([], 'has no object "mcpServers"'),
    ({"servers": {}}, 'has no object "mcpServers"'),
    ({"mcpServers": {"x": 1}}, "'x' is no object"),
    ({"mcpServers": {"x": {"cmd": "y"}}}, "'x' has the unknown key 'cmd'"),
    ({"mcpServers": {"x": {}}}, "needs either a command or a url"),
    ({"mcpServers": {"x": {"command": "a", "url": "b"}}}, "needs either a command or a url"),
    ({"mcpServers": {"x": {"command": 1}}}, "command must be a text"),
    ({"mcpServers": {"x": {"command": "a", "args": "b"}}}, "args must be a list of texts"),
    ({"mcpServers": {"x": {"command": "a", "env": {"b": 1}}}}, "env must be an object of texts"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[message for _, message in WRONG])
def test_mistakes_in_the_file(tmp_path: Path, config: Any, message: str) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        read_servers(file)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read as JSON"):
        read_servers(tmp_path / "none.json")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(UsageError, match=r"pip install 'mlxvlm\[mcp\]'"):
        McpTools([])
