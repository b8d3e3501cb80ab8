"""How to choose tokens and when to stop. Knows no MLX, so that doors can build it cheaply."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mlxvlm.errors import UsageError

MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_STOP_STRINGS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """OpenAI's names and meanings, and the extensions that local users know.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. frequency_penalty and presence_penalty count
    generated tokens; repetition_penalty (Keskar et al. 2019, arXiv 1909.05858) also those of the prompt.
    Order: penalties, logit_bias, temperature, top_k, top_p, min_p. top_logprobs None: no logprobs; they are those of
    the model, before any of this.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None

    def check(self, vocab_size: int) -> None:
        """Raises UsageError naming the first parameter out of range; MLX checks no bounds."""
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _in_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        if self.repetition_penalty == 0:
            raise UsageError("repetition_penalty must be above 0 (1 is off)")
        _whole("top_k", self.top_k, 0)
        _whole("max_tokens", self.max_tokens, 1)
        _whole("seed", self.seed, None)
        _whole("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if isinstance(self.stop, str):  # it would be taken letter by letter
            raise UsageError("stop takes a list of strings, not one string")
        if len(self.stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in self.stop):
            raise UsageError(f"stop takes up to {MAX_STOP_STRINGS} strings, none of them empty")
        for token in self.stop_token_ids:
            _whole("a token id of stop_token_ids", token, 0)
        for token, bias in self.logit_bias.items():
            _whole("a token id of logit_bias", token, 0, vocab_size - 1)
            _in_range("a value of logit_bias", bias, -100.0, 100.0)

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)


def _in_range(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def _whole(name: str, value: int | None, low: int | None, high: int | None = None) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise UsageError(f"{name} must be a whole number {bounds}, not {value!r}")
