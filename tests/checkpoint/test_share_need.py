"""What a share is said to need, from headers, is what a machine that has it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.estimate import MemoryNeed, memory_need, need_of
from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.checkpoint.quantize import quantize_folder
from mlxvlm.errors import UnsupportedModelError, UsageError
from mlxvlm.families import family_of
from mlxvlm.models.base import VisionLanguageModel
from tests.checkpoint.sharing import built, share_of, silent, tensors_of, wide
from tests.checkpoint.wide import CASES, write_wide


def held_bytes(model: VisionLanguageModel) -> int:
    return sum(array.nbytes for array in tensors_of(model).values())


def kv_heads(model: VisionLanguageModel) -> set[int]:
    assert isinstance(model, nn.Module)
    layers = f"{model.quant_paths.decoder}.layers."
    return {
        module._kv_heads
        for path, module in model.named_modules()
        if path.startswith(layers) and "_kv_heads" in vars(module)
    }


def assert_said(need: MemoryNeed, folder: Path, count: int, **options: Any) -> list[MemoryNeed]:
    """Of each rank, byte for byte."""
    needs = [need.share(index, count) for index in range(count)]
    for index, each in enumerate(needs):
        model = built(folder, share_of(index, count), **options)
        assert each.weights_bytes == held_bytes(model)
        assert {spec.num_kv_heads for spec in each.kv_specs} <= kv_heads(model)
    return needs


@pytest.mark.parametrize("isq", [None, "4@32", "8"])
@pytest.mark.parametrize("family", CASES)
def test_sizes_are_what_each_rank_holds(family: str, isq: str | None, tmp_path: Path) -> None:
    folder = write_wide(tmp_path / "m", family, config=wide(family))
    need = memory_need(str(folder), recipe=recipe_of(LoadOptions(isq=isq)))
    assert replace(need.share(0, 1), loading_bytes=need.loading_bytes) == need
    for count in (2, 4):
        needs = assert_said(need, folder, count, isq=isq)
        assert all(each.kv_bytes_per_token * count == need.kv_bytes_per_token for each in needs)
        assert all(each.weights_bytes <= needs[-1].weights_bytes < needs[0].weights_bytes for each in needs[1:])


UNEVEN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "three ranks": ("llama4", 3, {}),
    "five ranks": ("llava_next", 5, {"num_key_value_heads": 2, "intermediate_size": 352}),
    "types and groups": ("idefics3", 4, {"head_dim": 16, "intermediate_size": 96, "mlp_bias": True}),
    "most": ("mllama", 8, {}),
}


@pytest.mark.parametrize("isq", [None, "4@64"])
@pytest.mark.parametrize("kind", UNEVEN)
def test_of_uneven_shares_the_last_is_the_largest(kind: str, isq: str | None, tmp_path: Path) -> None:
    """But for rank 0, which has more."""
    family, count, text = UNEVEN[kind]
    folder = write_wide(tmp_path / "m", family, mx.bfloat16, wide(family, **text))
    need = memory_need(str(folder), dtype="bfloat16", recipe=recipe_of(LoadOptions(isq=isq)))
    needs = assert_said(need, folder, count, dtype="bfloat16", isq=isq)
    assert needs[-1].weights_bytes == max(each.weights_bytes for each in needs[1:])
    assert needs[-1].kv_bytes_per_token == max(each.kv_bytes_per_token for each in needs)


def test_a_topology(tmp_path: Path) -> None:
    folder = write_wide(tmp_path / "m", "qwen2_vl", config=wide("qwen2_vl"))
    topology = tmp_path / "types.yaml"
    topology.write_text("0: {isq: 8}\n/down_proj/: {isq: none}\n")
    options: dict[str, Any] = {"isq": "4@32", "topology": topology}
    assert_said(memory_need(str(folder), recipe=recipe_of(LoadOptions(**options))), folder, 2, **options)


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    config = wide("idefics3", head_dim=16, intermediate_size=96)
    folder, packed = write_wide(tmp_path / "m", "idefics3", config=config), tmp_path / "packed"
    quantize_folder(str(folder), packed, recipe_of(LoadOptions(isq="4@64")), "float32", silent)
    need = memory_need(str(packed))
    assert_said(need, packed, 2)
    with pytest.raises(UnsupportedModelError, match="which 4 ranks would cut: use 2"):
        need.share(0, 4)


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 8}, {"intermediate_size": 3}])
@pytest.mark.parametrize("family", CASES)
def test_most_ranks(family: str, text: dict[str, Any]) -> None:
    """The twin tries all numbers."""
    config = wide(family, **text)
    need = need_of(config, tensors_of(family_of(config).build_model(config)))

    def can_share(count: int) -> bool:
        try:
            need.share(0, count)
        except UsageError:
            return False
        return True

    assert need.most_ranks == (3 if "intermediate_size" in text else 8)
    most = need.most_ranks
    assert [can_share(count) for count in range(1, most + 3)] == [True] * most + [False] * 2
