"""Every layout of a checkpoint gives the logits of the hub's; a quantised one those of its dequantised twin."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.bind import DTYPES
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.models.base import RowState
from tests.checkpoint.layouts import (
    SPLIT,
    TIED,
    Recipe,
    config_of,
    dequantised,
    logits,
    mlx_names,
    quantised,
    quantised_config,
    tensors_of,
    write,
    write_mlx,
)
from tests.golden import GOLDENS, Case

SAME = 1e-6
TWIN = 1e-4


@pytest.fixture(scope="module")
def hub_logits() -> dict[Path, np.ndarray]:
    return {golden: logits(golden, golden) for golden in (SPLIT, TIED)}


def padded(tensors: dict[str, mx.array], width: int) -> dict[str, mx.array]:
    """Zero rows and columns around the vision MLP, as old converters added to reach a multiple of 64."""
    result = dict(tensors)
    for name, array in tensors.items():
        if ".mlp.fc1." in name:
            result[name] = mx.pad(array, [(0, width - array.shape[0])] + [(0, 0)] * (array.ndim - 1))
        elif name.endswith(".mlp.fc2.weight"):
            result[name] = mx.pad(array, [(0, 0), (0, width - array.shape[1])])
    return result


@pytest.mark.parametrize("golden", [SPLIT, TIED], ids=lambda golden: golden.name)
class TestUnquantised:
    def expect(self, folder: Path, golden: Path, hub_logits: dict[Path, np.ndarray]) -> None:
        found = logits(folder, golden)
        assert found.shape == hub_logits[golden].shape
        assert np.abs(found - hub_logits[golden]).max() <= SAME

    def test_mlx_names(self, golden: Path, tmp_path: Path, hub_logits: dict[Path, np.ndarray]) -> None:
        self.expect(write_mlx(tmp_path / "m", golden, mlx_names(tensors_of(golden))), golden, hub_logits)

    def test_mlx_names_with_the_decoders_own_prefix(
        self, golden: Path, tmp_path: Path, hub_logits: dict[Path, np.ndarray]
    ) -> None:
        tensors = {
            name if "lm_head" in name else name.replace("language_model.", "language_model.model."): array
            for name, array in mlx_names(tensors_of(golden)).items()
        }
        self.expect(write_mlx(tmp_path / "m", golden, tensors), golden, hub_logits)

    def test_old_shard_name(self, golden: Path, tmp_path: Path, hub_logits: dict[Path, np.ndarray]) -> None:
        folder = write(tmp_path / "m", golden, tensors_of(golden), file="weights.00.safetensors")
        self.expect(folder, golden, hub_logits)

    def test_shards_without_an_index(self, golden: Path, tmp_path: Path, hub_logits: dict[Path, np.ndarray]) -> None:
        tensors = tensors_of(golden)
        names = sorted(tensors)
        folder = write(tmp_path / "m", golden, {name: tensors[name] for name in names[::2]})
        mx.save_safetensors(str(folder / "model-2.safetensors"), {name: tensors[name] for name in names[1::2]})
        self.expect(folder, golden, hub_logits)

    @pytest.mark.parametrize("is_mlx", [False, True])
    def test_buffers_are_dropped(
        self, golden: Path, is_mlx: bool, tmp_path: Path, hub_logits: dict[Path, np.ndarray]
    ) -> None:
        tensors = {
            **tensors_of(golden),
            "model.text_model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((8,)),
            "model.vision_model.embeddings.position_ids": mx.zeros((1, 16), mx.int32),
        }
        tensors = mlx_names(tensors) if is_mlx else tensors
        self.expect(write(tmp_path / "m", golden, tensors), golden, hub_logits)

    def test_padded_vision(self, golden: Path, tmp_path: Path, hub_logits: dict[Path, np.ndarray]) -> None:
        config = config_of(golden)
        config["vision_config"]["intermediate_size"] = 64
        folder = write_mlx(tmp_path / "m", golden, padded(mlx_names(tensors_of(golden)), 64), config)
        self.expect(folder, golden, hub_logits)

    def test_config_with_old_rope_and_new_rope(
        self, golden: Path, tmp_path: Path, hub_logits: dict[Path, np.ndarray]
    ) -> None:
        config = config_of(golden)
        text = config["text_config"]
        scaling = text.pop("rope_scaling", None) or {}
        text["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": text.pop("rope_theta")}
        self.expect(write(tmp_path / "m", golden, tensors_of(golden), config=config), golden, hub_logits)


def test_resaved_by_transformers_5(hub_logits: dict[Path, np.ndarray]) -> None:
    assert np.array_equal(logits(GOLDENS / "idefics3_resaved", SPLIT), hub_logits[SPLIT])


@pytest.mark.parametrize("is_mlx", [False, True])
def test_tied_checkpoint_that_stores_its_head(is_mlx: bool, tmp_path: Path, hub_logits: dict[Path, np.ndarray]) -> None:
    tensors = tensors_of(TIED)
    # Another matrix: a tied model must not take it.
    tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"] * 2
    folder = write(tmp_path / "m", TIED, mlx_names(tensors) if is_mlx else tensors)
    assert np.abs(logits(folder, TIED) - hub_logits[TIED]).max() <= SAME


def text_only(path: str, weight: mx.array) -> QuantSpec | None:
    return QuantSpec(4, 32) if path.startswith("language_model.") else None


def text_and_connector(path: str, weight: mx.array) -> QuantSpec | None:
    return QuantSpec(4, 64) if path.startswith("connector.") else text_only(path, weight)


def everything(bits: int, group_size: int, mode: str = "affine") -> Recipe:
    return lambda path, weight: QuantSpec(bits, group_size, mode)


_MIXED = {
    "self_attn": QuantSpec(8, 32),
    "mlp.down_proj": QuantSpec(6, 32),
    "mlp": QuantSpec(4, 32),
    "modality_projection": QuantSpec(8, 128),
    "position_embedding": QuantSpec(2, 32),
    "embed_tokens": QuantSpec(3, 32),
    "lm_head": QuantSpec(5, 32),
}


def mixed(path: str, weight: mx.array) -> QuantSpec | None:
    if path.endswith("layers.1.self_attn.q_proj"):
        return None  # a `false` entry of a recipe
    return next(spec for part, spec in _MIXED.items() if part in path)


def mixed_modes(path: str, weight: mx.array) -> QuantSpec | None:
    if "vision_model" in path:
        return QuantSpec(4, 16, "nvfp4")
    if "mlp" in path:
        return QuantSpec(4, 32, "mxfp4")
    return QuantSpec(8, 32, "mxfp8") if "self_attn" in path else QuantSpec(4, 32)


RECIPES: dict[str, Recipe] = {
    "text4": text_only,
    "text4-connector-group64": text_and_connector,
    "everything4": everything(4, 32),
    "everything8": everything(8, 32),
    "mixed": mixed,
    "mixed-modes": mixed_modes,
    "mxfp4": everything(4, 32, "mxfp4"),
    "mxfp8": everything(8, 32, "mxfp8"),
    "nvfp4": everything(4, 16, "nvfp4"),
}


@pytest.mark.parametrize("names", ["mlx", "hub"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_quantised_equals_dequantised(
    recipe: str, names: str, tmp_path: Path, hub_logits: dict[Path, np.ndarray]
) -> None:
    plain = mlx_names(tensors_of(SPLIT))
    packed, specs = quantised(plain, RECIPES[recipe])
    config = quantised_config(config_of(SPLIT), specs, mixed=recipe.startswith("mixed"))
    stored = packed if names == "mlx" else {f"model.{name}": array for name, array in packed.items()}
    if names == "hub":
        stored = {
            name.replace("model.language_model.lm_head", "lm_head").replace("language_model.", "text_model."): array
            for name, array in stored.items()
        }
    fast = logits(write_mlx(tmp_path / "fast", SPLIT, stored, config), SPLIT)
    slow = logits(write_mlx(tmp_path / "slow", SPLIT, dequantised(packed, specs)), SPLIT)
    assert np.abs(fast - slow).max() <= TWIN
    assert np.abs(fast - hub_logits[SPLIT]).max() > 100 * TWIN  # it really was quantised


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_quantised_tied_embedding_is_also_the_head(mode: str, tmp_path: Path) -> None:
    tensors = mlx_names(tensors_of(SPLIT))
    tensors.pop("language_model.lm_head.weight")
    packed, specs = quantised(tensors, everything(4, 32, mode))
    config = {**config_of(SPLIT), "tie_word_embeddings": True}
    fast = logits(write_mlx(tmp_path / "fast", SPLIT, packed, quantised_config(config, specs, mixed=False)), SPLIT)
    slow = logits(write_mlx(tmp_path / "slow", SPLIT, dequantised(packed, specs), config), SPLIT)
    assert np.abs(fast - slow).max() <= TWIN


def test_narrow_model_with_nvfp4(tmp_path: Path) -> None:
    """head_dim 12 and an MLP of 28 can't be quantised; what is 16 wide can."""
    plain = mlx_names(tensors_of(TIED))
    packed, specs = quantised(plain, lambda path, weight: None if weight.shape[-1] % 16 else QuantSpec(4, 16, "nvfp4"))
    assert 0 < len(specs) < len(plain)
    config = quantised_config(config_of(TIED), specs, mixed=True)
    fast = logits(write_mlx(tmp_path / "fast", TIED, packed, config), TIED)
    slow = logits(write_mlx(tmp_path / "slow", TIED, dequantised(packed, specs)), TIED)
    assert np.abs(fast - slow).max() <= TWIN


