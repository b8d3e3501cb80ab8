"""A decode step waits for nothing, and costs the same whatever pictures lie behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxvlm.checkpoint.load import ModelSource
from mlxvlm.engine.kv_cache import KVBatch
from mlxvlm.messages import assistant, user
from mlxvlm.models.base import RowState, VisionLanguageModel
from mlxvlm.models.mllama import Model as Mllama
from mlxvlm.processors.base import Prompt
from tests.golden import Case
from tests.tracing import Node, Shape, prefill, trace_step

STEPS = 16
NUM_PICTURES = 4


@pytest.fixture(scope="module")
def opened(case: Case) -> tuple[ModelSource, VisionLanguageModel]:
    return case.open(), case.build()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one synchronisation that a trace does not refuse by itself."""

    def refuse(*_: Any) -> None:
        raise ValueError("synchronize inside a step")

    monkeypatch.setattr(mx, "synchronize", refuse)


def batch_of(model: VisionLanguageModel, prompts: list[Prompt]) -> tuple[KVBatch, list[RowState]]:
    batch, states = KVBatch(), {}
    for owner, prompt in enumerate(prompts):
        row, states[owner] = prefill(model, prompt, owner)
        batch.join(row)
    return batch, [states[owner] for owner in batch.owners]


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "batch"])
def test_steps_read_nothing_back(case: Case, opened: tuple[ModelSource, VisionLanguageModel], is_alone: bool) -> None:
    source, model = opened
    scenarios = ["two_images"] if is_alone else case.batch
    prompts = [source.processor(case.messages(scenario), case.template) for scenario in scenarios]
    batch, rows = batch_of(model, prompts)
    order = batch.owners
    tokens = mx.array([[prompts[owner].token_ids[-1]] for owner in order])
    answers = []
    for _ in range(STEPS):
        assert trace_step(model, batch, tokens, rows)
        forward = batch.forward()
        logits = model.logits(model(model.embed_tokens(tokens, rows), forward.layers)[:, -1])
        forward.commit()
        tokens = mx.argmax(logits, axis=-1, keepdims=True)
        answers.append(tokens[:, 0].tolist())
    assert batch.owners == order
    # What was traced is what answers.
    for owner, answer in zip(order, zip(*answers, strict=True), strict=True):
        assert list(answer) == case.expected(scenarios[owner])["greedy"][:STEPS]


READS: dict[str, Callable[[mx.array], Any]] = {
    "item": lambda x: x.max().item(),
    "truth": lambda x: 1.0 if x.max() > 0 else 2.0,
    "list": lambda x: x[0, 0, 0].tolist(),
    "numpy": lambda x: float(np.array(x[0, 0, 0])),
    "eval": lambda x: mx.eval(x) or 1.0,
    "async": lambda x: mx.async_eval(x) or 1.0,
    "wait": lambda x: mx.synchronize() or 1.0,
}


@pytest.mark.parametrize("read", list(READS))
def test_a_read_would_be_found(
    opened: tuple[ModelSource, VisionLanguageModel], read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = opened
    prompt = source.processor([user("Look.", [Image.new("RGB", (9, 9))])])
    batch, rows = batch_of(model, [prompt])
    tokens = mx.array([[prompt.token_ids[-1]]])
    embed = type(model).embed_tokens

    def reading(self: Any, *arguments: Any) -> Any:
        inputs = embed(self, *arguments)
        return replace(inputs, embeds=inputs.embeds * READS[read](inputs.embeds))

    assert trace_step(model, batch, tokens, rows)
    monkeypatch.setattr(type(model), "embed_tokens", reading)
    with pytest.raises(ValueError, match=r"eval|synchronize"):
        trace_step(model, batch, tokens, rows)


def test_reading_a_pictures_state_would_be_found() -> None:
    """State that no layer computes is an input of the trace too."""
    state = RowState(vision=mx.ones((2, 3)))

    class Reader:
        def embed_tokens(self, tokens: mx.array, rows: list[RowState]) -> float:
            return rows[0].vision.sum().item()

    model: Any = Reader()
    with pytest.raises(ValueError, match="eval"):
        trace_step(model, KVBatch(), mx.array([[1]]), [state])


def graph_after(source: ModelSource, model: VisionLanguageModel, prompt: Prompt, length: int) -> list[Node]:
    """Of the step after a prompt that is made longer with its own last token."""
    ids = prompt.token_ids + prompt.token_ids[-1:] * (length - len(prompt.token_ids))
    row, state = prefill(model, replace(prompt, token_ids=ids))
    batch = KVBatch()
    batch.join(row)
    return trace_step(model, batch, mx.array([[ids[-1]]]), [state])


def turns(count: int) -> list[Any]:
    """A conversation with a picture in each of its last `count` turns."""
    picture = Image.new("RGB", (30, 20))
    messages = []
    for index in range(NUM_PICTURES):
        shown = [picture] if index >= NUM_PICTURES - count else []
        messages += [user("What?", shown), assistant("This.")]
    return messages[:-1]


def test_a_step_after_many_pictures_is_a_step_after_one(opened: tuple[ModelSource, VisionLanguageModel]) -> None:
    """Every primitive and every shape, with equally many cached tokens."""
    source, model = opened
    one, many = (source.processor(turns(count)) for count in (1, NUM_PICTURES))
    assert [len(prompt.images) for prompt in (one, many)] == [1, NUM_PICTURES]
    length = max(len(prompt.token_ids) for prompt in (one, many))
    graphs = [graph_after(source, model, prompt, length) for prompt in (one, many)]
    assert len(graphs[0]) > 50
    if isinstance(model, Mllama):
        # A cross layer's keys and values are views of the states of all pictures.
        views = [[node for node in graph if node.name == "Slice"] for graph in graphs]
        num_cross = len(model.language_model.model.cross_layers)
        assert len(views[1]) - len(views[0]) == 2 * num_cross
        graphs = [[node for node in graph if node.name != "Slice"] for graph in graphs]
    assert graphs[0] == graphs[1]


def test_pictures_of_one_turn_cost_their_own_attention_only(opened: tuple[ModelSource, VisionLanguageModel]) -> None:
    """Cross layers look at all pictures of the last turn; nothing else of a step grows with them."""
    source, model = opened
    picture = Image.new("RGB", (30, 20))
    prompts = [source.processor([user("What?", [picture] * count)]) for count in (1, NUM_PICTURES)]
    length = max(len(prompt.token_ids) for prompt in prompts)
    one, many = (graph_after(source, model, prompt, length) for prompt in prompts)
    if not isinstance(model, Mllama):
        assert one == many
        return
    states = len(model.encode_images(prompts[0].images)[0])
    assert states not in (length, length - 1)
    assert one != many
    grown = [node._replace(reads=times(node.reads, states), makes=times(node.makes, states)) for node in one]
    assert grown == many


def times(shapes: tuple[Shape, ...], states: int) -> tuple[Shape, ...]:
    """The shapes with NUM_PICTURES times the states."""
    return tuple(tuple(side * NUM_PICTURES if side == states else side for side in shape) for shape in shapes)
