"""A GGUF file's vocabulary -> a Tokenizer. Knows llama.cpp's names of tokenizers, not its files.

Sources: llama.cpp `src/llama-vocab.cpp`; the tokenizer.json files of the models named there; for SentencePiece's
merges transformers `convert_slow_tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mlxvlm.errors import ModelError, UnsupportedModelError
from mlxvlm.processors.tokenizer import Tokenizer

BPE, SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model
_SPACE = "\u2581"  # SentencePiece's


class TokenType(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokenizer.ggml.*; `special` maps bos_token ... to ids. None: the file does not say."""

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    adds_bos: bool | None = None
    adds_space: bool | None = None


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text is cut before merging. pattern None: GPT-2's own, digits one by one where `splits_digits`."""

    pattern: str | None = None
    splits_digits: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False
    normalizes: bool = False  # NFC


_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SLASHED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = rf"{_LEAD}{_UPPER}*{_LOWER}+{_SHORT}?|{_LEAD}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|{_SLASHED_REST}"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED_REST}"

_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(splits_digits=True)
_LLAMA_BPE = PreTokenizer(_LLAMA3, ignores_merges=True, adds_bos=True)
# tokenizer.ggml.pre; files of early 2024 have none, and "default" is what converters wrote then.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "dbrx": PreTokenizer(_LLAMA3),
    "qwen2": PreTokenizer(_QWEN2, normalizes=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2, normalizes=True),
    "llama4": PreTokenizer(_GPT4O),
    "gpt-4o": PreTokenizer(_GPT4O),
    "tekken": PreTokenizer(_TEKKEN, ignores_merges=True, adds_bos=True),
}


def build(vocabulary: Vocabulary) -> Tokenizer:
    """Raises UnsupportedModelError for kinds that are not known, ModelError for a vocabulary that fits nothing."""
    if vocabulary.model == SENTENCEPIECE:
        make, adds_bos = _sentencepiece, True
    elif vocabulary.model == BPE:
        make, adds_bos = _byte_level, _pre_tokenizer(vocabulary.pre).adds_bos
    else:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model {vocabulary.model!r} is not supported; supported: {BPE}, {SENTENCEPIECE}"
        )
    if len(vocabulary.types) not in (0, len(vocabulary.tokens)):
        raise ModelError(f"the file has {len(vocabulary.tokens)} tokens, but {len(vocabulary.types)} token types")
    tokens = _real_tokens(vocabulary)
    ids = {token: index for index, token in enumerate(tokens)}
    special = {name: tokens[token_id] for name, token_id in vocabulary.special.items() if token_id < len(tokens)}
    try:
        backend = make(vocabulary, ids)
        _add_tokens(backend, vocabulary.types, tokens, set(special.values()))
        if adds_bos if vocabulary.adds_bos is None else vocabulary.adds_bos:
            _add_bos(backend, special.get("bos_token"))
    except ModelError:
        raise
    except Exception as error:  # tokenizers' Rust side raises nothing finer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the file's vocabulary and merges fit no tokenizer: {reason}") from error
    return Tokenizer(backend, special)


def _real_tokens(vocabulary: Vocabulary) -> list[str]:
    """Without the padding at the end, with which converters fill up the embedding's rows."""
    tokens, types = list(vocabulary.tokens), vocabulary.types
    while tokens and types and types[len(tokens) - 1] == TokenType.UNUSED:
        tokens.pop()
    if not tokens:
        raise ModelError("the file's vocabulary is empty")
    return tokens


def _pre_tokenizer(name: str) -> PreTokenizer:
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: Vocabulary, ids: dict[str, int]) -> tokenizers.Tokenizer:
    kind = _pre_tokenizer(vocabulary.pre)
    # A space in front belongs to the first half, as in llama.cpp.
    cuts = [merge.find(" ", 1) for merge in vocabulary.merges]
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(vocabulary.merges, cuts, strict=True)]
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=kind.ignores_merges))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if kind.splits_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if kind.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(kind.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind.normalizes:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: Vocabulary, ids: dict[str, int]) -> tokenizers.Tokenizer:
    unknown = vocabulary.special.get("unk_token", 0)
    backend = tokenizers.Tokenizer(
        models.BPE(
            ids,
            score_merges(vocabulary, ids),
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = vocabulary.adds_space is not False
    # Before each piece of text between special tokens, as in llama.cpp and in the tokenizer.json of these models.
    steps = [normalizers.Prepend(_SPACE)] if adds_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def score_merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the likeliest token first: SentencePiece's rule written as merges."""
    if len(vocabulary.scores) != len(vocabulary.tokens):
        raise ModelError(f"the file has {len(vocabulary.tokens)} tokens, but {len(vocabulary.scores)} scores")
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in ids.items():
        if vocabulary.types and vocabulary.types[index] != TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-vocabulary.scores[index], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_tokens(backend: tokenizers.Tokenizer, types: Sequence[int], tokens: Sequence[str], special: set[str]) -> None:
    """Control tokens and the like are found in a text before anything else."""
    added = []
    for index, token in enumerate(tokens):
        kind = types[index] if types else TokenType.NORMAL
        is_special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token in special
        if token and (is_special or kind == TokenType.USER_DEFINED):
            added.append(AddedToken(token, special=is_special, normalized=False))
    backend.add_tokens(added)


def _add_bos(backend: tokenizers.Tokenizer, bos: str | None) -> None:
    if bos is None:
        return
    pieces = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=pieces
    )
