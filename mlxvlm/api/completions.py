"""POST /v1/completions: texts to go on with, as they are, without a chat template. Knows no HTTP.

Source: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag

from mlxvlm.api.answers import Usage, _if_any
from mlxvlm.api.assemble import FINGERPRINT, TokenBytes
from mlxvlm.api.plan import grammar_of, sampling_of, with_seed
from mlxvlm.api.sampling import MAX_TOKENS, SamplingFields
from mlxvlm.api.schema import MAX_LABEL_CHARS, MAX_MODEL_CHARS, StreamOptions
from mlxvlm.api.usage import of_prompts, total_usage
from mlxvlm.engine import request
from mlxvlm.engine.params import MAX_TOP_LOGPROBS, SamplingParams
from mlxvlm.engine.request import Delta, Request, TokenLogprob
from mlxvlm.errors import InternalError, RequestError
from mlxvlm.processors.base import Prompt

MAX_ANSWERS = 128  # of one request: prompts times n
MAX_PROMPT_TOKENS = 1 << 20  # no context is longer
USUAL_TOKENS = 16  # OpenAI's, where max_tokens is left out

_TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]
_Ids: TypeAlias = Annotated[list[_TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
_Texts: TypeAlias = Annotated[list[str], Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)]
_Lists: TypeAlias = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)]


def _kind(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return "<texts>"
    return "<lists>" if isinstance(first, list) else "<ids>" if isinstance(value, list) else "<text>"


class CompletionRequest(SamplingFields):
    """Texts to go on with. Null always means "not given"."""

    prompt: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[_Texts, Tag("<texts>")]
        | Annotated[_Ids, Tag("<ids>")]
        | Annotated[_Lists, Tag("<lists>")],
        Discriminator(_kind),
    ] = Field(description="A text, token ids, or a list of either: one prompt each.")
    model: str = Field("default", max_length=MAX_MODEL_CHARS, description="A name of /v1/models, or `default`.")
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description=f"Most tokens of an answer; left out: {USUAL_TOKENS}."
    )
    echo: bool | None = Field(None, description="The prompt's text in front of the answer's.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Tell the tokens' probabilities, and of so many likeliest ones."
    )
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="With stream: {'include_usage': true}.")
    user: str | None = Field(None, max_length=MAX_LABEL_CHARS, description="Ignored: accounts are a cloud's.")


class CompletionLogprobs(BaseModel):
    """One entry for each token of the answer, without the end token. A piece of a character is `bytes:\\xNN...`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int] = Field(description="Characters in front of each token.")


class CompletionChoice(BaseModel):
    """One answer; of a chunk, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    prompt_token_ids: list[int] | None = _if_any("With return_token_ids; of a stream's first piece.")
    token_ids: list[int] | None = _if_any("With return_token_ids: the end token included.")


class TextCompletion(BaseModel):
    """The whole answer, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[CompletionChoice]
    usage: Usage | None = _if_any()


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """requests: n for each prompt, in order. echoes: what stands in front of each answer."""

    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    n: int


