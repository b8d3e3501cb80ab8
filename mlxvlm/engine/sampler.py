"""Logits -> tokens, one row independent of the others. Knows parameters and probabilities, not text.

A row's token depends on its own logits, parameters, history and seed only: noise is drawn in vocabulary order from a
key that is a pure function of (seed, step), so neither the batch nor another row's settings can change it.
Sources: Holtzman et al. 2020 (top-p, arXiv 1904.09751); Nguyen et al. 2024 (min-p, arXiv 2407.01082); Meister et al.
2022 (typical-p, arXiv 2202.00666); p-e-w (XTC, text-generation-webui pull request 6335); Gumbel-max.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine import dry
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import TokenLogprob

_MASK_64 = (1 << 64) - 1
_MIN_TEMPERATURE = 1e-5  # as good as greedy; much lower ones overflow float32


class RowSampler:
    """One sequence's sampling state: parameters, seed, step and token counts.

    history: the row's generated tokens, as they are read; decode: the text of tokens. Only DRY looks at them.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        history: Sequence[int] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.params = params
        self.seed = (secrets.randbits(64) if params.seed is None else params.seed) & _MASK_64
        self.step = 0
        self.counts: mx.array | None = None  # int32 [V]: generated tokens
        self._prompt_ids = prompt_ids
        self._history = history
        self._decode = decode
        self._in_prompt: mx.array | None = None  # bool [V]
        self._bias: mx.array | None = None  # float32 [V]

    def note(self, tokens: mx.array, index: int) -> None:
        """Counts its sampled token tokens[index], which may not have been computed yet."""
        self.step += 1
        if self.counts is not None:
            self.counts = self.counts.at[tokens[index]].add(1)

    def ahead(self, guessed: Sequence[int], vocab_size: int) -> RowSampler:
        """Another one, as this one will be once it has chosen the guessed tokens."""
        if self.params.has_penalties:
            self.tally(vocab_size)
        later = copy(self)
        later.step += len(guessed)
        if later.counts is not None and guessed:
            later.counts = later.counts.at[mx.array(list(guessed))].add(1)
        return later

    def key(self) -> NDArray[np.uint32]:
        """The random key of this step, [2]."""
        mixed = _mixed(self.seed, self.step)
        return np.array([mixed >> 32, mixed & 0xFFFFFFFF], np.uint32)

    @property
    def excludes_top(self) -> bool:
        """Whether XTC's dice fall so in this step. The noise comes from the same bits, but as a cipher's key."""
        chance = self.params.xtc_probability
        return chance > 0 and _mixed(self.seed, self.step) < chance * 2.0**64

    def tally(self, vocab_size: int) -> tuple[mx.array, mx.array]:
        """(counts of generated tokens [V], whether a token is in the prompt [V])."""
        if self.counts is None or self._in_prompt is None:
            self.counts = mx.zeros(vocab_size, mx.int32)
            present = np.zeros(vocab_size, np.bool_)
            # Placeholders may lie beyond the vocabulary that can be generated.
            present[[token for token in self._prompt_ids if token < vocab_size]] = True
            self._in_prompt = mx.array(present)
        return self.counts, self._in_prompt

    def bias(self, vocab_size: int) -> mx.array:
        """float32 [V]."""
        if self._bias is None:
            bias = np.zeros(vocab_size, np.float32)
            for token, value in self.params.logit_bias.items():
                bias[token] = value
            self._bias = mx.array(bias)
        return self._bias

    def dry(self) -> Mapping[int, float]:
        """Penalties of tokens by id, for what has been read so far."""
        history = np.concatenate([self._prompt_array, np.array(self._history, np.int64)])
        return dry.penalties(history, self.params, self._is_breaker)

    @cached_property
    def _prompt_array(self) -> NDArray[np.int64]:
        return np.array(self._prompt_ids, np.int64)

    def _is_breaker(self, token: int) -> bool:
        text = self._decode([token]) if self._decode is not None else ""
        return any(breaker in text for breaker in self.params.dry_sequence_breakers)


def _mixed(seed: int, step: int) -> int:
    """64 random bits. Source: Steele et al. 2014, SplitMix64."""
    mixed = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return mixed ^ (mixed >> 31)


