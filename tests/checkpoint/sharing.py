"""Loads shares of random checkpoints that four ranks can share evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.models.shares import Rank, Share
from tests.checkpoint.wide import config_of

Tensors = dict[str, mx.array]
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}


def silent(done: int, total: int) -> None:
    pass


def share_of(index: int, count: int) -> Share:
    return Share(Rank(index, count), lambda part: part)


def wide(family: str, **text: Any) -> dict[str, Any]:
    """A config whose heads, widths and quantisation groups divide by four, but for what `text` says."""
    config = config_of(family)
    part = config.get("text_config", config)
    part |= TEXT | text
    if "intermediate_size_mlp" in part:
        part["intermediate_size_mlp"] = 2 * part["intermediate_size"]
    if family == "qwen2_vl":
        config["vision_config"]["hidden_size"] = part["hidden_size"]
    return config


def built(folder: Path, share: Share | None = None, **options: Any) -> VisionLanguageModel:
    return open_model(str(folder)).build(LoadOptions(**options), silent, share)


def tensors_of(model: Any) -> Tensors:
    return dict(tree_flatten(model.parameters()))


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array).item(), name
