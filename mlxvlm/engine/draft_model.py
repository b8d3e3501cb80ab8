"""A smaller model that guesses what a larger one will say. Knows rows and their text, not who checks its guesses.

It draws with the row's own noise, so where both models think alike they choose alike, sampled rows included. It sees no
pictures: placeholders are left out of what it reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np

from mlxvlm.engine import device
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.drafts import Drafter, FromText, Speculation
from mlxvlm.engine.failures import failure_of
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.engine.sampler import sample
from mlxvlm.engine.sequence import Sequence
from mlxvlm.errors import ModelError, UsageError
from mlxvlm.models.base import RowState, VisionLanguageModel
from mlxvlm.processors.base import Processor

_CHUNK = 256  # tokens that are read beside a step; a long prompt must not stall running streams
_MAX_PADDING = 1024  # ids without a token; Qwen2.5's vocabularies differ by 128 between its sizes
_PROBES = (
    "The quick brown fox, 12345.",
    "  if (x >= 10) {\n\treturn y;\n  }",
    "Ça va? Größe, naïve",
    "你好，世界 こんにちは 🙂",
)

T = TypeVar("T")
Progress: TypeAlias = Callable[[int, int], None]


class Draft(NamedTuple):
    """A model that an engine loads beside its own. build: as Engine's, on the engine thread."""

    build: Callable[[Progress], VisionLanguageModel]
    processor: Processor
    max_context: int


def check_vocabulary(processor: Processor, draft: Processor, special_ids: Collection[int]) -> None:
    """Raises ModelError where two tokenizers would give a text different ids, as far as some texts tell."""
    ours, theirs = processor.tokenizer, draft.tokenizer
    sizes = [each.backend.get_vocab_size() for each in (ours, theirs)]
    texts = [text for text in _PROBES if _ids(processor, text) != _ids(draft, text)]
    names = [each for each in special_ids if ours.backend.id_to_token(each) != theirs.backend.id_to_token(each)]
    if abs(sizes[0] - sizes[1]) > _MAX_PADDING or texts or names:
        different = f"{texts[0]!r}" if texts else f"token {names[0]}" if names else f"{sizes[0]} and {sizes[1]} tokens"
        raise ModelError(
            f"the draft model has another vocabulary than the model ({different}): take a small one of the same family"
        )


def _ids(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False)


@dataclass
class _Reader:
    """What the draft model knows of one row."""

    kv: KVGroup
    text: list[int] = field(default_factory=list)  # without placeholders
    fed: list[int] = field(default_factory=list)  # whose keys and values are held: the text, or guesses after it
    taken: int = 0  # tokens of prompt and answer that are in the text
    known: int = 0  # tokens of `fed` that are the text's