def completion_plan(
    body: CompletionRequest,
    defaults: SamplingParams,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> CompletionPlan:
    """Raises RequestError naming the field. It may take long: texts are tokenised here."""
    prompts, n = _prompts(body), body.n or 1
    _check_together(body, len(prompts) * n)
    sampling = sampling_of(body, defaults, body.max_tokens or USUAL_TOKENS, body.logprobs)
    if body.grammar is not None:
        sampling = replace(sampling, grammar=grammar_of(body.grammar))
    requests, echoes = [], []
    for prompt in prompts:
        ids = tuple(encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        if not ids:
            raise RequestError("the prompt is empty, and this model's tokenizer begins with nothing", "prompt")
        made = Request(sampling=sampling, timeout_s=body.timeout, prompt=Prompt(ids))
        requests += [with_seed(made, index) for index in range(n)]
        echo = "" if not body.echo else prompt if isinstance(prompt, str) else decode(ids)
        echoes += [echo] * n
    return CompletionPlan(tuple(requests), tuple(echoes), n)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    given = body.prompt
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else list(given)


def _check_together(body: CompletionRequest, count: int) -> None:
    if count > MAX_ANSWERS:
        raise RequestError(f"prompts times n are {count} answers, more than {MAX_ANSWERS}", "n")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    if body.echo and body.logprobs is not None:
        raise RequestError("logprobs are of the answer only: leave out echo or logprobs", "echo")
    for name in ("min_pixels", "max_pixels"):
        if getattr(body, name) is not None:
            raise RequestError(f"{name} is of pictures, which a completion has none of: leave it out", name)


class TextChoice:
    """One choice: its Deltas in, its pieces out. end_ids: tokens that end an answer and have no logprobs."""

    def __init__(
        self, index: int, token_bytes: TokenBytes, end_ids: frozenset[int], body: CompletionRequest, echo: str
    ) -> None:
        self.index, self.echo = index, echo
        self.usage: request.Usage | None = None
        self._token_bytes, self._end_ids, self._body = token_bytes, end_ids, body
        self._offset, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")

    def first(self, prompt: Sequence[int]) -> CompletionChoice | None:
        """What comes before the answer; None where that is nothing."""
        ids = list(prompt) if self._body.return_token_ids else None
        return CompletionChoice(index=self.index, text=self.echo, prompt_token_ids=ids) if self.echo or ids else None

    def feed(self, delta: Delta) -> CompletionChoice | None:
        """None where there is nothing to tell."""
        logprobs = None if self._body.logprobs is None else self._logprobs(delta)
        ids = list(delta.token_ids) if self._body.return_token_ids and delta.token_ids else None
        self.usage = delta.usage or self.usage
        reason = delta.finish_reason
        if not (delta.text or logprobs or ids or reason):
            return None
        return CompletionChoice(
            index=self.index,
            text=delta.text,
            logprobs=logprobs,
            finish_reason=None if reason is None else "stop" if reason == "stop" else "length",
            token_ids=ids,
        )

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        shown = list(delta.logprobs)
        if delta.finish_reason == "stop" and shown and shown[-1].token_id in self._end_ids:
            shown.pop()
        if not shown:
            return None
        offsets = [self._advance(each) for each in shown]
        tops = [{self._text(token): logprob for token, logprob in each.top} for each in shown]
        return CompletionLogprobs(
            tokens=[self._text(each.token_id) for each in shown],
            token_logprobs=[each.logprob for each in shown],
            top_logprobs=tops if self._body.logprobs else None,
            text_offset=offsets,
        )

    def _advance(self, each: TokenLogprob) -> int:
        before = self._offset
        self._offset += len(self._decoder.decode(self._token_bytes(each.token_id)))
        return before

    def _text(self, token_id: int) -> str:
        data = self._token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:  # as OpenAI writes it: texts with U+FFFD would be equal where tokens are not
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionAssembler:
    """A request's answer, of all its choices; n: of each prompt."""

    def __init__(self, choices: Sequence[TextChoice], model: str, n: int, *, with_usage: bool) -> None:
        """with_usage: a stream's last event tells it."""
        self._choices, self._model, self._n, self._with_usage = choices, model, n, with_usage
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    def begin(self, prompts: Sequence[tuple[int, ...]]) -> list[TextCompletion]:
        """The events before any answer."""
        pieces = [each.first(prompt) for each, prompt in zip(self._choices, prompts, strict=True)]
        return [self._body([piece]) for piece in pieces if piece is not None]

    def feed(self, index: int, delta: Delta) -> list[TextCompletion]:
        """The events of one choice's Delta."""
        piece = self._choices[index].feed(delta)
        return [] if piece is None else [self._body([piece])]

    def end(self) -> list[TextCompletion]:
        """The events after all answers."""
        return [self._body([], total_usage(self._usages, self._n))] if self._with_usage else []

    def whole(self, prompts: Sequence[tuple[int, ...]], deltas: Iterable[tuple[int, Delta]]) -> TextCompletion:
        """Everything at once: the same pieces put together."""
        pieces: list[list[CompletionChoice]] = [
            [piece for piece in [each.first(prompt)] if piece is not None]
            for each, prompt in zip(self._choices, prompts, strict=True)
        ]
        for index, delta in deltas:
            piece = self._choices[index].feed(delta)
            if piece is not None:
                pieces[index].append(piece)
        return self._body([joined(each) for each in pieces], total_usage(self._usages, self._n))

    @property
    def usage(self) -> request.Usage:
        """Of all choices, at their end."""
        return of_prompts(self._usages, self._n)

    @property
    def _usages(self) -> list[request.Usage]:
        return [each.usage for each in self._choices if each.usage is not None]

    def _body(self, choices: list[CompletionChoice], usage: Usage | None = None) -> TextCompletion:
        return TextCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


def joined(pieces: Sequence[CompletionChoice]) -> CompletionChoice:
    """The pieces of one choice. Raises InternalError before its end."""
    if not pieces or pieces[-1].finish_reason is None:
        raise InternalError("the answer ended without a finish reason")
    told = [each.logprobs for each in pieces if each.logprobs is not None]
    tops = [each for part in told for each in part.top_logprobs or ()]
    logprobs = CompletionLogprobs(
        tokens=[each for part in told for each in part.tokens],
        token_logprobs=[each for part in told for each in part.token_logprobs],
        top_logprobs=tops or None,
        text_offset=[each for part in told for each in part.text_offset],
    )
    ids = [token for each in pieces for token in each.token_ids or ()]
    return CompletionChoice(
        index=pieces[0].index,
        text="".join(each.text for each in pieces),
        logprobs=logprobs if told else None,
        finish_reason=pieces[-1].finish_reason,
        prompt_token_ids=pieces[0].prompt_token_ids,
        token_ids=ids or None,
    )
