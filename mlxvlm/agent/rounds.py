"""One answer of several rounds: the model calls tools that are answered here, reads the results, and goes on.

`Rounds` knows what to ask next and what to show, and asks nobody: `ToolAnswer` asks in a thread, the server's
tool_rounds in a coroutine. What is shown are Deltas of one answer: without the calls answered here, usage summed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from mlxvlm.agent.loop import MAX_ROUNDS, Answer, BoundTool, answered, run_in_thread
from mlxvlm.agent.tools import CallDelta, Tool, ToolChoice
from mlxvlm.agent.web_search import Citation, WebSearch
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.engine.request import Delta, FinishReason, Request, Usage
from mlxvlm.errors import ContextLengthError, MemoryBudgetError
from mlxvlm.messages import Message, TextPart, ToolCall

TOO_LONG = (ContextLengthError, MemoryBudgetError)  # what a prompt with results may come to
_NO_ROOM = "Error: the result is left out: it does not fit into the context"
_LEAST_S = 1e-3  # of time for a round that has none left: the engine ends it as it ends all that are late
_GAP = "\n\n"  # between what is said in two rounds

Piece: TypeAlias = str | CallDelta | Citation


class ToolParser(Protocol):
    """Finds calls in one answer as it arrives."""

    def feed(self, delta: Delta) -> Sequence[Piece]: ...

    def finish(self) -> Sequence[Piece]: ...


class ToolFormat(Protocol):
    """How a checkpoint's chat template writes tools and calls: formats.ToolFormat."""

    @property
    def visible_token_ids(self) -> frozenset[int]: ...

    @property
    def control_texts(self) -> frozenset[str]: ...

    def messages(self, messages: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice) -> list[Message]: ...

    def variables(self, tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]: ...

    def grammar(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True) -> Grammar | None: ...

    def parser(self, tools: Sequence[Tool], *, constrained: bool = False, grows: bool = True) -> ToolParser: ...


class Source(Protocol):
    """The engine's Stream."""

    def __iter__(self) -> Iterator[Delta]: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Offer:
    """What a model may call. tools: all; bound: those of them that are answered here, the others are the caller's.

    grows: a grammar's calls are shown as they come, see ToolParser.
    """

    format: ToolFormat
    tools: tuple[Tool, ...]
    bound: tuple[BoundTool, ...] = ()
    is_parallel: bool = True
    grows: bool = True

    def first(self, request: Request, choice: ToolChoice = "auto") -> Request:
        """A request with the tools in it."""
        messages = self.format.messages(request.messages, self.tools, choice)
        return self._asked(request, messages, self.tools, choice)

    def next(self, request: Request, turns: Sequence[Message], *, is_last: bool) -> Request:
        """The request before with these turns after it; none must be called any more, and in the last only theirs."""
        names = {bound.tool.name for bound in self.bound} if is_last else set()
        tools = tuple(tool for tool in self.tools if tool.name not in names)
        messages = [*request.messages, *self.format.messages(turns, (), "none")]
        return self._asked(request, messages, tools, "auto" if tools else "none")

    def _asked(
        self, request: Request, messages: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice
    ) -> Request:
        grammar = self.format.grammar(tools, choice, self.is_parallel)
        sampling = replace(
            request.sampling or SamplingParams(),
            grammar=grammar,
            visible_token_ids=self.format.visible_token_ids,
        )
        former = self.format.variables(self.tools, "auto")
        template = {name: value for name, value in request.template.items() if name not in former}
        template |= self.format.variables(tools, choice)
        return replace(request, messages=messages, sampling=sampling, template=template, prompt=None)

    def parser(self, request: Request) -> ToolParser:
        """For the answer to a request of first() or next(): it knows all tools, so that no call is taken for text."""
        is_constrained = request.sampling is not None and request.sampling.grammar is not None
        # Nobody sees a bound tool's call grow: cut off, it would be neither text nor a call.
        return self.format.parser(self.tools, constrained=is_constrained, grows=self.grows and not self.bound)


@dataclass(frozen=True, slots=True)
class RoundDelta(Delta):
    """A Delta of an answer of several rounds. said: its text, the caller's calls, and at the end what it cites."""

    said: tuple[Piece, ...] = ()


