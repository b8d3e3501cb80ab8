"""The engine's Deltas -> chunks, and chunks -> a whole answer: so what is streamed is what is not. Knows no HTTP.

finish_reason: the engine's "timeout" and "cancelled" (a server that stops) become "length": the answer was cut short.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mlxvlm.agent.rounds import Piece
from mlxvlm.agent.web_search import Citation
from mlxvlm.api import answers
from mlxvlm.api.answers import (
    AnswerMessage,
    CalledFunction,
    CalledFunctionDelta,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    ChunkDelta,
    MessageToolCall,
    ToolCallDelta,
)
from mlxvlm.api.plan import ChatPlan, ToolParser
from mlxvlm.api.schema import ChatCompletionRequest
from mlxvlm.api.usage import total_usage
from mlxvlm.engine.request import Delta, FinishReason, TokenLogprob, Usage
from mlxvlm.errors import InternalError

FINGERPRINT = "mlxvlm"
TokenBytes = Callable[[int], bytes]


class ChoiceAssembler:
    """One choice: its Deltas in, its pieces out.

    end_ids: tokens that end an answer and are not part of its logprobs. max_calls: later ones are passed over.
    """

    def __init__(
        self,
        index: int,
        token_bytes: TokenBytes | None = None,
        end_ids: frozenset[int] = frozenset(),
        parser: ToolParser | None = None,
        *,
        max_calls: int | None = None,
        with_token_ids: bool = False,
    ) -> None:
        self.index = index
        self.usage: Usage | None = None
        self._token_bytes, self._end_ids = token_bytes, end_ids
        self._parser, self._max_calls = parser, max_calls
        self._with_token_ids = with_token_ids
        self._has_calls = False

    def first(self) -> ChunkChoice:
        """Says who speaks, before anything is said."""
        return self._piece(ChunkDelta(role="assistant", content=""))

    def feed(self, delta: Delta) -> list[ChunkChoice]:
        """The pieces that a Delta makes, in order; its logprobs and token ids stand with the first of them."""
        said: list[Piece] = [delta.text] if delta.text else []
        if self._parser is not None:
            said = [*self._parser.feed(delta)]
            if delta.finish_reason is not None:
                said += self._parser.finish()
        pieces = [piece for each in said if (piece := self._said(each)) is not None]
        logprobs = self._logprobs(delta)
        token_ids = list(delta.token_ids) if self._with_token_ids and delta.token_ids else None
        if (logprobs is not None or token_ids) and not pieces:
            pieces.append(self._piece(ChunkDelta()))
        if logprobs is not None or token_ids:
            pieces[0] = pieces[0].model_copy(update={"logprobs": logprobs, "token_ids": token_ids})
        if delta.finish_reason is not None:
            self.usage = delta.usage
            last = self._piece(ChunkDelta(), self._finish_reason(delta.finish_reason))
            pieces.append(last.model_copy(update={"stop_string": delta.stop_string}))
        return pieces

    def _piece(self, delta: ChunkDelta, reason: answers.FinishReason | None = None) -> ChunkChoice:
        return ChunkChoice(index=self.index, delta=delta, logprobs=None, finish_reason=reason)

    def _said(self, said: Piece) -> ChunkChoice | None:
        if isinstance(said, str):
            return self._piece(ChunkDelta(content=said)) if said else None
        if isinstance(said, Citation):
            return self._piece(ChunkDelta(annotations=[answers.Annotation.model_validate(said.as_annotation())]))
        if self._max_calls is not None and said.index >= self._max_calls:
            return None
        self._has_calls = True
        function = CalledFunctionDelta(name=said.name, arguments=said.arguments)
        # As OpenAI does, the first piece of a call alone says which it is.
        head = {"id": said.id, "type": "function"} if said.name is not None else {}
        call = ToolCallDelta.model_validate({"index": said.index, "function": function, **head})
        return self._piece(ChunkDelta(tool_calls=[call]))

    def _finish_reason(self, reason: FinishReason) -> answers.FinishReason:
        if reason != "stop":
            return "length"
        return "tool_calls" if self._has_calls else "stop"

    def _logprobs(self, delta: Delta) -> ChoiceLogprobs | None:
        shown = [
            each
            for index, each in enumerate(delta.logprobs)
            if not (
                delta.finish_reason == "stop" and index == len(delta.logprobs) - 1 and each.token_id in self._end_ids
            )
        ]
        if self._token_bytes is None or not shown:
            return None
        return ChoiceLogprobs(content=[_token_logprob(each, self._token_bytes) for each in shown])


def _token_logprob(each: TokenLogprob, token_bytes: TokenBytes) -> answers.TokenLogprob:
    top = [answers.TopLogprob(**_shown(token, token_bytes), logprob=logprob) for token, logprob in each.top]
    return answers.TokenLogprob(**_shown(each.token_id, token_bytes), logprob=each.logprob, top_logprobs=top)


def _shown(token_id: int, token_bytes: TokenBytes) -> answers.TokenText:
    """A token may be a piece of a character: its text then has U+FFFD, its bytes are exact."""
    data = token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str]


@dataclass(slots=True)
class WholeChoice:
    """The pieces of one choice put together."""

    index: int
    _text: list[str] = field(default_factory=list)
    _calls: dict[int, _Call] = field(default_factory=dict)
    _logprobs: list[answers.TokenLogprob] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _annotations: list[answers.Annotation] = field(default_factory=list)
    _reason: answers.FinishReason | None = None

    def add(self, piece: ChunkChoice) -> None:
        self._text.append(piece.delta.content or "")
        self._annotations += piece.delta.annotations or ()
        for call in piece.delta.tool_calls or ():
            known = self._calls.setdefault(call.index, _Call(call.id or "", call.function.name or "", []))
            known.arguments.append(call.function.arguments)
        if piece.logprobs is not None:
            self._logprobs += piece.logprobs.content or ()
        self._token_ids += piece.token_ids or ()
        self._reason = piece.finish_reason or self._reason

    def choice(self, *, with_logprobs: bool, with_token_ids: bool) -> Choice:
        """Raises InternalError before its end."""
        if self._reason is None:
            raise InternalError("the answer ended without a finish reason")
        text = "".join(self._text)
        calls = [
            MessageToolCall(id=call.id, function=CalledFunction(name=call.name, arguments="".join(call.arguments)))
            for _, call in sorted(self._calls.items())
        ]
        return Choice(
            index=self.index,
            message=AnswerMessage(
                content=text if text or not calls else None,
                tool_calls=calls or None,
                annotations=self._annotations or None,
            ),
            logprobs=ChoiceLogprobs(content=self._logprobs) if with_logprobs else None,
            finish_reason=self._reason,
            token_ids=self._token_ids if with_token_ids else None,
        )


class ChatAssembler:
    """A chat request's answer, of all its choices."""

    def __init__(self, choices: Sequence[ChoiceAssembler], model: str) -> None:
        self._choices = choices
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def first(self, prompt_token_ids: Sequence[int] | None = None) -> list[ChatCompletionChunk]:
        """The chunks that begin each choice."""
        chunks = [self._chunk([choice.first()]) for choice in self._choices]
        if prompt_token_ids is not None:
            chunks[0] = chunks[0].model_copy(update={"prompt_token_ids": list(prompt_token_ids)})
        return chunks

    def feed(self, index: int, delta: Delta) -> list[ChatCompletionChunk]:
        """The chunks of one choice's Delta."""
        return [self._chunk([piece]) for piece in self._choices[index].feed(delta)]

    def last(self) -> ChatCompletionChunk:
        """The usage of all choices."""
        return self._chunk([], total_usage(self.usages))

    def whole(
        self,
        deltas: Iterable[tuple[int, Delta]],
        prompt_token_ids: Sequence[int] | None = None,
        *,
        with_logprobs: bool = False,
        with_token_ids: bool = False,
    ) -> ChatCompletion:
        """Everything at once: the same pieces put together."""
        wholes = [WholeChoice(choice.index) for choice in self._choices]
        for index, delta in deltas:
            for piece in self._choices[index].feed(delta):
                wholes[index].add(piece)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=[each.choice(with_logprobs=with_logprobs, with_token_ids=with_token_ids) for each in wholes],
            usage=total_usage(self.usages),
            prompt_token_ids=None if prompt_token_ids is None else list(prompt_token_ids),
        )

    @property
    def usages(self) -> list[Usage]:
        """Of the choices that have ended."""
        return [choice.usage for choice in self._choices if choice.usage is not None]

    def _chunk(self, choices: list[ChunkChoice], usage: answers.Usage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )


def plan_choices(
    body: ChatCompletionRequest,
    plan: ChatPlan,
    token_bytes: TokenBytes,
    eos_token_ids: frozenset[int],
    parser: Callable[[], ToolParser | None],
) -> list[ChoiceAssembler]:
    """For the choices of one request. parser: makes each one's own."""
    return [
        ChoiceAssembler(
            index,
            token_bytes if body.logprobs else None,
            frozenset() if body.ignore_eos else eos_token_ids,
            parser(),
            max_calls=plan.max_calls,
            with_token_ids=bool(body.return_token_ids),
        )
        for index in range(len(plan.requests))
    ]
