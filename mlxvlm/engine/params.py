"""How to choose tokens and when to stop. Knows no MLX, so that doors can build it cheaply."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from mlxvlm.errors import UsageError

MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_STOP_STRINGS = 64
MAX_GRAMMAR_CHARS = 128 * 1024  # OpenAI's limit for the strings of a schema is 120,000; compiling takes seconds here
# One space, or a new line and its indentation: without a bound, a weak model's JSON may end in spaces without end.
JSON_WHITESPACE = r"\x20|\r?\n[\x20\t]{0,32}"

GrammarKind: TypeAlias = Literal["json_schema", "json_object", "regex", "lark", "llguidance"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, from its first character to its last.

    value: a JSON schema as a mapping or text; nothing for json_object (any object); a regular expression in Rust's
    syntax, without look-around; a Lark grammar in llguidance's dialect; llguidance's own JSON as a mapping or text.
    A schema's keywords that can't be enforced are errors. `"x-guidance": {...}` inside it sets llguidance's options.
    """

    kind: GrammarKind
    value: str | Mapping[str, Any] = ""

    def check(self) -> None:
        """Raises UsageError for what is no grammar at all; its syntax is looked at when it is compiled."""
        kinds = get_args(GrammarKind)
        if self.kind not in kinds:
            raise UsageError(f"the kind of a grammar must be one of {', '.join(kinds)}, not {self.kind!r}")
        is_mapping = isinstance(self.value, Mapping) and self.kind in ("json_schema", "llguidance")
        if not is_mapping and not isinstance(self.value, str):
            raise UsageError(f"a {self.kind} grammar can't be a {type(self.value).__name__}")
        if isinstance(self.value, str) and len(self.value) > MAX_GRAMMAR_CHARS:
            raise UsageError(f"the grammar has {len(self.value)} characters, but the limit is {MAX_GRAMMAR_CHARS}")
        if isinstance(self.value, str) and any("\ud800" <= char <= "\udfff" for char in self.value):
            raise UsageError("the grammar holds half of a surrogate pair, which is no character: remove it")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """OpenAI's names and meanings, and the extensions that local users know.

    temperature 0 is greedy: what follows it in the order then changes nothing. top_k 0, top_p 1, min_p 0, typical_p 1,
    xtc_probability 0 and dry_multiplier 0 are off. frequency_penalty and presence_penalty count generated tokens;
    repetition_penalty (Keskar et al. 2019, arXiv 1909.05858) and DRY (engine/dry.py) also look at the prompt.
    Order: penalties, logit_bias, DRY, grammar, temperature, top_k, top_p, min_p, typical_p, XTC. top_logprobs None:
    no logprobs; they are those of the model, before any of this. visible_token_ids: special tokens that the text of
    the answer shows, as those that mark a tool call; it shows no others.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    max_tokens: int | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    visible_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    grammar: Grammar | None = None

    def check(self, vocab_size: int) -> None:
        """Raises UsageError naming the first parameter out of range; MLX checks no bounds."""
        for name, (low, high) in RANGES.items():
            _in_range(name, getattr(self, name), low, high)
        _whole("top_k", self.top_k, 0)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
        if self.seed is not None:
            _whole("seed", self.seed, None)
        if self.top_logprobs is not None:
            _whole("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        _whole("dry_allowed_length", self.dry_allowed_length, 1)
        _strings("stop", self.stop)
        _strings("dry_sequence_breakers", self.dry_sequence_breakers)
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError("logit_bias takes a mapping from token ids to numbers")
        for name in ("stop_token_ids", "visible_token_ids"):
            tokens = getattr(self, name)
            if not isinstance(tokens, Collection):
                raise UsageError(f"{name} takes a list of token ids")
            for token in tokens:
                _whole(f"a token id of {name}", token, 0)
        for token, bias in self.logit_bias.items():
            _whole("a token id of logit_bias", token, 0, vocab_size - 1)
            _in_range("a value of logit_bias", bias, -100.0, 100.0)
        if self.grammar is not None:
            if not isinstance(self.grammar, Grammar):
                raise UsageError(f"grammar takes a mlxvlm.Grammar, not a {type(self.grammar).__name__}")
            self.grammar.check()
            if self.ignore_eos:
                raise UsageError("ignore_eos and grammar exclude each other: where a grammar ends, so does the answer")

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @property
    def reads_history(self) -> bool:
        """Whether choosing a token needs the ones before it on the host."""
        return self.dry_multiplier > 0 or self.grammar is not None


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams, for functions that take them by name."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    max_tokens: int | None
    seed: int | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_sequence_breakers: Sequence[str]
    logit_bias: Mapping[int, float]
    stop: Sequence[str]
    stop_token_ids: Collection[int]
    visible_token_ids: Collection[int]
    ignore_eos: bool
    top_logprobs: int | None
    grammar: Grammar | None


# What a parameter may be; doors describe it with the same numbers.
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "repetition_penalty": (0.01, 100.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 10.0),
}


def _strings(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str) or not isinstance(values, Collection):  # one string would be taken letter by letter
        raise UsageError(f"{name} takes a list of strings, not {'one string' if values else repr(values)}")
    if len(values) > MAX_STOP_STRINGS or not all(isinstance(value, str) and value for value in values):
        raise UsageError(f"{name} takes up to {MAX_STOP_STRINGS} strings, none of them empty")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def _whole(name: str, value: int, low: int | None, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise UsageError(f"{name} must be a whole number {bounds}, not {value!r}")
