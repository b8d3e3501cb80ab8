"""A chat answer's chunks -> the events of Anthropic's Messages API, and the message they come to. Knows no HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence

from pydantic import BaseModel
from pydantic_core import from_json

from mlxvlm.api.answers import ChatCompletionChunk, FinishReason, ToolCallDelta, UrlCitation
from mlxvlm.api.anthropic.answers import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    Citation,
    CitationsDelta,
    Event,
    InputDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    Ping,
    Stopped,
    StopReason,
    TextBlock,
    TextDelta,
    ToolUseBlock,
    Usage,
)
from mlxvlm.api.assemble import ChatAssembler
from mlxvlm.api.usage import together
from mlxvlm.engine import request
from mlxvlm.engine.request import Delta
from mlxvlm.errors import InternalError


class MessageAssembler:
    """One answer; begin() and end() it. One block for each text between calls, and one for each call."""

    def __init__(self, chat: ChatAssembler, model: str) -> None:
        """chat: of one choice."""
        self._chat = chat
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._blocks: list[Block] = []
        self._pieces: list[str] = []  # of the last block, which is open
        self._citations: list[Citation] = []
        self._call: int | None = None  # the last block's, where it is a call
        self._reason: FinishReason | None = None
        self._stop: str | None = None

    def begin(self, prompts: Sequence[tuple[int, ...]]) -> Iterator[Event]:
        """The first events. What was cached is only known at the end."""
        yield MessageStart(message=self._message(_unspent(prompts)))
        yield Ping()

    def feed(self, index: int, delta: Delta) -> Iterator[Event]:
        """The events of a Delta."""
        for chunk in self._chat.feed(index, delta):
            yield from self.add(chunk)

    def add(self, chunk: ChatCompletionChunk) -> Iterator[Event]:
        """The events of a chunk."""
        for choice in chunk.choices:
            if choice.delta.content:
                if not self._blocks or self._call is not None:
                    yield from self._open(TextBlock(text=""), None)
                yield self._delta(TextDelta(text=choice.delta.content), choice.delta.content)
            for call in choice.delta.tool_calls or ():
                yield from self._called(call)
            if self._blocks and self._call is None:  # sources are told at the end: a call of the client's ends it too
                for each in choice.delta.annotations or ():
                    yield self._cite(each.url_citation)
            if choice.finish_reason is not None:
                self._reason, self._stop = choice.finish_reason, choice.stop_string

    def end(self) -> Iterator[Event]:
        """The last events."""
        yield from self._close()
        reason = self._stop_reason()
        stopped = Stopped(stop_reason=reason, stop_sequence=self._stop if reason == "stop_sequence" else None)
        yield MessageDelta(delta=stopped, usage=self._usage())
        yield MessageStop()

    def whole(self, prompts: Sequence[tuple[int, ...]], deltas: Iterable[tuple[int, Delta]]) -> BaseModel:
        """Everything at once: the events are made, and what they come to is told."""
        message = self._message(_unspent(prompts))
        for index, delta in deltas:
            for _ in self.feed(index, delta):
                pass
        for event in self.end():
            if isinstance(event, MessageDelta):
                told = {"stop_reason": event.delta.stop_reason, "stop_sequence": event.delta.stop_sequence}
                message = message.model_copy(update={"content": self._blocks, "usage": event.usage, **told})
        return message

    @property
    def usage(self) -> request.Usage:
        """At its end."""
        return together(self._chat.usages)

    def _called(self, call: ToolCallDelta) -> Iterator[Event]:
        if self._call != call.index:
            yield from self._open(ToolUseBlock(id=call.id or "", name=call.function.name or "", input={}), call.index)
        if call.function.arguments:
            yield self._delta(InputDelta(partial_json=call.function.arguments), call.function.arguments)

    def _cite(self, cited: UrlCitation) -> Event:
        self._citations.append(Citation(url=cited.url, title=cited.title))
        return BlockDelta(index=len(self._blocks) - 1, delta=CitationsDelta(citation=self._citations[-1]))

    def _open(self, block: Block, call: int | None) -> Iterator[Event]:
        yield from self._close()
        self._blocks.append(block)
        self._call = call
        yield BlockStart(index=len(self._blocks) - 1, content_block=block)

    def _delta(self, delta: TextDelta | InputDelta, piece: str) -> Event:
        self._pieces.append(piece)
        return BlockDelta(index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> Iterator[Event]:
        if not self._blocks:
            return
        said, block = "".join(self._pieces), self._blocks[-1]
        is_text = isinstance(block, TextBlock)
        fields = {"text": said, "citations": self._citations or None} if is_text else {"input": _object(said)}
        self._blocks[-1] = block.model_copy(update=fields)
        self._pieces, self._citations = [], []
        yield BlockStop(index=len(self._blocks) - 1)

    def _stop_reason(self) -> StopReason:
        if self._reason is None:
            raise InternalError("the answer ended without a finish reason")
        if self._reason == "stop":
            return "end_turn" if self._stop is None else "stop_sequence"
        return "tool_use" if self._reason == "tool_calls" else "max_tokens"

    def _usage(self) -> Usage:
        spent = self.usage
        return Usage(
            input_tokens=spent.prompt_tokens - spent.cached_tokens,
            output_tokens=spent.completion_tokens,
            cache_read_input_tokens=spent.cached_tokens,
        )

    def _message(self, usage: Usage) -> Message:
        return Message(id=self._id, model=self._model, content=[], usage=usage)


def _unspent(prompts: Sequence[tuple[int, ...]]) -> Usage:
    return Usage(input_tokens=len(prompts[0]), output_tokens=0)


def _object(arguments: str) -> dict[str, object]:
    """A call's arguments; of one that was cut off as much as there is, as the `anthropic` client reads streams."""
    try:
        found = from_json(arguments, allow_partial=True)
    except ValueError:  # nothing yet, or no JSON
        found = {}
    return found if isinstance(found, dict) else {}
