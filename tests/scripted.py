"""An engine that says what a script has, so that a model's calls can be written down. No MLX."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from mlxvlm.agent.formats import ToolFormat
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Delta, FinishReason, Request, Usage
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import MlxvlmError
from tests.agent.templates import HERMES, TOKENIZER, format_of
from tests.fakes import FakeProcessor

PIECE = 5  # characters of a Delta
PROMPT_TOKENS = 10
FORMAT: ToolFormat = format_of(HERMES, TOKENIZER)


def calling(name: str, arguments: str = "{}") -> str:
    """A call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class ScriptedEngine:
    """Answers with `script` in turn, the last entry again and again: a text, an error, or a function of the request.

    With `held` set, the next answers wait after their first Delta.
    """

    def __init__(self, *script: str | MlxvlmError | Callable[[Request], str], max_context: int = 4096) -> None:
        self.script = list(script)
        self.config = EngineConfig(max_context, frozenset(), SamplingParams(max_tokens=1000))
        self.processor: Any = FakeProcessor()
        self.processor.tokenizer = TOKENIZER
        self.asked: list[Request] = []
        self.cancelled = 0
        self.held: threading.Event | None = None

    def submit(self, request: Request) -> Stream:
        self.asked.append(request)
        stream = Stream(self._cancel)
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if callable(said):
            said = said(request)
        if isinstance(said, MlxvlmError):
            stream.put(said)
            return stream
        stream.begin(tuple(range(PROMPT_TOKENS)))
        pieces = [said[start : start + PIECE] for start in range(0, len(said), PIECE)] or [""]
        limit = request.sampling.max_tokens if request.sampling and request.sampling.max_tokens else len(pieces)
        assert limit > 0
        reason: FinishReason = "stop" if limit >= len(pieces) else "length"
        if request.timeout_s is not None and request.timeout_s <= 0.001:
            reason, pieces = "timeout", [""]
        for index, text in enumerate(pieces[:limit]):
            stream.put(Delta(text, (index,)))
        count = min(limit, len(pieces))
        stream.put(Delta("", (), (), reason, Usage(PROMPT_TOKENS, count, 1, 0.1, 0.2, 0.3, 0.4, 0.6, 2)))
        return stream

    def _cancel(self) -> None:
        self.cancelled += 1

    @property
    def prompts(self) -> list[str]:
        """What each round was asked, as text by its turns."""
        return [" | ".join(f"{turn.role}: {turn.text}" for turn in request.messages) for request in self.asked]


def offered_names(request: Request) -> Sequence[str]:
    """Tools that the template sees."""
    return [tool["function"]["name"] for tool in request.template.get("tools", ())]
