"""Tools in the chat and in run: what is offered, shown and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxvlm.agent.loop import BoundTool
from mlxvlm.agent.tools import Tool
from mlxvlm.cli.chat.commands import take
from mlxvlm.cli.chat.session import Session
from mlxvlm.cli.chat_tools import ChatTools
from mlxvlm.cli.tool_options import call_text
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.errors import UsageError
from mlxvlm.messages import ToolCall
from tests.agent.test_mcp import SCRIPT
from tests.processors.conftest import Web, web
from tests.scripted import FORMAT, ScriptedEngine, calling, offered_names

__all__ = ["web"]
ROOT = Path(__file__).parents[3]
ADD = BoundTool(Tool("add"), lambda arguments: arguments["a"] + arguments["b"])


def session_of(engine: ScriptedEngine, **tools: Any) -> Session:
    taken: Any = engine
    return Session(taken, "fake", "a model", SamplingParams(max_tokens=500), tools=ChatTools(FORMAT, **tools))


def say(session: Session, line: str, told: list[str]) -> str:
    outcome = take(session, line)
    assert outcome.ask is not None
    shown: list[str] = []
    session.answer(outcome.ask, shown.append, on_calls=lambda calls: told.extend(map(call_text, calls)))
    return "".join(shown)


def test_a_tool_is_used_and_the_answer_is_kept() -> None:
    engine, told = ScriptedEngine(calling("add", '{"a": 1, "b": 2}'), "Three.", "Yes."), []
    session = session_of(engine, mcp=(ADD,))
    assert say(session, "What is 1 + 2?", told) == "Three."
    assert told == ['add {"a": 1, "b": 2}']
    assert [turn.text for turn in session.turns] == ["What is 1 + 2?", "Three."]
    say(session, "Sure?", told)
    assert "tool" not in engine.prompts[-1], "results are not kept"


def test_search_is_switched(web: Web) -> None:
    web.add("/?q=cats", json.dumps([{"title": "T", "url": "https://a.example", "content": "They sleep."}]).encode())
    engine, told = ScriptedEngine("No tools."), []
    session = session_of(engine, search_url=f"{web.url}/")
    assert "no tools" in take(session, "\\tools").note
    assert take(session, "\\search").note == "Web search is off."
    assert say(session, "How long do cats sleep?", told) == "No tools."
    assert take(session, "\\search on").note == "Web search is on."
    assert take(session, "\\tools").note.splitlines() == ["search_the_web", "website_content_extractor"]
    engine.script = [calling("search_the_web", '{"query": "cats"}'), "Long [1]."]
    assert say(session, "And now?", told) == "Long [1]."
    assert session.sources == ["T: https://a.example"]
    assert "They sleep." in engine.prompts[-1]
    take(session, "/search off")
    say(session, "Well?", told)
    assert session.sources == []
    assert [offered_names(request) != [] for request in engine.asked] == [False, True, True, False]
    with pytest.raises(UsageError, match="on or off"):
        take(session, "\\search maybe")


def test_search_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ddgs", None)
    session = session_of(ScriptedEngine(""))
    with pytest.raises(UsageError, match=r"pip install 'mlxvlm\[search\]'"):
        take(session, "\\search on")
    assert take(session, "\\search").note == "Web search is off."


def test_a_bound_answer_can_not_call() -> None:
    session = session_of(ScriptedEngine(""), mcp=(ADD,))
    session.sampling = SamplingParams(grammar=Grammar("regex", "a"))
    with pytest.raises(UsageError, match="can't call tools"):
        say(session, "Hello", [])


def test_calls_are_shown_short() -> None:
    assert call_text(ToolCall("1", "f", "")) == "f {}"
    assert len(call_text(ToolCall("1", "f", "x" * 999))) < 90


@pytest.mark.parametrize("command", [["run", "Hello!"], ["chat"]])
def test_mcp_servers_of_a_file(command: list[str], tmp_path: Path) -> None:
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"tiny": {"command": sys.executable, "args": [SCRIPT]}}}))
    flags = ["-m", "demo", "--max-tokens", "3", "--mcp-config", str(config), "--max-tool-rounds", "2"]
    line = [sys.executable, "-m", "mlxvlm", command[0], *flags, *command[1:]]
    done = subprocess.run(line, cwd=ROOT, input="Hello!", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "mlxvlm: MCP tools: add, who_am_I, fail" in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "flags", [["--mcp-config", "nowhere.json"], ["--search-url", "ftp://x"], ["--max-tool-rounds", "0"]]
)
def test_flags_that_have_no_meaning(flags: list[str]) -> None:
    line = [sys.executable, "-m", "mlxvlm", "run", "-m", "demo", *flags, "Hello!"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
