"""Half precision stays half precision: no float32 leaks into features, hidden states, logits or the KV cache."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from tests.golden import Case


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
