"""Llama 3.2 Vision in every layout of a checkpoint: the hub's, transformers 5's own, MLX-community's, quantised."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.models.mllama import build
from tests.checkpoint.layouts import (
    Recipe,
    Tensors,
    config_of,
    dequantised,
    logits,
    quantised,
    quantised_config,
    tensors_of,
    write,
    write_mlx,
)
from tests.golden import GOLDENS, Case

HUB = GOLDENS / "mllama_tiles"
CONV = "patch_embedding.weight"
TWIN = 1e-4


def in_memory_names(tensors: Tensors) -> Tensors:
    """As transformers 5 names its modules: a raw state dict, or saved without the original format."""
    return {
        name.replace("language_model.model.", "model.language_model.").removeprefix("language_model.")
        if name.startswith("language_model.")
        else f"model.{name}": array
        for name, array in tensors.items()
    }


def mlx_names(tensors: Tensors) -> Tensors:
    """Another name for the tower, and a channels-last convolution."""
    renamed = {name.replace("vision_model.", "vision_tower."): array for name, array in tensors.items()}
    renamed[f"vision_tower.{CONV}"] = renamed[f"vision_tower.{CONV}"].transpose(0, 2, 3, 1)
    return renamed


def tables(spec: QuantSpec) -> Recipe:
    """As old converters did: everything whose width divides, the tower's tables among it."""
    return lambda path, weight: None if weight.shape[-1] % 32 else spec


LAYOUTS = {"hub": dict, "in-memory": in_memory_names, "mlx": mlx_names}
RECIPES: dict[str, Recipe] = {"nvfp4": tables(QuantSpec(4, 16, "nvfp4")), "affine": tables(QuantSpec(8, 32))}


@pytest.fixture(scope="module")
def hub_logits() -> np.ndarray:
    return logits(HUB, HUB)


def test_the_layouts_are_what_they_claim() -> None:
    names = {layout: set(rename(tensors_of(HUB))) for layout, rename in LAYOUTS.items()}
    assert "model.language_model.layers.1.cross_attn.k_norm.weight" in names["in-memory"]
    assert {"lm_head.weight", "model.multi_modal_projector.bias"} <= names["in-memory"]
    assert "vision_tower.gated_positional_embedding.gate" in names["mlx"]
    assert "language_model.model.layers.1.cross_attn_attn_gate" in names["hub"] & names["mlx"]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_same_logits(layout: str, tmp_path: Path, hub_logits: np.ndarray) -> None:
    folder = write(tmp_path / "m", HUB, LAYOUTS[layout](tensors_of(HUB)))
    assert np.array_equal(logits(folder, HUB), hub_logits)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_sanitize_twice_is_once(layout: str) -> None:
    model, tensors = build(config_of(HUB)), LAYOUTS[layout](tensors_of(HUB))
    names = list(tensors)
    once = model.sanitize(tensors)
    assert list(tensors) == names
    twice = model.sanitize(dict(once))
    assert {name: array.shape for name, array in once.items()} == {
        name: array.shape for name, array in tree_flatten(model.parameters())
    }
    assert list(twice) == list(once)
    assert all(mx.array_equal(twice[name], array) for name, array in once.items())


def test_unknown_names_stay_as_they_are() -> None:
    assert list(build(config_of(HUB)).sanitize({"adapter.weight": mx.zeros((1,))})) == ["adapter.weight"]


@pytest.mark.parametrize("layout", ["hub", "mlx"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_quantised_equals_dequantised(recipe: str, layout: str, tmp_path: Path, hub_logits: np.ndarray) -> None:
    packed, specs = quantised(LAYOUTS[layout](tensors_of(HUB)), RECIPES[recipe])
    assert any("tile_embedding" in path for path in specs)
    config = quantised_config(config_of(HUB), specs, mixed=False)
    fast = logits(write_mlx(tmp_path / "fast", HUB, packed, config), HUB)
    slow = logits(write_mlx(tmp_path / "slow", HUB, dequantised(packed, specs)), HUB)
    assert np.abs(fast - slow).max() <= TWIN
    assert np.abs(fast - hub_logits).max() > 10 * TWIN  # it really was quantised


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_quantised_model_computes_in_the_chosen_dtype(dtype: str, tmp_path: Path) -> None:
    packed, _ = quantised(tensors_of(HUB), RECIPES["nvfp4"])
    source = open_model(str(write_mlx(tmp_path / "m", HUB, packed)))
    model = source.build(LoadOptions(dtype), lambda done, total: None)
    prompt = source.processor(Case(HUB).messages("two_images"))
    features = model.encode_images(prompt.images)
    inputs = model.embed_prompt(prompt, features)
    vision = inputs.rows[0].vision
    for array in (*features, inputs.embeds, *vision.keys, *vision.values):
        assert array.dtype == getattr(mx, dtype)


def test_the_resaved_config_is_the_other_kind() -> None:
    config = json.loads((GOLDENS / "mllama_resaved" / "config.json").read_text())
    assert "rope_parameters" in config["text_config"]
    assert "rope_scaling" not in config["text_config"]
    assert not (GOLDENS / "mllama_resaved" / "preprocessor_config.json").exists()
