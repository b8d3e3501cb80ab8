"""Structured output: which tokens a grammar allows next. Knows grammars and token ids, no tensors and no models.

Source: llguidance, https://github.com/guidance-ai/llguidance. It is imported when the first grammar arrives.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine.params import JSON_WHITESPACE, MAX_GRAMMAR_CHARS, Grammar
from mlxvlm.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

COMPILE_TIMEOUT_S = 10.0  # intersections of patterns can take for ever; llguidance bounds everything else
MASK_THREADS = 4
_MAX_ERROR_CHARS = 300

T = TypeVar("T")


class TextTokenizer(Protocol):
    """What of a processor's tokenizer is needed: `backend` is a `tokenizers.Tokenizer`."""

    backend: Any


class Constraint:
    """One sequence's place in its grammar."""

    def __init__(self, kind: str, matcher: LLMatcher) -> None:
        self.kind = kind
        self.matcher = matcher
        self.is_stuck = False

    @property
    def error(self) -> str | None:
        """Why no token can come next, None if one can."""
        if self.matcher.is_error():
            return f"the answer can't go on as its {self.kind} grammar says: {_one_line(self.matcher.get_error())}"
        if self.is_stuck:
            return f"the answer can't go on as its {self.kind} grammar says: the model has no token for what must come"
        return None


Row: TypeAlias = tuple[Constraint, Sequence[int]]  # and all tokens of its answer so far