class Said:
    """A parser of RoundDeltas, which are parsed already."""

    def feed(self, delta: Delta) -> list[Piece]:
        return list(delta.said) if isinstance(delta, RoundDelta) else []

    def finish(self) -> list[Piece]:
        return []


class Rounds:
    """One answer: ask `request`, feed() its Deltas; until is_over, answer_calls() and ask `request` again.

    on_calls: told of calls before they are answered. search: the one whose tools are bound, for citations.
    An answer with a call of the caller's ends there: calls of bound tools beside it are passed over.
    """

    def __init__(
        self,
        request: Request,
        offer: Offer,
        *,
        max_rounds: int = MAX_ROUNDS,
        search: WebSearch | None = None,
        on_calls: Callable[[Sequence[ToolCall]], None] = lambda calls: None,
    ) -> None:
        """request: of offer.first(), or one like it."""
        self.request, self.is_over, self.text = request, False, ""
        self._offer, self._max_rounds = offer, max_rounds
        self._search, self._on_calls = search, on_calls
        self._bound: Mapping[str, BoundTool] = {bound.tool.name: bound for bound in offer.bound}
        self._begun = time.monotonic()
        self._timeout_s = request.timeout_s or math.inf
        self._usages: list[Usage] = []
        self._count = 0  # rounds that were answered
        self._turns: list[Message] = []  # that the last of them added
        self._former = request  # without them
        self._begin()

    def _begin(self) -> None:
        self._parser = self._offer.parser(self.request)
        self._round_text = ""
        self._calls: dict[int, ToolCall] = {}  # of bound tools, by the parser's index
        self._theirs: dict[int, int] = {}  # the caller's calls: the parser's index -> theirs

    @property
    def citations(self) -> list[Citation]:
        """What the text so far names of what was found."""
        return self._search.citations(self.text) if self._search is not None else []

    def feed(self, delta: Delta) -> RoundDelta:
        """What is shown of a Delta."""
        found = [*self._parser.feed(delta)]
        if delta.finish_reason is not None:
            found += self._parser.finish()
        said: list[Piece] = [piece for each in found for piece in self._shown(each)]
        reason, usage = delta.finish_reason, None
        if delta.finish_reason is not None:
            assert delta.usage is not None
            self._usages.append(delta.usage)
            reason = self._reason(delta.finish_reason)
            self.is_over = reason is not None
            if self.is_over:
                said += self.citations
                usage = self._usage()
        text = "".join(piece for piece in said if isinstance(piece, str))
        return RoundDelta(text, delta.token_ids, delta.logprobs, reason, usage, delta.stop_string, tuple(said))

    def cut(self, reason: FinishReason) -> RoundDelta:
        """The last Delta of an answer that ends between two rounds."""
        self.is_over = True
        return RoundDelta(finish_reason=reason, usage=self._usage(), said=tuple(self.citations))

    async def answer_calls(self) -> None:
        """Runs the tools that the last round called, and makes the next request."""
        calls = tuple(self._calls[index] for index in sorted(self._calls))
        self._on_calls(calls)
        answer = Answer(self._round_text.strip(), calls)
        turns = await answered(answer, self._bound, self._offer.format.control_texts, max(self._left_s, _LEAST_S))
        self._count += 1
        self._ask(turns, is_last=self._count >= self._max_rounds)

    def shorten(self) -> bool:
        """Leaves out the results that made the prompt too long, and offers no more; whether there were any."""
        if not self._turns:
            return False
        nothing = (TextPart(_NO_ROOM),)
        left = [replace(turn, parts=nothing) if turn.role == "tool" else turn for turn in self._turns]
        self.request, self._count = self._former, self._max_rounds
        self._ask(left, is_last=True)
        self._turns = []
        return True

    def _ask(self, turns: Sequence[Message], *, is_last: bool) -> None:
        self._former, self._turns = self.request, [*turns]
        request = self._offer.next(self.request, turns, is_last=is_last)
        sampling = request.sampling
        if sampling is not None and sampling.max_tokens is not None:
            request = replace(request, sampling=replace(sampling, max_tokens=sampling.max_tokens - self._last_tokens))
        timeout_s = None if math.isinf(self._timeout_s) else max(self._left_s, _LEAST_S)
        self.request = replace(request, timeout_s=timeout_s)
        self._begin()

    @property
    def _left_s(self) -> float:
        return self._timeout_s - (time.monotonic() - self._begun)

    @property
    def _last_tokens(self) -> int:
        return self._usages[-1].completion_tokens

    def _shown(self, piece: Piece) -> Iterable[Piece]:
        if isinstance(piece, str):
            return self._shown_text(piece)
        if isinstance(piece, Citation):
            return [piece]
        if not self._offer.is_parallel and piece.index:
            return []
        if piece.name in self._bound:
            self._calls[piece.index] = ToolCall(piece.id, str(piece.name), piece.arguments)
        elif piece.index in self._calls:
            call = self._calls[piece.index]
            self._calls[piece.index] = replace(call, arguments=call.arguments + piece.arguments)
        else:
            return [replace(piece, index=self._theirs.setdefault(piece.index, len(self._theirs)))]
        return []

    def _shown_text(self, text: str) -> Iterable[str]:
        gap = ""
        if self.text and not self._round_text:  # another round begins to speak
            text = text.lstrip()
            gap = _GAP
        if not text:
            return []
        self._round_text += text
        self.text += gap + text
        return [gap + text]

    def _reason(self, reason: FinishReason) -> FinishReason | None:
        """Why the answer ends with this round; None where it goes on."""
        if reason != "stop" or self._theirs or not self._calls:
            return reason
        limit = self.request.sampling.max_tokens if self.request.sampling is not None else None
        is_spent = limit is not None and limit <= self._last_tokens
        return "length" if is_spent or self._count >= self._max_rounds else None

    def _usage(self) -> Usage:
        return in_turn(self._usages, time.monotonic() - self._begun)


