"""Runs the model for sequences: vision, prefill chunks, decode steps. Knows tensors, not threads or text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass

import mlx.core as mx

from mlxvlm.engine import device
from mlxvlm.engine.admission import Sizes
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.engine.sampler import Sampled, sample
from mlxvlm.engine.sequence import Phase, Sequence
from mlxvlm.models.base import RowState, VisionLanguageModel

# Pixels that go through the tower at once: 16 frames of 512 x 512 x 3. More saves little and costs memory.
_VISION_BATCH = 16 * 512 * 512 * 3
_FUSED_HEAD_DIMS = (64, 80, 128)  # for which Metal's attention over a chunk writes no scores; MLX's use_fallback


@dataclass(frozen=True)
class Step:
    """A decode step that runs on the device; its tokens are not read yet."""

    rows: list[Sequence]
    sampled: Sampled


class ModelRunner:
    """One model and the KV of its decoding rows."""

    def __init__(self, model: VisionLanguageModel, prefill_chunk: int) -> None:
        self.model = model
        self.batch = KVBatch()
        self.sizes = _sizes(model, prefill_chunk)

    def encode_images(self, sequence: Sequence) -> None:
        """One batch of a sequence's pictures through the tower; with the last, the prompt is embedded."""
        images = sequence.prompt.images
        first = len(sequence.features)
        last, pixels = first, 0
        while last < len(images) and (last == first or pixels + images[last].pixels.size <= _VISION_BATCH):
            pixels += images[last].pixels.size
            last += 1
        features = self.model.encode_images(images[first:last])
        # On its own, so that the tower's activations are gone before the prompt's are made.
        mx.eval(features)
        sequence.features += features
        if last == len(images):
            sequence.phase = Phase.PREFILL

    def prefill(self, sequence: Sequence, budget: int) -> None:
        """At most `budget` prompt tokens; with the last but one the sequence joins the batch."""
        if sequence.inputs is None or sequence.kv is None:
            sequence.inputs = self.model.embed_prompt(sequence.prompt, sequence.features)
            sequence.features = []
            if sequence.inputs.rows:
                sequence.state = sequence.inputs.rows[0]
            sequence.kv = KVGroup.single(self.model.kv_specs, sequence.id)
        start, end = sequence.prefilled, min(sequence.prefilled + budget, sequence.prefill_length)
        if end > start:
            forward = KVPass([sequence.kv], end - start)
            self.model(sequence.inputs[start:end], forward.layers)
            forward.commit()
            # Only keys and values are needed; what would follow the last layer's is never computed.
            mx.eval(sequence.kv.arrays)
            sequence.prefilled = end
        if end == sequence.prefill_length:
            self.batch.join(sequence.kv)
            sequence.kv = sequence.inputs = None
            sequence.phase = Phase.DECODE

    def decode(self, sequences: Seq[Sequence], previous: Step | None) -> Step:
        """Starts one step of all rows in the batch; the previous one need not be read yet."""
        by_id = {sequence.id: sequence for sequence in sequences}
        forward = self.batch.forward()
        rows = [by_id[owner] for owner in self.batch.owners]
        inputs = self.model.embed_tokens(_last_tokens(rows, previous), [row.state for row in rows])
        hidden = self.model(inputs, forward.layers)
        sampled = sample(self.model.logits(hidden[:, -1]), [row.sampler for row in rows])
        forward.commit()
        mx.async_eval(*sampled.arrays)
        for row in rows:
            row.launched += 1
            if row.launched >= row.max_tokens:
                self.batch.remove(row.id)
        return Step(rows, sampled)

    def attempt(self, sequence: Sequence, previous: Step | None) -> None:
        """One step of one row alone that changes nothing; raises what a step of all rows raises on its account."""
        group = self.batch.take(sequence.id)
        inputs = self.model.embed_tokens(_last_tokens([sequence], previous), [sequence.state])
        hidden = self.model(inputs, KVPass([group], 1).layers)
        mx.eval(sample(self.model.logits(hidden[:, -1]), [copy(sequence.sampler)]).arrays)
        self.batch.join(group)

    def drop(self, sequence: Sequence) -> None:
        """Forgets an ended sequence's keys and values."""
        self.batch.remove(sequence.id)


def _sizes(model: VisionLanguageModel, prefill_chunk: int) -> Sizes:
    embeds = model.embed_tokens(mx.zeros((1, 1), mx.uint32), [RowState()]).embeds  # never evaluated
    hidden, head_dim = embeds.shape[-1], model.kv_specs[0].head_dim
    is_fused = device.is_gpu() and head_dim in _FUSED_HEAD_DIMS
    return Sizes(
        kv_token=sum(spec.bytes_per_token(embeds.dtype) for spec in model.kv_specs),
        num_layers=len(model.kv_specs),
        hidden=hidden,
        itemsize=embeds.dtype.size,
        vocab_size=model.vocab_size,
        score_heads=0 if is_fused else max(hidden // head_dim, 1),
        # Only families whose rows hold more than their KV say how much.
        state_bytes=getattr(model, "state_bytes", lambda prompt: 0),
        prefill_chunk=prefill_chunk,
        vision_batch=_VISION_BATCH,
    )


def _last_tokens(rows: Seq[Sequence], previous: Step | None) -> mx.array:
    """[B, 1]: what each row sampled in the previous step, read or not; a new row's last prompt token."""
    places = {row.id: index for index, row in enumerate(previous.rows)} if previous else {}
    source = [] if previous is None else [previous.sampled.tokens]
    fresh = [row for row in rows if row.id not in places]
    if fresh:
        first = len(places)
        places |= {row.id: first + index for index, row in enumerate(fresh)}
        source.append(mx.array([row.prompt.token_ids[-1] for row in fresh], mx.uint32))
    tokens = source[0] if len(source) == 1 else mx.concatenate(source)
    order = [places[row.id] for row in rows]
    if order != list(range(tokens.shape[0])):
        tokens = tokens[mx.array(order)]
    return tokens[:, None]
