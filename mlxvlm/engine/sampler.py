"""Logits -> tokens, one row independent of the others. Knows parameters and probabilities, not text.

A row's token depends on its own logits, parameters and seed only: noise is drawn in vocabulary order from a key that
is a pure function of (seed, step), so neither the batch nor another row's settings can change it.
Sources: Holtzman et al. 2020 (top-p, arXiv 1904.09751); Nguyen et al. 2024 (min-p, arXiv 2407.01082); Gumbel-max.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import TokenLogprob

_MASK_64 = (1 << 64) - 1


class RowSampler:
    """One sequence's sampling state: parameters, seed, step and token counts."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.seed = (secrets.randbits(64) if params.seed is None else params.seed) & _MASK_64
        self.step = 0
        self._prompt_ids = prompt_ids
        self._counts: mx.array | None = None  # int32 [V]: generated tokens
        self._in_prompt: mx.array | None = None  # bool [V]
        self._bias: mx.array | None = None  # float32 [V]

    @property
    def edits_logits(self) -> bool:
        return self.params.has_penalties or bool(self.params.logit_bias)

    def edit(self, logits: mx.array) -> mx.array:
        """Penalties and biases on one row's logits, float32 [V]."""
        params = self.params
        if params.has_penalties:
            counts, seen = self._tally(logits.shape[-1])
            if params.repetition_penalty != 1.0:
                penalty = params.repetition_penalty
                logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if params.logit_bias:
            logits = logits + self._bias_row(logits.shape[-1])
        return logits

    def note(self, tokens: mx.array, index: int) -> None:
        """Counts its sampled token tokens[index], which may not have been computed yet."""
        self.step += 1
        if self._counts is not None:
            self._counts = self._counts.at[tokens[index]].add(1)

    def key(self) -> NDArray[np.uint32]:
        """The random key of this step, [2]. Source of the mixing: Steele et al. 2014, SplitMix64."""
        mixed = (self.seed + (self.step + 1) * 0x9E3779B97F4A7C15) & _MASK_64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
        mixed ^= mixed >> 31
        return np.array([mixed >> 32, mixed & 0xFFFFFFFF], np.uint32)

    def _tally(self, vocab_size: int) -> tuple[mx.array, mx.array]:
        if self._counts is None or self._in_prompt is None:
            self._counts = mx.zeros(vocab_size, mx.int32)
            present = np.zeros(vocab_size, np.bool_)
            # Placeholders may lie beyond the vocabulary that can be generated.
            present[[token for token in self._prompt_ids if token < vocab_size]] = True
            self._in_prompt = mx.array(present)
        return self._counts, self._in_prompt | (self._counts > 0)

    def _bias_row(self, vocab_size: int) -> mx.array:
        if self._bias is None:
            bias = np.zeros(vocab_size, np.float32)
            for token, value in self.params.logit_bias.items():
                bias[token] = value
            self._bias = mx.array(bias)
        return self._bias


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


def sample(logits: mx.array, rows: Sequence[RowSampler]) -> Sampled:
    """Chooses a token for each row of logits [B, V] and counts it."""
    raw = logits.astype(mx.float32)
    edited = raw
    if any(row.edits_logits for row in rows):
        edited = mx.stack([row.edit(raw[i]) if row.edits_logits else raw[i] for i, row in enumerate(rows)])
    tokens = mx.argmax(edited, axis=-1)
    if any(row.params.temperature > 0 for row in rows):
        hot = mx.array([row.params.temperature > 0 for row in rows])
        tokens = mx.where(hot, _draw(edited, rows), tokens)
    for i, row in enumerate(rows):
        row.note(tokens, i)
    bad = mx.any(mx.isnan(raw), axis=-1)
    return Sampled(tokens, bad, *_logprobs(raw, tokens, rows))


def _draw(logits: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """Gumbel-max over the tokens that the filters keep, [B]."""
    temperature = mx.array([row.params.temperature or 1.0 for row in rows])[:, None]
    scaled = logits / temperature
    if any(_filters(row.params) for row in rows):
        scaled = mx.where(_kept(scaled, rows), scaled, -mx.inf)
    keys = mx.array(np.stack([row.key() for row in rows]))
    vocab_size = logits.shape[-1]
    noise = mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)
    return mx.argmax(scaled + noise, axis=-1)


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _kept(scaled: mx.array, rows: Sequence[RowSampler]) -> mx.array:
    """bool [B, V]: inside top_k, then inside top_p of what is left, then above min_p of the best."""
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
    return mx.put_along_axis(mx.zeros(scaled.shape, mx.bool_), order, kept, axis=-1)


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


def read(sampled: Sampled, rows: Sequence[RowSampler]) -> list[tuple[int, bool, TokenLogprob | None]]:
    """Waits for a step: (token id, bad, logprob) of each row."""
    tokens, bad = np.array(sampled.tokens), np.array(sampled.bad)
    return [(int(tokens[i]), bool(bad[i]), _read_logprob(sampled, i, row)) for i, row in enumerate(rows)]


def _read_logprob(sampled: Sampled, index: int, row: RowSampler) -> TokenLogprob | None:
    count = row.params.top_logprobs
    if count is None or sampled.logprobs is None:
        return None
    token, logprob = int(np.array(sampled.tokens)[index]), float(np.array(sampled.logprobs)[index])
    if not count or sampled.top_ids is None or sampled.top_logprobs is None:
        return TokenLogprob(token, logprob)
    ids = np.array(sampled.top_ids)[index, :count].tolist()
    return TokenLogprob(token, logprob, tuple(zip(ids, np.array(sampled.top_logprobs)[index].tolist(), strict=False)))