def in_turn(usages: Sequence[Usage], total_s: float) -> Usage:
    """Of requests that followed each other: each prompt counts, as each was read."""
    return Usage(
        prompt_tokens=sum(each.prompt_tokens for each in usages),
        completion_tokens=sum(each.completion_tokens for each in usages),
        image_tokens=sum(each.image_tokens for each in usages),
        prepare_s=sum(each.prepare_s for each in usages),
        prompt_s=sum(each.prompt_s for each in usages),
        completion_s=sum(each.completion_s for each in usages),
        time_to_first_token_s=usages[0].time_to_first_token_s,
        total_s=total_s,
        cached_tokens=sum(each.cached_tokens for each in usages),
        drafted_tokens=sum(each.drafted_tokens for each in usages),
        accepted_tokens=sum(each.accepted_tokens for each in usages),
        vision_s=sum(each.vision_s for each in usages),
    )


class ToolAnswer:
    """An engine's Stream of an answer with tools, for a thread: iterate once, cancel() at any time."""

    def __init__(self, submit: Callable[[Request], Source], rounds: Rounds) -> None:
        """Asks at once. Raises what submit raises."""
        self._submit, self._rounds = submit, rounds
        self._stream = submit(rounds.request)
        self._cancelled = False
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def __iter__(self) -> Iterator[Delta]:
        rounds = self._rounds
        while True:
            try:
                for delta in self._stream:
                    yield rounds.feed(delta)
            except TOO_LONG:
                if not rounds.shorten():
                    raise
            else:
                if rounds.is_over:
                    return
                run_in_thread(self._answer_calls)
            if self._cancelled:
                yield rounds.cut("cancelled")
                return
            self._stream = self._submit(rounds.request)

    async def _answer_calls(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._waiting = (asyncio.get_running_loop(), task)
        if not self._cancelled:
            with suppress(asyncio.CancelledError):
                await self._rounds.answer_calls()
        self._waiting = None

    def cancel(self) -> None:
        """Ends the answer, or its tools, at the next step; may be called from any thread and any signal."""
        self._cancelled = True
        self._stream.cancel()
        waiting = self._waiting
        if waiting is not None:
            with suppress(RuntimeError):  # its loop has ended in this moment
                waiting[0].call_soon_threadsafe(waiting[1].cancel)

    def __enter__(self) -> ToolAnswer:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._rounds.is_over:
            self.cancel()
