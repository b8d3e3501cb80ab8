"""A request inside the engine: all of its state, from the prompt to the last token. Knows no other request.

A request (what came in) becomes a sequence here and a row (index in a batch) while it decodes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from enum import Enum, auto

import mlx.core as mx

from mlxvlm.engine.admission import Need
from mlxvlm.engine.constraints import Constraint
from mlxvlm.engine.context import shifted
from mlxvlm.engine.detokenizer import Detokenizer
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.prefix_cache import Link
from mlxvlm.engine.request import Delta, FinishReason, TokenLogprob, Usage
from mlxvlm.engine.sampler import RowSampler
from mlxvlm.engine.stops import StopMatcher
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import MlxvlmError
from mlxvlm.processors.base import Processor, Prompt

_PATCH_VALUES = 14 * 14 * 3  # pixel values that cost a tower about what a token costs the decoder


class Phase(Enum):
    """Where a sequence is. It only moves forward, but for shift()."""

    PREPARING = auto()  # in the pool: images, template, token ids
    VISION = auto()
    PREFILL = auto()
    DECODE = auto()
    DONE = auto()


class Sequence:
    """One answer in the making. Touched by the engine thread only, but for the stream's own lock."""

    _ids = itertools.count()

    def __init__(self, sampling: SamplingParams, stream: Stream, timeout_s: float | None = None) -> None:
        self.id = next(self._ids)
        self.sampling = sampling
        self.stream = stream
        self.phase = Phase.PREPARING
        self.submitted = time.perf_counter()
        self.prepared = self.started = self.first_token = 0.0
        self.vision_s = 0.0  # spent on its pictures
        self.deadline = math.inf if timeout_s is None else self.submitted + timeout_s
        self.preparing: Future[Prompt] | None = None  # until it is prepared
        self.prompt = Prompt(())
        self.constraint: Constraint | None = None
        self.keep = 0  # tokens at the beginning that a shift does not drop
        self.prompt_tokens = self.image_tokens = 0
        self.cached_tokens = 0
        self.failed = False
        self._stops = StopMatcher(sampling.stop)
        self.token_ids: list[int] = []  # generated and delivered
        self.drafted_tokens = self.accepted_tokens = 0

    def begin(self, prompt: Prompt, processor: Processor, max_tokens: int, eos: frozenset[int]) -> None:
        """The prompt is ready: everything that generating needs is set up. A limit may be raised while it runs."""
        sampling = self.sampling
        self.prompt_tokens = len(prompt.token_ids)
        self.image_tokens = prompt.token_ids.count(processor.image_token_id) if prompt.images else 0
        self.launched = 0  # sampled on the device, read or not
        # Memory is reserved for the first; the second is what may come, the third what the context has room for.
        self.max_tokens = self.longest = self.full = max_tokens
        self.need = Need(0, 0, 0)
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos)
        self.sampler = RowSampler(sampling, prompt.token_ids, self.token_ids, processor.tokenizer.decode)
        shown = {token: processor.tokenizer.spelling(token) for token in sampling.visible_token_ids}
        self._detokenizer = Detokenizer(processor.tokenizer.decode, shown)
        self.prepared = time.perf_counter()
        self._start(prompt)

    def _start(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.before = len(self.token_ids)  # generated tokens that a shift has made part of the prompt, or dropped
        self.blocks: list[Link] = []  # the whole ones of the prefix cache, as far as ids are known
        self.features: list[mx.array | None] = [None] * len(prompt.images)
        self.needed: Seq[int] = ()  # images that must have features
        self.recalled = False  # what was held of the prompt is looked up
        self.prefilled = 0
        self.phase = Phase.VISION if prompt.images else Phase.PREFILL
        self.stream.begin(prompt.token_ids)

    @property
    def outgrows(self) -> bool:
        """Whether the context is full before the answer's end: shift() is due."""
        return not self.done and self.full <= len(self.token_ids) < self.longest

    def shift(self, max_context: int) -> None:
        """Goes on as a prompt of what is kept of prompt and answer; all that the reader sees stays as it is.

        What is reserved is enough, as it was for a full context.
        """
        prompt = shifted(self.prompt, self.token_ids[self.before :], self.keep)
        self._start(prompt)
        self.full = len(self.token_ids) + max_context - len(prompt.token_ids)
        self.max_tokens = min(self.longest, self.full)

    @property
    def ids(self) -> list[int]:
        """What its row holds: the prompt, and what was generated after it."""
        return [*self.prompt.token_ids, *self.token_ids[self.before :]]

    def start_clock(self) -> None:
        """The engine turns to this sequence for the first time."""
        self.started = time.perf_counter()

    @property
    def done(self) -> bool:
        return self.phase is Phase.DONE

    @property
    def prefill_length(self) -> int:
        """All but the last prompt token, which is the first that decode reads."""
        return len(self.prompt.token_ids) - 1

    @property
    def length(self) -> int:
        """Positions in the KV cache, where all tokens are read: the last one is still to be fed."""
        return len(self.prompt.token_ids) + len(self.token_ids) - self.before - 1

    @property
    def last_token(self) -> int:
        """The next one to be fed, where all are read."""
        return self.token_ids[-1] if self.token_ids else self.prompt.token_ids[-1]

    @property
    def pixel_bytes(self) -> int:
        return sum(int(image.pixels.nbytes) for image in self.prompt.images)

    @property
    def work_left(self) -> int:
        """Tokens to prefill, and pictures to encode counted as so many tokens."""
        waiting = self.needed if self.phase is Phase.VISION else ()
        images = [self.prompt.images[index] for index in waiting if self.features[index] is None]
        return self.prefill_length - self.prefilled + sum(image.pixels.size for image in images) // _PATCH_VALUES

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Takes one sampled token: passes its text on, or ends the answer."""
        if not self.token_ids:
            self.first_token = time.perf_counter()
        self.token_ids.append(token_id)
        logprobs = () if logprob is None else (logprob,)
        if token_id in self.stop_ids:
            self._end("stop", self._flush(), (token_id,), logprobs)
            return
        text = self._stops.feed(self._detokenizer.feed(token_id))
        if self._stops.stopped:
            self._end("stop", text, (token_id,), logprobs)
        elif len(self.token_ids) >= self.max_tokens and not self.outgrows:
            self._end("length", text + self._flush(), (token_id,), logprobs)
        else:
            self.stream.put(Delta(text, (token_id,), logprobs))

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """Ends the answer with what there is."""
        if not self.done:
            self._end(reason, self._flush() if self.token_ids else "", (), ())

    def fail(self, error: MlxvlmError) -> None:
        """Ends the request with an error of its own."""
        if not self.done:
            self.phase = Phase.DONE
            self.failed = True
            self._release()
            self.stream.put(error)

    def _flush(self) -> str:
        text = self._stops.feed(self._detokenizer.flush())
        return text if self._stops.stopped else text + self._stops.flush()

    def _end(
        self, reason: FinishReason, text: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> None:
        last = Delta(text, token_ids, logprobs, reason, self._usage(), self._stops.found)
        self.phase = Phase.DONE  # not before: whoever is done is not told of a failure any more
        self._release()
        self.stream.put(last)

    def _release(self) -> None:
        """Arrays go now, not when the last reader lets go of the stream."""
        self.features = []
        self.constraint = None

    def _usage(self) -> Usage:
        now = time.perf_counter()
        prepared = self.prepared or now
        started = self.started or prepared
        first = self.first_token or now
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.token_ids),
            image_tokens=self.image_tokens,
            prepare_s=prepared - self.submitted,
            prompt_s=first - started,
            completion_s=now - first,
            time_to_first_token_s=first - self.submitted,
            total_s=now - self.submitted,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            vision_s=self.vision_s,
        )