class Constraints:
    """Compiles grammars for one model's tokens, and computes the masks of a step."""

    def __init__(self, tokenizer: TextTokenizer, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._lock = threading.Lock()  # the bridge is built once, by whichever thread comes first

    def compile(self, grammar: Grammar) -> Constraint:
        """A sequence's constraint at its start. Called from any thread; may take seconds.

        Raises InputError for a grammar that is wrong, too big, or allows nothing at all.
        """
        from llguidance import LLMatcher

        source = _source(grammar)
        with self._lock:
            bridge = self._bridge

        def build() -> tuple[LLMatcher, bytes]:
            matcher = LLMatcher(bridge, source, log_level=0, limits=_limits())
            # The first mask is where a grammar that allows nothing shows, and the one that takes longest.
            return matcher, matcher.compute_bitmask()

        matcher, mask = _in_time(build)
        if matcher.is_error():
            raise InputError(f"{_name(grammar)} can't be used: {_located(grammar, matcher.get_error())}")
        if not (np.frombuffer(mask, np.uint32)[: len(self._known)] & self._known).any():
            raise InputError(f"{_name(grammar)} can't be used: the model has no token to begin with")
        return Constraint(grammar.kind, matcher)

    def masks(self, rows: Sequence[Row | None]) -> NDArray[np.uint32]:
        """[B, words]: the tokens that may come next, one bit each; all for a row without a constraint.

        To be called once after each token, which is taken in first. A row that can't go on has an error, and its mask
        means nothing.
        """
        masks = np.full((len(rows), len(self._known)), 0xFFFFFFFF, np.uint32)
        constrained = [(i, *row) for i, row in enumerate(rows) if row is not None]
        fresh = [row for row in constrained if row[2]]
        if fresh:
            self._executor.consume_token_par([(constraint.matcher, tokens[-1]) for _, constraint, tokens in fresh])
        matchers = [(constraint.matcher, i) for i, constraint, _ in constrained]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(rows))
        for i, constraint, _ in constrained:
            masks[i] &= self._known
            constraint.is_stuck = not masks[i].any()
        return masks

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(MASK_THREADS)

    @cached_property
    def _bridge(self) -> LLTokenizer:
        """The tokens as llguidance sees them: their bytes in a tree. Takes about a second for 100,000 tokens."""
        from llguidance import LLTokenizer

        backend = self._tokenizer.backend
        ends = sorted(token for token in self._eos_token_ids if token < min(self._size, self._vocab_size))
        if not ends:
            raise UnsupportedModelError("structured output needs an end-of-answer token, and this model names none")
        try:
            return LLTokenizer(backend.to_str(), n_vocab=max(self._size, self._vocab_size), eos_token=ends)
        except ValueError as error:
            reason = _one_line(str(error))
            raise UnsupportedModelError(
                f"this model's tokenizer can't be used for structured output: {reason}"
            ) from error

    @cached_property
    def _size(self) -> int:
        """The tokenizer's own vocabulary; the model's may be larger, or in rare cases smaller."""
        return 1 + max(map(int, self._tokenizer.backend.get_vocab(with_added_tokens=True).values()))

    @cached_property
    def _known(self) -> NDArray[np.uint32]:
        """uint32 [words]: the ids that both model and tokenizer have."""
        bits = np.arange(-(-max(self._size, self._vocab_size) // 32) * 32) < min(self._size, self._vocab_size)
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _source(grammar: Grammar) -> str:
    """llguidance's own form. Raises InputError for what is no JSON where there must be some."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(str(grammar.value))
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(str(grammar.value))
    if grammar.kind == "llguidance":
        return _checked_json(grammar)
    schema = _checked_json(grammar) if grammar.kind == "json_schema" else '{"type": "object"}'
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_WHITESPACE})
    except ValueError as error:
        raise InputError(f"{_name(grammar)} can't be used: {_one_line(str(error))}") from error


def _checked_json(grammar: Grammar) -> str:
    """The value as JSON text."""
    value = grammar.value
    try:
        text = value if isinstance(value, str) else json.dumps(dict(value), allow_nan=False)
        json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{_name(grammar)} is not JSON: {error.msg} at {where}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{_name(grammar)} is not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{_name(grammar)} is nested too deeply") from error
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InputError(f"{_name(grammar)} has {len(text)} characters, but the limit is {MAX_GRAMMAR_CHARS}")
    return text


def _in_time(build: Callable[[], T]) -> T:
    """Gives up after COMPILE_TIMEOUT_S; the thread can't be ended, but nobody waits for it any more."""
    built: list[T] = []
    thread = threading.Thread(target=lambda: built.append(build()), name="mlxvlm-grammar", daemon=True)
    thread.start()
    thread.join(COMPILE_TIMEOUT_S)
    if not built:
        raise InputError(f"the grammar takes more than {COMPILE_TIMEOUT_S:g} s to compile: make it simpler")
    return built[0]


def _name(grammar: Grammar) -> str:
    names = {"json_schema": "the JSON schema", "regex": "the regular expression", "lark": "the Lark grammar"}
    return names.get(grammar.kind, "the grammar")


def _located(grammar: Grammar, message: str) -> str:
    """One line of what llguidance says, and where in the grammar it is."""
    # A regular expression's own parser draws a caret, four columns in.
    regex = re.search(r"^ {4}( *)\^+$.*?^error: ([^\n]+)", message, re.MULTILINE | re.DOTALL)
    if grammar.kind == "regex" and regex:
        return f"{regex[2]}, at character {len(regex[1]) + 1}"
    keyword = re.match(r'Unimplemented keys: \["([^"]+)"', message)
    if grammar.kind == "json_schema" and keyword:
        nodes = _nodes(json.loads(_checked_json(grammar)))
        place = next((path for path, value in nodes if isinstance(value, dict) and keyword[1] in value), "")
        return f"the keyword {keyword[1]!r} is not supported, at #{place}"
    return _one_line(message)


def _nodes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All of a JSON value's parts with their JSON pointers."""
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _nodes(child, f"{path}/{name}")


def _one_line(message: str) -> str:
    """Without the excerpts that follow an error's first line, and short."""
    line = message.split("\n")[0].strip() or "no reason is known"
    line = line.replace("NoExtensionBias", "there is no text that it allows")  # llguidance's word for it
    return line if len(line) <= _MAX_ERROR_CHARS else f"{line[:_MAX_ERROR_CHARS]}..."
