"""A chat answer's chunks -> the events of the Responses API, and the response that they come to. Knows no HTTP.

One item for each text between calls, and one for each call. A response that is not streamed is what the last event
holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from mlxvlm.api import answers
from mlxvlm.api.answers import ChatCompletionChunk, FinishReason, TokenLogprob, ToolCallDelta, Usage
from mlxvlm.api.assemble import ChatAssembler
from mlxvlm.api.responses.answers import (
    AnnotationAdded,
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    IncompleteDetails,
    InputTokensDetails,
    ItemEvent,
    ItemStatus,
    OutputCall,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    PartEvent,
    Response,
    ResponseError,
    ResponseEvent,
    ResponseUsage,
    Status,
    TextDelta,
    TextDone,
    UrlCitation,
)
from mlxvlm.api.responses.shown import new_id
from mlxvlm.api.usage import together
from mlxvlm.engine import request
from mlxvlm.engine.request import Delta

_SPEEDS = tuple(name for name in ResponseUsage.model_fields if name.endswith("_sec"))


@dataclass(slots=True)
class _Text:
    """A message that is being said. start: characters of the whole answer before it."""

    start: int
    id: str = field(default_factory=lambda: new_id("msg"))
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    annotations: list[UrlCitation] = field(default_factory=list)

    def part(self) -> OutputText:
        text, annotations = "".join(self.pieces), list(self.annotations)
        return OutputText(text=text, annotations=annotations, logprobs=list(self.logprobs))

    def item(self, status: ItemStatus) -> OutputMessage:
        content = [] if status == "in_progress" else [self.part()]
        return OutputMessage(id=self.id, status=status, content=content)


@dataclass(slots=True)
class _Call:
    """A call that is being made."""

    index: int
    call_id: str
    name: str
    id: str = field(default_factory=lambda: new_id("fc"))
    pieces: list[str] = field(default_factory=list)

    def item(self, status: ItemStatus) -> OutputCall:
        return OutputCall(
            id=self.id, call_id=self.call_id, name=self.name, arguments="".join(self.pieces), status=status
        )


class ResponseAssembler:
    """One answer. `response` is what it has come to; begin() and end() it."""

    def __init__(self, chat: ChatAssembler, response: Response) -> None:
        """chat: of one choice. response: its frame."""
        self.response = response
        self._chat = chat
        self._open: _Text | _Call | None = None
        self._events = 0
        self._reason: FinishReason | None = None
        self._logprobs: list[TokenLogprob] = []  # of text that is still to come
        self._begun = False
        self._num_chars = 0

    def begin(self, prompts: Sequence[tuple[int, ...]] = ()) -> Iterator[Event]:
        """The first events."""
        self._begun = True
        yield self._state("created", "in_progress")
        yield self._state("in_progress", "in_progress")

    def feed(self, index: int, delta: Delta) -> Iterator[Event]:
        """The events of a Delta."""
        for chunk in self._chat.feed(index, delta):
            yield from self.add(chunk)

    def add(self, chunk: ChatCompletionChunk) -> Iterator[Event]:
        """The events of a chunk."""
        for choice in chunk.choices:
            if choice.logprobs is not None:
                self._logprobs += choice.logprobs.content or ()
            if choice.delta.content:
                yield from self._say(choice.delta.content)
            for call in choice.delta.tool_calls or ():
                yield from self._call(call)
            for annotation in choice.delta.annotations or ():
                yield from self._cite(annotation.url_citation)
            self._reason = choice.finish_reason or self._reason

    def end(self) -> Iterator[Event]:
        """The last events."""
        is_cut = self._reason == "length"
        if self._open is None and not self.response.output:
            yield from self._open_text()
        if isinstance(self._open, _Text):
            self._open.logprobs += self._logprobs
        yield from self._close("incomplete" if is_cut else "completed")
        usage = self._chat.last().usage
        self._update(
            usage=None if usage is None else usage_of(usage),
            completed_at=None if is_cut else int(time.time()),
            incomplete_details=IncompleteDetails() if is_cut else None,
        )
        status: Status = "incomplete" if is_cut else "completed"
        yield self._state(status, status)

    def fail(self, error: ResponseError) -> Iterator[Event]:
        """The end of an answer that can't go on; what was said of it stays."""
        if not self._begun:
            yield from self.begin()
        if self._open is not None:
            self._keep("incomplete")
        self._update(error=error)
        yield self._state("failed", "failed")

    def whole(self, prompts: Sequence[tuple[int, ...]], deltas: Iterable[tuple[int, Delta]]) -> BaseModel:
        """Everything at once: the events are made and passed over."""
        for _ in self.begin(prompts):
            pass
        for index, delta in deltas:
            for _ in self.feed(index, delta):
                pass
        for _ in self.end():
            pass
        return self.response

    @property
    def usage(self) -> request.Usage:
        """At its end."""
        return together(self._chat.usages)

    def _say(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, _Text):
            yield from self._close()
            yield from self._open_text()
        assert isinstance(self._open, _Text)
        logprobs, self._logprobs = self._logprobs, []
        self._open.pieces.append(text)
        self._num_chars += len(text)
        self._open.logprobs += logprobs
        yield TextDelta(delta=text, logprobs=logprobs, **self._place())

    def _open_text(self) -> Iterator[Event]:
        self._open = _Text(self._num_chars)
        yield self._item("added", self._open.item("in_progress"))
        yield PartEvent(type="response.content_part.added", part=OutputText(text=""), **self._place())

    def _cite(self, cited: answers.UrlCitation) -> Iterator[Event]:
        """Sources are told at the answer's end: what was said before a call of the client's has none."""
        if not isinstance(self._open, _Text) or cited.start_index < self._open.start:
            return
        places = {name: getattr(cited, name) - self._open.start for name in ("start_index", "end_index")}
        self._open.annotations.append(UrlCitation(url=cited.url, title=cited.title, **places))
        index = len(self._open.annotations) - 1
        yield AnnotationAdded(annotation_index=index, annotation=self._open.annotations[-1], **self._place())

    def _call(self, call: ToolCallDelta) -> Iterator[Event]:
        self._logprobs = []  # those of calls have no place here
        if not isinstance(self._open, _Call) or self._open.index != call.index:
            yield from self._close()
            self._open = _Call(call.index, call.id or "", call.function.name or "")
            yield self._item("added", self._open.item("in_progress"))
        if call.function.arguments:
            self._open.pieces.append(call.function.arguments)
            yield ArgumentsDelta(delta=call.function.arguments, **self._place())

    def _close(self, status: ItemStatus = "completed") -> Iterator[Event]:
        if isinstance(self._open, _Text):
            part = self._open.part()
            yield TextDone(text=part.text, logprobs=part.logprobs, **self._place())
            yield PartEvent(type="response.content_part.done", part=part, **self._place())
        elif isinstance(self._open, _Call):
            call = self._open.item(status)
            yield ArgumentsDone(name=call.name, arguments=call.arguments, **self._place())
        if self._open is not None:
            yield self._item("done", self._open.item(status))
            self._keep(status)

    def _keep(self, status: ItemStatus) -> None:
        assert self._open is not None
        self._update(output=[*self.response.output, self._open.item(status)])
        self._open = None

    def _update(self, **fields: object) -> None:
        # Events hold the response as it was.
        self.response = self.response.model_copy(update=fields)

    def _state(self, word: str, status: Status) -> Event:
        self._update(status=status)
        return ResponseEvent(type=f"response.{word}", response=self.response, sequence_number=self._number())

    def _item(self, word: str, item: OutputMessage | OutputCall) -> Event:
        place = {"sequence_number": self._number(), "output_index": len(self.response.output)}
        return ItemEvent(type=f"response.output_item.{word}", item=item, **place)

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        index = len(self.response.output)
        return {"sequence_number": self._number(), "item_id": self._open.id, "output_index": index}

    def _number(self) -> int:
        self._events += 1
        return self._events - 1


def usage_of(usage: Usage) -> ResponseUsage:
    """The same counts by their names here."""
    details = usage.prompt_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=details.cached_tokens, image_tokens=details.image_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=usage.total_tokens,
        **{name: getattr(usage, name) for name in _SPEEDS},
    )