class DraftModel:
    """A Drafter. A failure of its own switches it off and nothing else."""

    def __init__(self, model: VisionLanguageModel, max_context: int, foreign: Collection[int], vocab_size: int) -> None:
        """`foreign`: ids that only prompts have; vocab_size: of the model that it guesses for. Raises ModelError."""
        if abs(model.vocab_size - vocab_size) > _MAX_PADDING:
            raise ModelError(f"the draft model's vocabulary has {model.vocab_size} ids, the model's {vocab_size}")
        dtype = model.embed_tokens(mx.zeros((1, 1), mx.uint32), [RowState()]).embeds.dtype  # never evaluated
        self.kv_token: Seq[int] = [spec.bytes_per_token(dtype) for spec in model.kv_specs]
        self._model = model
        self._max_context = max_context
        self._foreign = foreign
        self._vocab_size = vocab_size
        self._readers: dict[int, _Reader] = {}
        self._is_broken = False

    def is_ready(self, row: Sequence) -> bool:
        return self._safely(lambda: self._catch_up(row), False)

    def guess(self, row: Sequence, count: int) -> list[int]:
        return self._safely(lambda: self._guess(row, count) if self._catch_up(row) else [], [])

    def forget(self, row_id: int) -> None:
        self._readers.pop(row_id, None)

    def _safely(self, work: Callable[[], T], otherwise: T) -> T:
        found: list[T] = []
        failure = None if self._is_broken else failure_of(lambda: found.append(work()))
        if failure is not None:
            logging.getLogger(__name__).warning("the draft model has failed and is used no more: %s", failure)
            self._is_broken = True
            self._readers.clear()
        return found[0] if found else otherwise

    def _catch_up(self, row: Sequence) -> bool:
        """Reads one more chunk of a row; whether all but its newest tokens are read."""
        reader = self._readers.get(row.id)
        if reader is None:
            reader = self._readers[row.id] = _Reader(KVGroup.single(self._model.kv_specs, row.id))
            self._take(reader, row.prompt.token_ids)
        self._take(reader, row.token_ids[row.before + reader.taken - len(row.prompt.token_ids) :])
        text, fed = reader.text, reader.fed
        while reader.known < min(len(fed), len(text) - 1) and fed[reader.known] == text[reader.known]:
            reader.known += 1
        del fed[reader.known :]
        reader.kv.lengths = [reader.known]
        if len(text) - reader.known > _CHUNK:
            self._feed(reader, mx.array([text[reader.known : reader.known + _CHUNK]]))
            mx.eval(reader.kv.arrays)
            fed += text[reader.known : reader.known + _CHUNK]
            return False
        return 0 < len(text) < self._max_context

    def _take(self, reader: _Reader, token_ids: Seq[int]) -> None:
        limit = self._model.vocab_size
        reader.text += [token for token in token_ids if token < limit and token not in self._foreign]
        reader.taken += len(token_ids)

    def _guess(self, row: Sequence, count: int) -> list[int]:
        reader, sampler = self._readers[row.id], copy(row.sampler)
        tokens, found = mx.array([reader.text[reader.known :]]), []
        for _ in range(min(count, self._max_context - len(reader.text))):
            logits = self._model.logits(self._feed(reader, tokens)[:, -1])
            tokens = sample(self._fitted(logits), [sampler]).tokens[:, None]
            found.append(tokens)
        guesses: list[int] = np.array(mx.concatenate(found, axis=1))[0].tolist() if found else []
        reader.fed = [*reader.text, *guesses[:-1]] if guesses else reader.fed
        end = next((place for place, token in enumerate(guesses) if token in self._foreign), len(guesses))
        return guesses[:end]

    def _feed(self, reader: _Reader, tokens: mx.array) -> mx.array:
        forward = KVPass([reader.kv], tokens.shape[1])
        hidden = self._model(self._model.embed_tokens(tokens, [RowState()]), forward.layers)
        forward.commit()
        return hidden

    def _fitted(self, logits: mx.array) -> mx.array:
        """[1, V] of the model that is guessed for."""
        missing = self._vocab_size - logits.shape[-1]
        if missing > 0:
            logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)
        return logits[:, : self._vocab_size]


def speculation(
    config: EngineConfig, processor: Processor, vocab_size: int, draft: Draft | None, progress: Progress
) -> Speculation:
    """As an engine's settings have it; loads the draft model, if there is one. Raises UsageError, ModelError."""
    if config.speculation not in ("auto", "on", "off"):
        raise UsageError(f"speculation must be auto, on or off, not {config.speculation!r}")
    foreign = {processor.image_token_id}
    drafters: list[Drafter] = []
    # On a CPU each position of a pass costs as much as a step; who names a draft model wants it.
    is_on = config.speculation == "on" or (config.speculation == "auto" and (device.is_gpu() or draft is not None))
    if is_on and draft is None:
        drafters = [FromText(foreign, vocab_size)]
    elif is_on and draft is not None:
        check_vocabulary(processor, draft.processor, config.eos_token_ids)
        drafters = [DraftModel(draft.build(progress), draft.max_context, foreign, vocab_size)]
    return Speculation(drafters, config.max_draft_tokens)
