"""Runs the model for sequences: vision, prefill chunks, decode steps. Knows tensors, not threads or text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakMethod

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine import device
from mlxvlm.engine.admission import Sizes
from mlxvlm.engine.feature_cache import FeatureCache
from mlxvlm.engine.kv_cache import KVBatch
from mlxvlm.engine.prefix_cache import PrefixCache
from mlxvlm.engine.rows import Rows
from mlxvlm.engine.sampler import Sampled, sample
from mlxvlm.engine.sequence import Phase, Sequence
from mlxvlm.engine.verify import Verification
from mlxvlm.models.base import KVSpec, RowState, VisionLanguageModel
from mlxvlm.processors.base import PreparedImage, Prompt

# Pixels that go through the tower at once: 16 frames of 512 x 512 x 3. More saves little and costs memory.
_VISION_BATCH = 16 * 512 * 512 * 3
_FUSED_HEAD_DIMS = (64, 80, 128)  # for which Metal's attention over a chunk writes no scores; MLX's use_fallback


@dataclass(frozen=True)
class Step:
    """A decode step that runs on the device; its tokens are not read yet, and not chosen while there are logits."""

    rows: list[Sequence]
    sampled: Sampled | None = None
    logits: mx.array | None = None  # [B, V]


class ModelRunner:
    """One model, the KV of its decoding rows, and what it keeps of earlier requests."""

    def __init__(
        self,
        rows: Rows,
        prefixes: PrefixCache | None = None,
        features: FeatureCache | None = None,
        prefill_chunk: int = 2048,
    ) -> None:
        self.model = rows.model
        self.sizes = _sizes(rows.model, rows.specs, prefill_chunk)
        self._rows = rows
        self.prefixes = prefixes or PrefixCache(0)
        self.features = features or FeatureCache(0)
        self.encoded_images = 0
        self.spare: Callable[[], float] = lambda: math.inf  # bytes that both caches may hold together

    @property
    def batch(self) -> KVBatch:
        """The rows that decode."""
        return self._rows.batch

    def make_way(self) -> None:
        """What is kept gives way to what is reserved: blocks first, since features serve after any text."""
        spare = self.spare()
        self.prefixes.shrink(max(spare - self.features.nbytes, 0))
        self.features.shrink(spare)

    def recall(self, sequence: Sequence) -> None:
        """A sequence's first work: what is held of its prompt and its pictures need not be computed.

        A block that comes from a file is a unit of work, to be called again after.
        """
        prompt = sequence.prompt
        self.prefixes.extend(sequence.blocks, prompt.token_ids, prompt.images)
        if self.prefixes.fetch(sequence.blocks, self._room_for_blocks()):
            return
        self._rows.begin(sequence.id)
        sequence.recalled = True
        self._skip_held(sequence)
        if not sequence.token_ids:  # else it is no new prompt, but a shift
            self.prefixes.record(bool(sequence.cached_tokens))
        sequence.needed = self.model.needed_images(prompt, sequence.prefilled)
        waiting = self._waiting_images(sequence)
        self.features.record(len(sequence.needed) - len(waiting), len(waiting))
        sequence.phase = Phase.VISION if waiting else Phase.PREFILL

    def encode_images(self, sequence: Sequence) -> None:
        """One batch of the pictures that a sequence needs and nobody has encoded yet."""
        batch: dict[bytes, PreparedImage] = {}  # a picture that comes twice is encoded once
        pixels = 0
        for image in self._waiting_images(sequence):
            pixels += 0 if image.digest in batch else image.pixels.size
            if batch and pixels > _VISION_BATCH:
                break
            batch[image.digest] = image
        if batch:
            # Copies, as pieces of one array would each keep all of it alive.
            encoded = [mx.contiguous(features) for features in self.model.encode_images(list(batch.values()))]
            # On its own, so that the tower's activations are gone before the prompt's are made.
            mx.eval(encoded)
            self.encoded_images += len(batch)
            for digest, features in zip(batch, encoded, strict=True):
                self.features.put(digest, features, self.spare() - self.prefixes.nbytes)
                for index in sequence.needed:
                    if sequence.prompt.images[index].digest == digest:
                        sequence.features[index] = features
        if not self._waiting_images(sequence):
            sequence.phase = Phase.PREFILL

    def _waiting_images(self, sequence: Sequence) -> list[PreparedImage]:
        """Those that are still without features, once what the cache holds is taken from it."""
        images = sequence.prompt.images
        for index in sequence.needed:
            if sequence.features[index] is None:
                sequence.features[index] = self.features.get(images[index].digest)
        return [images[index] for index in sequence.needed if sequence.features[index] is None]

    def prefill(self, sequence: Sequence, budget: int) -> None:
        """At most `budget` prompt tokens; with the last but one the sequence joins the batch."""
        rows, owner = self._rows, sequence.id
        if not rows.has_read(owner):
            rows.read(owner, sequence.prompt, sequence.features)
            sequence.features = []
        self._skip_held(sequence)  # what others with the same beginning have stored in the meantime
        start, end = sequence.prefilled, min(sequence.prefilled + budget, sequence.prefill_length)
        if end > start:
            rows.fill(owner, start, end)
            sequence.prefilled = end
            self._store(sequence, sequence.prompt.token_ids)
        if end == sequence.prefill_length:
            rows.join(owner)
            sequence.phase = Phase.DECODE

    def _skip_held(self, sequence: Sequence) -> None:
        """Moves a prompt on to the end of what is held of it, but leaves the last token, which decode reads."""
        prompt = sequence.prompt
        found, shared = self.prefixes.match(sequence.blocks, prompt.token_ids, prompt.images)
        held = min(shared, sequence.prefill_length)
        if held > sequence.prefilled:
            blocks = self.prefixes.lookup(found)
            self._rows.begin(sequence.id, blocks, held)
            if not sequence.token_ids:
                sequence.cached_tokens += held - sequence.prefilled
            sequence.prefilled = held

    def _store(self, sequence: Sequence, ids: Seq[int], has_ended: bool = False) -> None:
        """Keeps whole blocks of what a row holds, and at its end the rest; with a step under way `ids` may be more or
        fewer than that.
        """
        images = sequence.prompt.images
        self.prefixes.extend(sequence.blocks, ids, images)
        length = min(len(ids), self._rows.length(sequence.id))
        chain = sequence.blocks[: length // self.prefixes.block_tokens]
        if has_ended:
            chain = self.prefixes.to_end(chain, ids[:length], images)
        self.prefixes.store(chain, partial(self._rows.copy, sequence.id), self._room_for_blocks())

    def _room_for_blocks(self) -> float:
        return self.spare() - self.features.nbytes

    def decode(self, sequences: Seq[Sequence], previous: Step | None) -> Step:
        """Starts one step of all rows in the batch; the previous one need not be read yet.

        Where a row's choice depends on tokens that are, only the forward pass: `choose` must follow.
        """
        by_id = {sequence.id: sequence for sequence in sequences}
        rows = [by_id[owner] for owner in self._rows.order()]
        step = Step(rows, logits=self._rows.run(_last_tokens(rows, previous)))
        if any(row.sampling.reads_history for row in rows):
            mx.async_eval(step.logits)
        else:
            step = self.choose(step)
        self._rows.commit()
        for row in rows:
            row.launched += 1
        return step

    def choose(self, step: Step, masks: NDArray[np.uint32] | None = None) -> Step:
        """Starts sampling; masks [B, words] as in sampler.sample."""
        assert step.logits is not None
        sampled = sample(step.logits, [row.sampler for row in step.rows], masks)
        mx.async_eval(*sampled.arrays)
        return Step(step.rows, sampled)

    def verify(self, sequences: Seq[Sequence], drafts: Mapping[int, Seq[int]]) -> Verification:
        """Starts a pass over guesses of rows, by row. All rows of the batch, and all their tokens read."""
        return Verification(self._rows, sequences, drafts)

    def attempt(self, sequence: Sequence, previous: Step | None) -> None:
        """One step of one row alone that changes nothing; raises what a step of all rows raises on its account."""
        logits = self._rows.attempt(sequence.id, _last_tokens([sequence], previous))
        mx.eval(sample(logits, [copy(sequence.sampler)]).arrays)
        self._rows.join(sequence.id)

    def drop(self, sequence: Sequence) -> None:
        """A row's end: its keys and values are forgotten, and what they are worth is kept unless it failed."""
        try:
            if not sequence.failed and self.batch.group_of(sequence.id) is not None:
                self._store(sequence, sequence.ids, has_ended=True)
        finally:
            self._rows.drop(sequence.id)


