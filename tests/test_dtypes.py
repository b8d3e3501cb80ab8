"""Half precision stays half precision: no float32 leaks into features, hidden states, logits or the KV cache."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.base import Prompt
from tests.golden import Case
from tests.tracing import Node, trace

# What multiplies with weights, or attends. Norms and softmax may look float32 inside: on a GPU they are kernels.
PRODUCTS = ("AddMM", "Convolution", "GatherMM", "Matmul")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_has_the_dtype_of_the_weights(case: Case, dtype: str) -> None:
    wanted = getattr(mx, dtype)
    source = case.open()
    model = source.build(LoadOptions(dtype), lambda done, total: None)
    assert isinstance(model, nn.Module)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {wanted}
    prompt = source.processor(case.messages("two_images"))
    features = model.encode_images(prompt.images)
    assert {array.dtype for array in features} == {wanted}
    inputs = model.embed_prompt(prompt, features)
    assert inputs.embeds.dtype == wanted
    row = KVGroup.single(model.kv_specs, 0)
    prefill = KVPass([row], len(prompt.token_ids))
    assert model(inputs, prefill.layers).dtype == wanted
    prefill.commit()
    assert {array.dtype for array in row.arrays} == {wanted}
    batch = KVBatch()
    batch.join(row)
    step = batch.forward()
    hidden = model(model.embed_tokens(mx.array([[1]]), inputs.rows), step.layers)
    assert hidden.dtype == model.logits(hidden).dtype == wanted
    assert {array.dtype for array in row.arrays} == {wanted}


def graphs(model: VisionLanguageModel, prompt: Prompt) -> dict[str, list[Node]]:
    """Of the vision tower, and of a whole prompt and the step after it; nothing is evaluated."""

    def vision(_: mx.array) -> list[mx.array]:
        return list(model.encode_images(prompt.images))

    def decoder(*features: mx.array) -> list[mx.array]:
        inputs = model.embed_prompt(prompt, list(features))
        row, batch = KVGroup.single(model.kv_specs, 0), KVBatch()
        prefill = KVPass([row], len(prompt.token_ids))
        first = model.logits(model(inputs, prefill.layers)[:, -1])
        prefill.commit()
        batch.join(row)
        step = model(model.embed_tokens(mx.array([[1]]), inputs.rows), batch.forward().layers)
        return [first, model.logits(step[:, -1])]

    features = model.encode_images(prompt.images)
    return {"vision": trace(vision, mx.zeros(())), "decoder": trace(decoder, *features)}


@pytest.fixture
def traceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one primitive that can't be exported only copies."""
    monkeypatch.setattr(mx, "contiguous", lambda array, *_: array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.usefixtures("traceable")
def test_every_product_has_the_dtype_of_the_weights(case: Case, dtype: str) -> None:
    source = case.open()
    model = source.build(LoadOptions(dtype), lambda done, total: None)
    found = graphs(model, source.processor(case.messages("two_images")))
    for name, graph in found.items():
        products = [node for node in graph if node.name in PRODUCTS]
        assert len(products) >= 8, name
        assert {kind for node in products for kind in node.dtypes} == {getattr(mx, dtype)}, name


@pytest.mark.usefixtures("traceable")
def test_a_leak_would_be_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single float32 factor in one norm."""
    source = case.open()
    model = source.build(LoadOptions("bfloat16"), lambda done, total: None)
    prompt = source.processor(case.messages("two_images"))
    leaks = {"LayerNorm": "vision", "RMSNorm": "decoder"}
    for kind, name in leaks.items():
        norm = getattr(nn, kind)
        with monkeypatch.context() as patch:
            patch.setattr(norm, "__call__", lambda self, x, call=norm.__call__: call(self, x) * mx.array(1.0))
            products = [node for node in graphs(model, prompt)[name] if node.name in PRODUCTS]
        assert mx.float32 in {dtype for node in products for dtype in node.dtypes}, name
