"""Loading a rank's share: the same tensors as the whole's, and no more bytes read than it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import narrowed
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.models.shares import Rank, Share
from tests.checkpoint.wide import CASES, config_of, write_wide

Tensors = dict[str, mx.array]
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}


def silent(done: int, total: int) -> None:
    pass


def share_of(index: int, count: int) -> Share:
    return Share(Rank(index, count), lambda part: part)


def four_rank_config(family: str) -> dict[str, Any]:
    """Heads, widths and quantisation groups divide by four."""
    config = config_of(family)
    text = config.get("text_config", config)
    text |= TEXT
    if "intermediate_size_mlp" in text:
        text["intermediate_size_mlp"] = 512
    if family == "qwen2_vl":
        config["vision_config"]["hidden_size"] = 128
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {family: write_wide(root / family, family, config=four_rank_config(family)) for family in CASES}


def built(folder: Path, share: Share | None = None, **options: Any) -> VisionLanguageModel:
    return open_model(str(folder)).build(LoadOptions(**options), silent, share)


def tensors_of(model: Any) -> Tensors:
    return dict(tree_flatten(model.parameters()))


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array).item(), name


@pytest.mark.parametrize("isq", [None, "4@32", "8@32"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", CASES)
def test_a_share_is_cut_from_the_whole(family: str, count: int, isq: str | None, folders: dict[str, Path]) -> None:
    """Bit for bit, whichever comes first: cutting or quantising."""
    for index in range(count):
        whole = built(folders[family], isq=isq)
        narrowed(whole, share_of(index, count))
        assert_same(tensors_of(built(folders[family], share_of(index, count), isq=isq)), tensors_of(whole))
