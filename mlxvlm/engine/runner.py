"""Runs the model for sequences: vision, prefill chunks, decode steps. Knows tensors, not threads or text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.engine.sampler import Sampled, sample
from mlxvlm.engine.sequence import Phase, Sequence
from mlxvlm.models.base import VisionLanguageModel

# Pixels that go through the tower at once: 16 frames of 512 x 512 x 3. More saves little and costs memory.
_VISION_BATCH = 16 * 512 * 512 * 3


@dataclass(frozen=True)
class Step:
    """A decode step that runs on the device; its tokens are not read yet, and not chosen while there are logits."""

    rows: list[Sequence]
    sampled: Sampled | None = None
    logits: mx.array | None = None  # [B, V]


class ModelRunner:
    """One model and the KV of its decoding rows."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.batch = KVBatch()

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
        """Starts one step of all rows in the batch; the previous one need not be read yet.

        Where a row's choice depends on tokens that are, only the forward pass: `choose` must follow.
        """
        by_id = {sequence.id: sequence for sequence in sequences}
        forward = self.batch.forward()
        rows = [by_id[owner] for owner in self.batch.owners]
        inputs = self.model.embed_tokens(_last_tokens(rows, previous), [row.state for row in rows])
        hidden = self.model(inputs, forward.layers)
        step = Step(rows, logits=self.model.logits(hidden[:, -1]))
        if any(row.sampling.reads_history for row in rows):
            mx.async_eval(step.logits)
        else:
            step = self.choose(step)
        forward.commit()
        for row in rows:
            row.launched += 1
            if row.launched >= row.max_tokens:
                self.batch.remove(row.id)
        return step

    def choose(self, step: Step, masks: NDArray[np.uint32] | None = None) -> Step:
        """Starts sampling; masks [B, words] as in sampler.sample."""
        assert step.logits is not None
        sampled = sample(step.logits, [row.sampler for row in step.rows], masks)
        mx.async_eval(*sampled.arrays)
        return replace(step, sampled=sampled, logits=None)

    def drop(self, sequence: Sequence) -> None:
        """Forgets an ended sequence's keys and values."""
        self.batch.remove(sequence.id)


def _last_tokens(rows: Seq[Sequence], previous: Step | None) -> mx.array:
    """[B, 1]: what each row sampled in the previous step, read or not; a new row's last prompt token."""
    places = {row.id: index for index, row in enumerate(previous.rows)} if previous else {}
    source = [] if previous is None or previous.sampled is None else [previous.sampled.tokens]
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
