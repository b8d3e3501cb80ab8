"""transformers' own names of every family, in memory and as it saves a new model, are the models' after sanitize."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxvlm.families import family_of
from tests.golden import GOLDENS

TABLE: dict[str, Any] = json.loads((GOLDENS / "tensor_names.json").read_text())


@pytest.mark.parametrize("layout", ["memory", "saved"])
@pytest.mark.parametrize("name", list(TABLE))
def test_names_and_shapes(name: str, layout: str) -> None:
    config = json.loads((GOLDENS / name / "config.json").read_text())
    model = family_of(config).build_model(config)
    once = model.sanitize({tensor: mx.zeros(shape) for tensor, shape in TABLE[name][layout].items()})
    expected = {tensor: array.shape for tensor, array in tree_flatten(model.parameters())}
    assert {tensor: array.shape for tensor, array in once.items()} == expected
    twice = model.sanitize(dict(once))
    assert {tensor: array.shape for tensor, array in twice.items()} == expected


def test_all_families_are_there() -> None:
    """And the layouts are not one and the same: names in memory have another prefix in four of them."""
    types = {json.loads((GOLDENS / name / "config.json").read_text())["model_type"] for name in TABLE}
    assert types == {"idefics3", "llama4", "llava", "llava_next", "mllama", "qwen2_vl", "smolvlm"}
    for name in ("llava_clip", "llava_next_tiles", "mllama_tiles", "qwen2_vl_window"):
        assert not set(TABLE[name]["memory"]) & set(TABLE[name]["saved"]) - {"lm_head.weight"}
