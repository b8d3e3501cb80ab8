"""A model that says anything, and a tokenizer of bytes and some longer pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mlxvlm.engine.engine import Engine, EngineConfig
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.processors.base import Prompt
from mlxvlm.processors.tokenizer import Tokenizer
from tests.fakes import FakeModel, FakeProcessor

PIECES = ('{"', '":', '",', '"}', ', "', "true", "false", "null", "aa", "ab", "abc", "bc", "12", "00", "[]", "  ", "é")


def byte_tokenizer() -> Tokenizer:
    """All bytes, some longer pieces, an end and a placeholder."""
    byte_of = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(byte_of))}
    merges = []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for piece in PIECES:
        letters = level.pre_tokenize_str(piece)[0][0]
        for end in range(2, len(letters) + 1):
            if letters[:end] not in vocab:
                vocab[letters[:end]] = len(vocab)
                merges.append((letters[: end - 1], letters[end - 1]))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    tokenizer = Tokenizer(backend, {})
    for special in ("<end>", "<image>", "<stop>"):
        tokenizer.add_special(special)
    return tokenizer


TOKENIZER = byte_tokenizer()


SIZE = TOKENIZER.backend.get_vocab_size()


VOCAB = SIZE + 37  # models round their vocabularies up


END, IMAGE, STOP = (int(TOKENIZER.token_id(name) or 0) for name in ("<end>", "<image>", "<stop>"))


def token_bytes() -> dict[int, bytes]:
    """What each token but the special ones stands for."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [chr(code) for code in range(128)] + ["é"]
    code_of = {
        letter: code
        for text in texts
        for letter, code in zip(level.pre_tokenize_str(text)[0][0], text.encode(), strict=True)
    }
    names = ((token, TOKENIZER.backend.id_to_token(token)) for token in range(SIZE) if token not in (END, IMAGE, STOP))
    return {token: bytes(code_of.get(letter, 255) for letter in name) for token, name in names}


BYTES = token_bytes()


class RandomModel(FakeModel):
    """Logits are noise, a pure function of the sum of all ids so far."""

    def __init__(self, seed: int = 0, on_call: Callable[[mx.array], None] | None = None) -> None:
        super().__init__(on_call=on_call)
        self.vocab_size = VOCAB
        self.table = mx.array(np.random.default_rng(seed).normal(0, 3, (97, VOCAB)).astype(np.float32))

    def logits(self, hidden: mx.array) -> mx.array:
        return self.table[hidden[..., 0].astype(mx.int32) % 97]


def random_engine(model: FakeModel, eos: Sequence[int] = (END,), max_context: int = 4096, **settings: Any) -> Engine:
    processor = FakeProcessor()
    processor.tokenizer, processor.image_token_id = TOKENIZER, IMAGE
    return Engine(lambda progress: model, processor, EngineConfig(max_context, frozenset(eos), **settings))


def ask(ids: Sequence[int], **sampling: Any) -> Request:
    return Request(sampling=SamplingParams(**{"max_tokens": 2000, **sampling}), prompt=Prompt(tuple(ids)))


MODEL = RandomModel()
