"""The rows of a model: their keys and values by owner, and the passes that fill them. Knows tensors, not requests.

All that several ranks must do alike goes through here: a rank that follows does what the leader's Rows tell
(ranks/follower.py), with numbers in the place of requests and shapes in the place of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mlxvlm.engine.kv_cache import KVBatch, KVBlock, KVGroup, KVPass
from mlxvlm.errors import MlxvlmError
from mlxvlm.models.base import Features, Inputs, KVSpec, RowState, VisionLanguageModel
from mlxvlm.processors.base import Prompt


class Rows:
    """Rows whose prompts are read each have a group of their own; then they join the batch that decodes.

    Owners are numbers of the caller's choice. A pass that can't be built changes nothing that counts.
    """

    def __init__(self, model: VisionLanguageModel, specs: Sequence[KVSpec]) -> None:
        """`specs`: the model's, with what kv_layout.quantised() makes of them."""
        self.model = model
        self.batch = KVBatch()
        self.specs = specs
        self._alone: dict[int, KVGroup] = {}
        self._prompts: dict[int, Inputs] = {}
        self._states: dict[int, RowState] = {}
        self._pass: KVPass | None = None  # of the batch; its tokens don't count yet

    def begin(self, owner: int, blocks: Sequence[KVBlock] = (), length: int = 0) -> None:
        """A row on its own, empty or with the first `length` positions of blocks; also in the place of what it had."""
        self._alone[owner] = KVGroup.single(self.specs, owner, blocks, length)
        self._tell("begin", owner, [block.number for block in blocks], length)

    def read(self, owner: int, prompt: Prompt, features: Features) -> None:
        """Takes in a row's prompt, to be filled from."""
        self.keep(owner, self.model.embed_prompt(prompt, features))

    def keep(self, owner: int, inputs: Inputs) -> None:
        """As read(), of what a model has made of a prompt."""
        inputs = self._share(owner, inputs)
        self._prompts[owner] = inputs
        if inputs.rows:
            self._states[owner] = inputs.rows[0]

    def has_read(self, owner: int) -> bool:
        """Whether a row has its prompt."""
        return owner in self._prompts

    def fill(self, owner: int, start: int, end: int) -> None:
        """Computes and evaluates a row's keys and values of its prompt's tokens [start, end)."""
        group = self._alone[owner]
        forward = KVPass([group], end - start)
        self.model(self._prompts[owner][start:end], forward.layers)
        forward.commit()
        # Only keys and values are needed; what would follow the last layer's is never computed.
        self._tell("fill", owner, start, end, arrays=group.arrays)
        mx.eval(group.arrays)

    def join(self, owner: int) -> None:
        """A row on its own joins the batch."""
        self.batch.join(self._alone.pop(owner))
        self._prompts.pop(owner, None)
        self._tell("join", owner)

    def order(self, new: int = 1) -> list[int]:
        """The batch's rows as run() takes them, for `new` tokens of each; those that outgrew their group change it."""
        self._pass = self.batch.forward(new)
        self._tell("order", new)
        return self.batch.owners

    def run(self, token_ids: mx.array, places: list[int] | None = None) -> mx.array:
        """Logits [N, V] after the next tokens [B, L] of each row, as order() has them; commit() must follow.

        places: of the B * L positions, those whose logits are wanted; None for all.
        """
        assert self._pass is not None
        states = [self._states.get(owner, _NO_STATE) for owner in self.batch.owners]
        hidden = self.model(self.model.embed_tokens(token_ids, states), self._pass.layers).flatten(0, 1)
        logits = self.model.logits(hidden if places is None else hidden[mx.array(places)])
        self._tell("run", list(token_ids.shape), places, self._lengths, arrays=[logits])
        return logits

    def commit(self, counts: Sequence[int] | None = None) -> None:
        """The tokens of the pass count; or only the first so many of each row."""
        assert self._pass is not None
        self._pass.commit(counts)
        self._pass = None
        self._tell("commit", None if counts is None else list(counts))

    def attempt(self, owner: int, token_ids: mx.array) -> mx.array:
        """Logits [1, V] after a row's next token [1, 1], which is not kept; join() must follow."""
        self._alone[owner] = group = self.batch.take(owner)
        inputs = self.model.embed_tokens(token_ids, [self._states.get(owner, _NO_STATE)])
        logits = self.model.logits(self.model(inputs, KVPass([group], 1).layers)[:, -1])
        self._tell("attempt", owner, arrays=[logits])
        return logits

    def copy(self, owner: int, start: int, end: int) -> KVBlock:
        """Positions [start, end) of a row; not evaluated yet."""
        block = self._group(owner).copy(owner, start, end)
        self._tell("copy", owner, start, end, block.number, arrays=block.parts)
        return block

    def drop(self, owner: int) -> None:
        """Forgets a row, wherever it is."""
        self._pass = None  # none is under way then, but one that failed holds on to the rows' buffers
        self._alone.pop(owner, None)
        self._prompts.pop(owner, None)
        self._states.pop(owner, None)
        self.batch.remove(owner)
        self._tell("drop", owner)

    def length(self, owner: int) -> int:
        """Positions that a row holds."""
        group = self._group(owner)
        return group.lengths[group.owners.index(owner)]

    def _group(self, owner: int) -> KVGroup:
        group = self._alone.get(owner) or self.batch.group_of(owner)
        assert group is not None
        return group

    @property
    def _lengths(self) -> list[int]:
        return [length for group in self.batch.groups for length in group.lengths]

    def _tell(self, name: str, *args: Any, arrays: Sequence[mx.array] = ()) -> None:
        """What was done, and what all ranks compute in this order; one rank alone tells nobody."""

    def _share(self, owner: int, inputs: Inputs) -> Inputs:
        """What all ranks need of a prompt."""
        return inputs


_NO_STATE = RowState()


class Ranks(Protocol):
    """Those who run a model together."""

    def rows(self, model: VisionLanguageModel, specs: Sequence[KVSpec]) -> Rows:
        """Of the model that was built."""
        ...

    def free_bytes(self) -> float:
        """What the others have left for keys and values, counted as this rank's."""
        ...

    def watch(self, on_loss: Callable[[MlxvlmError], None]) -> None:
        """on_loss: called from a thread of their own, once, where the model can't be run any more."""
        ...

    def pulse(self, is_idle: bool) -> None:
        """Called before each tick: where a busy one takes too long, others don't do their part, and all end."""
        ...

    def doubt(self, failure: MlxvlmError) -> None:
        """Told of an unexpected error on the engine's thread: where ranks may have come apart by it, they end."""
        ...

    def close(self) -> None:
        """The model is not run any more."""
        ...


class Alone:
    """One rank."""

    def rows(self, model: VisionLanguageModel, specs: Sequence[KVSpec]) -> Rows:
        return Rows(model, specs)

    def free_bytes(self) -> float:
        return math.inf

    def watch(self, on_loss: Callable[[MlxvlmError], None]) -> None:
        pass

    def pulse(self, is_idle: bool) -> None:
        pass

    def doubt(self, failure: MlxvlmError) -> None:
        pass

    def close(self) -> None:
        pass