@dataclass(frozen=True)
class Sampled:
    """One step's results on the device, not yet read. `top_*` are [B, n] for the largest n any row asked for."""

    tokens: mx.array  # uint32 [B]
    bad: mx.array  # bool [B]: the logits held NaN, the token means nothing
    logprobs: mx.array | None = None  # float32 [B]
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        optional = (self.logprobs, self.top_ids, self.top_logprobs)
        return [self.tokens, self.bad, *(array for array in optional if array is not None)]


def sample(logits: mx.array, rows: Sequence[RowSampler], masks: NDArray[np.uint32] | None = None) -> Sampled:
    """Chooses a token for each row of logits [B, V] and counts it.

    masks [B, words]: the tokens that may be chosen, one bit each, the first token the lowest bit of the first word.
    """
    raw = logits.astype(mx.float32)
    edited = edit(raw, rows)
    if masks is not None:
        edited = mx.where(_unpacked(mx.array(masks), raw.shape[-1]), edited, -mx.inf)
    tokens = mx.argmax(edited, axis=-1)
    if any(row.params.temperature > 0 for row in rows):
        hot = mx.array([row.params.temperature > 0 for row in rows])
        tokens = mx.where(hot, _draw(edited, rows), tokens)
    for i, row in enumerate(rows):
        row.note(tokens, i)
    bad = mx.any(mx.isnan(raw), axis=-1)
    return Sampled(tokens, bad, *_logprobs(raw, tokens, rows))