def test_tensors_decide_where_the_config_errs(tmp_path: Path) -> None:
    packed, specs = quantised(mlx_names(tensors_of(SPLIT)), mixed)
    right = write_mlx(tmp_path / "right", SPLIT, packed, quantised_config(config_of(SPLIT), specs, mixed=True))
    wrong = {**config_of(SPLIT), "quantization": {"group_size": 64, "bits": 4}}
    wrongly = write_mlx(tmp_path / "wrong", SPLIT, packed, wrong)
    (tmp_path / "wrong" / "generation_config.json").write_text(json.dumps({"eos_token_id": 158}))
    assert np.array_equal(logits(wrongly, SPLIT), logits(right, SPLIT))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("recipe", ["everything4", "mxfp4", "mxfp8", "nvfp4"])
def test_quantised_models_compute_in_the_chosen_dtype(recipe: str, dtype: str, tmp_path: Path) -> None:
    packed, _ = quantised(mlx_names(tensors_of(SPLIT)), RECIPES[recipe])
    source = open_model(str(write_mlx(tmp_path / "m", SPLIT, packed)))
    model = source.build(LoadOptions(dtype), lambda done, total: None)
    prompt = source.processor(Case(SPLIT).messages("one_wide"))
    features = model.encode_images(prompt.images)
    inputs = model.embed_prompt(prompt, features)
    group = KVGroup.single(model.kv_specs, 0)
    hidden = model(inputs, KVPass([group], len(prompt.token_ids)).layers)
    step = model.embed_tokens(mx.array([[1]]), RowState())
    for array in (*features, inputs.embeds, step.embeds, hidden, model.logits(hidden), *group.arrays):
        assert array.dtype == DTYPES[dtype]