def _sizes(model: VisionLanguageModel, specs: Seq[KVSpec], prefill_chunk: int) -> Sizes:
    embeds = model.embed_tokens(mx.zeros((1, 1), mx.uint32), [RowState()]).embeds  # never evaluated
    hidden, head_dim = embeds.shape[-1], specs[0].head_dim
    unpacked = [replace(spec, bits=None).bytes_per_token(embeds.dtype) for spec in specs if spec.bits is not None]
    is_fused = device.is_gpu() and head_dim in _FUSED_HEAD_DIMS
    return Sizes(
        kv_token=sum(spec.bytes_per_token(embeds.dtype) for spec in specs),
        num_layers=len(specs),
        hidden=hidden,
        itemsize=embeds.dtype.size,
        vocab_size=model.vocab_size,
        score_heads=0 if is_fused else max(hidden // head_dim, 1),
        state_bytes=_state_bytes(model),
        prefill_chunk=prefill_chunk,
        vision_batch=_VISION_BATCH,
        unpacked_token=max(unpacked, default=0),
    )


def _state_bytes(model: VisionLanguageModel) -> Callable[[Prompt], int]:
    """Only families whose rows hold more than their KV say how much. Weakly: a closed engine still has its budget."""
    if not hasattr(model, "state_bytes"):
        return lambda prompt: 0
    count: WeakMethod[Callable[[Prompt], int]] = WeakMethod(model.state_bytes)
    return lambda prompt: method(prompt) if (method := count()) else 0


def _last_tokens(rows: Seq[Sequence], previous: Step | None) -> mx.array:
    """[B, 1]: what each row sampled in the previous step, read or not; of others the last token that is known."""
    places = {row.id: index for index, row in enumerate(previous.rows)} if previous else {}
    source = [] if previous is None or previous.sampled is None else [previous.sampled.tokens]
    fresh = [row for row in rows if row.id not in places]
    if fresh:
        first = len(places)
        places |= {row.id: first + index for index, row in enumerate(fresh)}
        source.append(mx.array([row.last_token for row in fresh], mx.uint32))
    tokens = source[0] if len(source) == 1 else mx.concatenate(source)
    order = [places[row.id] for row in rows]
    if order != list(range(tokens.shape[0])):
        tokens = tokens[mx.array(order)]
    return tokens[:, None]
