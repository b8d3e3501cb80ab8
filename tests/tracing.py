"""A decode step as a graph: what it computes and reads, without running it. A host synchronisation can't be traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.models.base import RowState, VisionLanguageModel
from mlxvlm.processors.base import Prompt

Shape = tuple[int, ...]


class Node(NamedTuple):
    """One primitive; shapes of all that it reads and makes, and the types of what it makes."""

    name: str
    reads: tuple[Shape, ...]
    makes: tuple[Shape, ...]
    dtypes: tuple[mx.Dtype, ...]


def with_arrays(value: Any, swap: Callable[[mx.array], mx.array]) -> Any:
    """A copy of a cache or of rows' state in which every array is what `swap` makes of it."""
    if isinstance(value, mx.array):
        return swap(value)
    if isinstance(value, (list, tuple)):
        return type(value)(with_arrays(item, swap) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{entry.name: with_arrays(getattr(value, entry.name), swap) for entry in fields(value)})
    if isinstance(value, (KVBatch, KVGroup)):
        made = copy.copy(value)
        vars(made).update({name: with_arrays(item, swap) for name, item in vars(value).items()})
        return made
    return value


def trace_step(model: VisionLanguageModel, batch: KVBatch, tokens: mx.array, rows: Sequence[RowState]) -> list[Node]:
    """The graph of a decode step, from token ids [B, 1] to logits. The batch stays as it is.

    Raises ValueError where anything is evaluated or read. Keys, values and rows' states are inputs of the trace, as
    what is captured instead may be read unnoticed.
    """
    held: list[mx.array] = []
    with_arrays((batch, list(rows)), lambda array: held.append(array) or array)

    def step(tokens: mx.array, *arrays: mx.array) -> mx.array:
        given = iter(arrays)
        own, states = with_arrays((batch, list(rows)), lambda _: next(given))
        hidden = model(model.embed_tokens(tokens, states), own.forward().layers)
        return model.logits(hidden[:, -1])

    return trace(step, tokens, *held)


def trace(function: Callable[..., Any], *arrays: mx.array) -> list[Node]:
    """The graph of what a function makes of arrays. Raises ValueError where anything is evaluated or read."""
    records: list[dict[str, Any]] = []
    mx.disable_compile()  # what is compiled is one primitive, which can't be looked into
    try:
        mx.export_function(records.append, function, *arrays)
    finally:
        mx.enable_compile()
    return [
        Node(
            record["name"],
            *(tuple(shape for _, shape, _ in record[side]) for side in ("inputs", "outputs")),
            tuple(dtype for _, _, dtype in record["outputs"]),
        )
        for record in records
        if record["type"] == "primitive"
    ]


def prefill(model: VisionLanguageModel, prompt: Prompt, owner: int = 0) -> tuple[KVGroup, RowState]:
    """A row that holds all but a prompt's last token, as the engine leaves it."""
    features = model.encode_images(prompt.images) if prompt.images else []
    inputs = model.embed_prompt(prompt, features)
    row, length = KVGroup.single(model.kv_specs, owner), len(prompt.token_ids) - 1
    forward = KVPass([row], length)
    model(inputs[:length], forward.layers)
    forward.commit()
    mx.eval(row.arrays)
    return row, inputs.rows[0] if inputs.rows else RowState()