def edit(logits: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """Penalties and biases, float32 [B, V]; a row without them keeps its bits."""
    vocab_size = logits.shape[-1]
    if any(row.params.has_penalties for row in rows):
        logits = _penalised(logits, rows)
    if any(row.params.logit_bias for row in rows):
        none = mx.zeros(vocab_size)
        logits = logits + mx.stack([row.bias(vocab_size) if row.params.logit_bias else none for row in rows])
    found = [(i, row.dry()) for i, row in enumerate(rows) if row.params.dry_multiplier > 0]
    costs = [(i, token, cost) for i, by_token in found for token, cost in by_token.items() if token < vocab_size]
    if costs:
        index, token, cost = zip(*costs, strict=True)
        logits = logits.at[mx.array(index), mx.array(token)].subtract(mx.array(cost))
    return logits


def _penalised(logits: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """Repetition, then OpenAI's: logit[j] - count[j] * frequency_penalty - (count[j] > 0) * presence_penalty."""
    vocab_size = logits.shape[-1]
    nothing = (mx.zeros(vocab_size, mx.int32), mx.zeros(vocab_size, mx.bool_))
    tallies = [row.tally(vocab_size) if row.params.has_penalties else nothing for row in rows]
    counts = mx.stack([count for count, _ in tallies])
    seen = mx.stack([in_prompt for _, in_prompt in tallies]) | (counts > 0)
    repetition = mx.array([row.params.repetition_penalty for row in rows])[:, None]
    frequency = mx.array([row.params.frequency_penalty for row in rows])[:, None]
    presence = mx.array([row.params.presence_penalty for row in rows])[:, None]
    logits = mx.where(seen, mx.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - frequency * counts - presence * (counts > 0)


def _unpacked(words: mx.array, vocab_size: int) -> mx.array:
    """bool [B, V] from bits, uint32 [B, words]."""
    bits = (words[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab_size].astype(mx.bool_)


def _draw(logits: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """Gumbel-max over the tokens that the filters keep, [B]."""
    temperature = mx.array([max(row.params.temperature, _MIN_TEMPERATURE) for row in rows])[:, None]
    scaled = logits / temperature
    if any(_filters(row.params) for row in rows):
        scaled = mx.where(_kept(scaled, rows), scaled, -mx.inf)
    keys = mx.array(np.stack([row.key() for row in rows]))
    vocab_size = logits.shape[-1]
    noise = mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)
    return mx.argmax(scaled + noise, axis=-1)


def _filters(params: SamplingParams) -> bool:
    some_left_out = params.top_p < 1.0 or params.min_p > 0.0 or params.typical_p < 1.0
    return some_left_out or params.top_k > 0 or params.xtc_probability > 0.0


def _kept(scaled: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """bool [B, V]: inside top_k, then inside top_p of what is left, above min_p of the best, typical; then XTC."""
    vocab_size = scaled.shape[-1]
    top_k = mx.array([min(row.params.top_k or vocab_size, vocab_size) for row in rows])[:, None]
    top_p = mx.array([row.params.top_p for row in rows])[:, None]
    min_p = mx.array([row.params.min_p for row in rows])[:, None]
    order = mx.argsort(-scaled, axis=-1)
    ranked = mx.take_along_axis(scaled, order, axis=-1)
    rank = mx.arange(vocab_size)[None]
    in_top_k = rank < top_k
    probabilities = mx.softmax(mx.where(in_top_k, ranked, -mx.inf), axis=-1)
    # What comes before a token decides, so that the token which crosses top_p stays in; the best always does.
    before = mx.cumsum(probabilities, axis=-1, inclusive=False)
    kept = in_top_k & ((before < top_p) | (top_p >= 1.0)) & (probabilities >= min_p * probabilities[:, :1])
    kept = kept | (rank == 0)
    if any(row.params.typical_p < 1.0 for row in rows):
        kept = kept & _typical(mx.softmax(mx.where(kept, ranked, -mx.inf), axis=-1), rows)
    if any(row.excludes_top for row in rows):
        kept = kept & ~_top_choices(mx.softmax(mx.where(kept, ranked, -mx.inf), axis=-1), rows)
    return mx.put_along_axis(mx.zeros(scaled.shape, mx.bool_), order, kept, axis=-1)


def _typical(probabilities: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """bool [B, V]: the tokens whose information is nearest to the expected, together at least typical_p."""
    typical_p = mx.array([row.params.typical_p for row in rows])[:, None]
    possible = probabilities > 0
    information = mx.where(possible, -mx.log(mx.where(possible, probabilities, 1.0)), 0.0)
    entropy = mx.sum(probabilities * information, axis=-1, keepdims=True)
    distance = mx.where(possible, mx.abs(information - entropy), mx.inf)
    order = mx.argsort(distance, axis=-1)
    before = mx.cumsum(mx.take_along_axis(probabilities, order, axis=-1), axis=-1, inclusive=False)
    near = (before < typical_p) | (mx.arange(distance.shape[-1])[None] == 0)
    return mx.put_along_axis(mx.zeros(distance.shape, mx.bool_), order, near, axis=-1) | (typical_p >= 1.0)


def _top_choices(ranked: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """bool [B, V]: of the tokens at or above xtc_threshold all but the least likely. ranked: probabilities, falling."""
    threshold = mx.array([row.params.xtc_threshold for row in rows])[:, None]
    above = (ranked >= threshold) & (ranked > 0)
    place = mx.cumsum(above.astype(mx.int32), axis=-1)
    return above & (place < place[:, -1:]) & mx.array([row.excludes_top for row in rows])[:, None]


def _logprobs(
    raw: mx.array, tokens: mx.array, rows: Sequence[RowSampler]
) -> tuple[mx.array | None, mx.array | None, mx.array | None]:
    wanted = max((-1 if row.params.top_logprobs is None else row.params.top_logprobs for row in rows), default=-1)
    if wanted < 0:
        return None, None, None
    logprobs = raw - mx.logsumexp(raw, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    if not wanted:
        return chosen, None, None
    top_ids = mx.argsort(-logprobs, axis=-1)[:, :wanted]
    return chosen, top_ids, mx.take_along_axis(logprobs, top_ids, axis=-1)


Result: TypeAlias = tuple[int, bool, TokenLogprob | None]  # token id, whether it means nothing, logprob


def read(sampled: Sampled, rows: Sequence[RowSampler]) -> list[Result]:
    """Waits for a step."""
    tokens, bad = np.array(sampled.tokens).tolist(), np.array(sampled.bad).tolist()
    return list(zip(tokens, bad, _read_logprobs(sampled, tokens, rows), strict=True))


def _read_logprobs(sampled: Sampled, tokens: list[int], rows: Sequence[RowSampler]) -> list[TokenLogprob | None]:
    if sampled.logprobs is None:
        return [None] * len(rows)
    logprobs = np.array(sampled.logprobs).tolist()
    top: list[list[tuple[int, float]]] = [[]] * len(rows)
    if sampled.top_ids is not None:
        pairs = zip(np.array(sampled.top_ids).tolist(), np.array(sampled.top_logprobs).tolist(), strict=True)
        top = [list(zip(ids, values, strict=True)) for ids, values in pairs]
    counts = [row.params.top_logprobs for row in rows]
    return [
        None if count is None else TokenLogprob(token, logprob, tuple(alternatives[:count]))
        for token, logprob, alternatives, count in zip(tokens, logprobs, top, counts, strict=True)
    ]
