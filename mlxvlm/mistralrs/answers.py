"""One chat request, its rounds and its answer: in pieces or put together. Knows the engine, not how it was loaded."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from mlxvlm.agent.loop import MAX_ROUNDS, Answer, BoundTool, run_tools
from mlxvlm.api.answers import (
    CalledFunctionDelta,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    ChunkDelta,
    FinishReason,
    ToolCallDelta,
)
from mlxvlm.api.assemble import FINGERPRINT, WholeChoice, plan_choices
from mlxvlm.api.messages import AssistantMessage, ChatMessage, ToolMessage
from mlxvlm.api.plan import ChatPlan
from mlxvlm.api.schema import ChatCompletionRequest as Body
from mlxvlm.api.usage import total_usage
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.request import Request, Usage
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import EngineClosedError, InternalError, MlxvlmError
from mlxvlm.messages import Message, ToolCall


class Pieces(Protocol):
    """An answer on its way. usages: of its choices, when they have ended."""

    @property
    def usages(self) -> list[Usage]: ...

    def __iter__(self) -> Iterator[ChunkChoice]: ...

    def cancel(self) -> None: ...


class Round:
    """The model is asked once, for all choices side by side; their pieces come choice after choice."""

    def __init__(self, engine: Engine, body: Body, plan: ChatPlan, requests: Sequence[Request]) -> None:
        """Raises what submitting raises."""
        token_bytes, eos = engine.processor.tokenizer.token_bytes, engine.config.eos_token_ids
        self.choices = plan_choices(body, plan, token_bytes, eos, plan.parser)
        self._streams: list[Stream] = []
        try:
            for request in requests:
                self._streams.append(engine.submit(request))
        except MlxvlmError:
            self.cancel()
            raise

    @property
    def usages(self) -> list[Usage]:
        ended = [choice.usage for choice in self.choices if choice.usage is not None]
        return ended if len(ended) == len(self.choices) else []

    def __iter__(self) -> Iterator[ChunkChoice]:
        try:
            for choice, stream in zip(self.choices, self._streams, strict=True):
                yield choice.first()
                for delta in stream:
                    yield from choice.feed(delta)
        finally:
            if not self.usages:
                self.cancel()

    def cancel(self) -> None:
        """What still runs ends; harmless after the end."""
        for stream in self._streams:
            stream.cancel()


class ToolRounds:
    """Rounds with tools in between, in a thread of its own. Its text comes as it is said, in all rounds."""

    def __init__(
        self,
        start: Callable[[Body], Round],
        body: Body,
        tools: Sequence[BoundTool],
        max_rounds: int = MAX_ROUNDS,
        special_tokens: Collection[str] = (),
    ) -> None:
        """Raises what asking for the first time raises. special_tokens: see run_tools."""
        self.usages: list[Usage] = []
        self._start, self._body = start, body
        self._loop = partial(run_tools, [], tools, self._ask, max_rounds=max_rounds, special_tokens=special_tokens)
        self._pieces: SimpleQueue[ChunkChoice | MlxvlmError | None] = SimpleQueue()
        self._spent: list[Usage] = []
        self._reason: FinishReason = "stop"
        self._cancelled = False
        self._round = start(body)  # here, so that a wrong request is refused when it is sent

    def __iter__(self) -> Iterator[ChunkChoice]:
        threading.Thread(target=self._run, name="mlxvlm-tools", daemon=True).start()
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, MlxvlmError):
                    raise piece
                yield piece
            if not self.usages:
                raise InternalError("the tools' thread has failed")
        finally:
            self.cancel()

    def cancel(self) -> None:
        self._cancelled = True
        self._round.cancel()

    def _run(self) -> None:
        try:
            outcome = asyncio.run(self._loop())
            calls = outcome.answer.calls
            if calls:
                deltas = [_call_delta(index, one) for index, one in enumerate(calls)]
                self._pieces.put(_piece(ChunkDelta(tool_calls=deltas)))
            self.usages = [_sum(self._spent)]
            reason: FinishReason = "tool_calls" if calls else "stop" if self._reason == "tool_calls" else self._reason
            self._pieces.put(_piece(ChunkDelta(), reason))
        except MlxvlmError as error:
            self._pieces.put(error)
        finally:
            self._pieces.put(None)

    def _ask(self, turns: Sequence[Message], may_call: bool) -> Answer:
        if turns:
            self._round = self._start(self._continued(turns, may_call))
        if self._cancelled:
            self._round.cancel()
            raise EngineClosedError("the answer was cancelled")
        whole = WholeChoice(0)
        for piece in self._round:
            whole.add(piece)
            # Calls are shown when it is known who answers them.
            if not piece.delta.tool_calls and piece.finish_reason is None:
                self._pieces.put(piece)
        self._spent += self._round.usages
        choice = whole.choice(with_logprobs=False, with_token_ids=False)
        self._reason = choice.finish_reason
        calls = choice.message.tool_calls or ()
        called = tuple(ToolCall(one.id, one.function.name, one.function.arguments) for one in calls)
        return Answer(choice.message.content or "", called)

    def _continued(self, turns: Sequence[Message], may_call: bool) -> Body:
        choice = self._body.tool_choice
        # What had to be called has been called.
        again = None if choice in (None, "auto", "required") or getattr(choice, "type", "") == "function" else choice
        messages = [*self._body.messages, *map(_chat_message, turns)]
        return self._body.model_copy(update={"messages": messages, "tool_choice": again if may_call else "none"})


class ChatAnswer:
    """An answer: iterate its chunks, or wait for the whole; once."""

    def __init__(self, pieces: Pieces, model: str, *, with_logprobs: bool = False) -> None:
        self._pieces, self._model, self._with_logprobs = pieces, model, with_logprobs
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def cancel(self) -> None:
        """Ends it with the next token."""
        self._pieces.cancel()

    def __iter__(self) -> Iterator[ChatCompletionChunk]:
        """As mistral.rs's: each has a choice with a text, and the last one the usage."""
        for piece in self._pieces:
            says = {"role": "assistant", "content": piece.delta.content}
            if piece.delta.content is None and not piece.delta.tool_calls:
                says["content"] = ""
            usages = self._pieces.usages if piece.finish_reason is not None else []
            yield ChatCompletionChunk(
                id=self._id,
                created=self._created,
                model=self._model,
                system_fingerprint=FINGERPRINT,
                choices=[piece.model_copy(update={"delta": piece.delta.model_copy(update=says)})],
                usage=total_usage(usages) if usages else None,
            )

    def choices(self) -> list[Choice]:
        """Waits for the end."""
        wholes: dict[int, WholeChoice] = {}
        for piece in self._pieces:
            wholes.setdefault(piece.index, WholeChoice(piece.index)).add(piece)
        return [each.choice(with_logprobs=self._with_logprobs, with_token_ids=False) for each in wholes.values()]

    def whole(self) -> ChatCompletion:
        """Waits for the end."""
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=self.choices(),
            usage=total_usage(self._pieces.usages),
        )


def _piece(delta: ChunkDelta, reason: FinishReason | None = None) -> ChunkChoice:
    return ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=reason)


def _call_delta(index: int, one: ToolCall) -> ToolCallDelta:
    function = CalledFunctionDelta(name=one.name, arguments=one.arguments)
    return ToolCallDelta(index=index, id=one.id, type="function", function=function)


def _chat_message(turn: Message) -> ChatMessage:
    """A turn of the loop as a client would send it."""
    if turn.tool_call_id is not None:
        return ToolMessage(role="tool", content=turn.text, tool_call_id=turn.tool_call_id)
    calls = [{"id": one.id, "function": {"name": one.name, "arguments": one.arguments}} for one in turn.tool_calls]
    return AssistantMessage.model_validate({"role": "assistant", "content": turn.text or None, "tool_calls": calls})


def _sum(usages: Sequence[Usage]) -> Usage:
    """Of rounds one after the other."""
    total = {each.name: sum(getattr(usage, each.name) for usage in usages) for each in fields(Usage)}
    return replace(usages[0], **total | {"time_to_first_token_s": usages[0].time_to_first_token_s})
