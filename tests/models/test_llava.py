"""LLaVA's network: feature layers, tiles, text types, layouts; each against a slow obvious twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import bind
from mlxvlm.checkpoint.load import open_model
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.errors import UnsupportedModelError, WeightsError
from mlxvlm.models.base import KVSpec
from mlxvlm.models.decoder import DecoderConfig
from mlxvlm.models.llava import Config, Model, build, pack_tiles
from tests.golden import GOLDENS, Case

CLIP, SIGLIP, TILES = (GOLDENS / f"llava_{name}" for name in ("clip", "siglip", "next_tiles"))
ALL = pytest.mark.parametrize("folder", [CLIP, SIGLIP, TILES], ids=lambda folder: folder.name)
TOWER = "vision_tower.vision_model."


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text()), **changes}


def loaded(folder: Path, dtype: str = "float32", **changes: Any) -> Model:
    model = build(config_of(folder, **changes))
    bind(model, read_weights(folder), dtype, lambda done, total: None)
    return model


def in_memory_names(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """transformers 5's own names."""
    renamed = {}
    for name, array in tensors.items():
        name = name.replace(TOWER, "vision_tower.").replace("language_model.model.", "language_model.")
        renamed[name.replace("language_model.lm_head", "lm_head") if "lm_head" in name else f"model.{name}"] = array
    return renamed


LAYOUTS = {
    "hub": lambda tensors: tensors,
    "saved-by-5": lambda tensors: {name.replace(TOWER, "vision_tower."): array for name, array in tensors.items()},
    "in-memory": in_memory_names,
    "mlx": lambda tensors: {
        name: array.transpose(0, 2, 3, 1) if array.ndim == 4 else array for name, array in tensors.items()
    },
    "buffers": lambda tensors: {
        **tensors,
        f"{TOWER}embeddings.position_ids": mx.zeros((1, 17), mx.int32),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((4,)),
        f"{TOWER}head.probe": mx.ones((1, 1, 8)),
    },
}


@ALL
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts_hold_the_same_values(folder: Path, layout: str) -> None:
    model, hub = build(config_of(folder)), read_weights(folder)
    expected, once = model.sanitize(dict(hub)), model.sanitize(LAYOUTS[layout](hub))
    twice = model.sanitize(dict(once))
    assert set(once) == set(expected) == {name for name, _ in tree_flatten(model.parameters())}
    assert list(twice) == list(once)
    for name, array in expected.items():
        assert mx.array_equal(once[name], array)
        assert mx.array_equal(twice[name], array)


def test_unused_layers_are_dropped_and_unknown_ones_refused() -> None:
    model, tensors = build(config_of(TILES)), read_weights(TILES)
    assert f"{TOWER}encoder.layers.1.layer_norm1.weight" in tensors
    assert len(model.vision_tower.vision_model.encoder.layers) == 1
    extra = f"{TOWER}encoder.layers.2.layer_norm1.weight"
    with pytest.raises(WeightsError, match=r"layers\.2"):
        bind(model, {**tensors, extra: mx.ones((8,))}, "float32", lambda done, total: None)


def test_tied_head_is_not_taken() -> None:
    model, tensors = build(config_of(SIGLIP)), read_weights(SIGLIP)
    tensors["language_model.lm_head.weight"] = mx.zeros((3, 3))
    assert "language_model.lm_head.weight" not in model.sanitize(tensors)
    # LlavaNextConfig does not heed the text's own entry.
    text = {**config_of(TILES)["text_config"], "tie_word_embeddings": True}
    assert not Config.from_dict(config_of(TILES, text_config=text)).tie_word_embeddings


@pytest.mark.parametrize("chosen", [0, -1, -2, [1, 0], [-3, 2, -2]])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_feature_layers_are_hidden_states(chosen: int | list[int], strategy: str) -> None:
    """Against all hidden states of all layers."""
    changes = {"vision_feature_layer": chosen, "vision_feature_select_strategy": strategy}
    whole = build(config_of(CLIP, vision_feature_layer=-1))
    part = build(config_of(CLIP, **changes))
    part.vision_tower.vision_model.embeddings = whole.vision_tower.vision_model.embeddings
    part.vision_tower.vision_model.pre_layrnorm = whole.vision_tower.vision_model.pre_layrnorm
    layers = whole.vision_tower.vision_model.encoder.layers
    part.vision_tower.vision_model.encoder.layers = layers[: len(part.vision_tower.vision_model.encoder.layers)]
    pixels = mx.random.normal((2, 18, 18, 3), key=mx.random.key(0))
    states = [whole.vision_tower.vision_model.pre_layrnorm(whole.vision_tower.vision_model.embeddings(pixels))]
    for layer in layers:
        states.append(layer(states[-1]))
    picked = [states[index] for index in (chosen if isinstance(chosen, list) else [chosen])]
    expected = mx.concatenate([state[:, 1:] if strategy == "default" else state for state in picked], axis=-1)
    assert mx.array_equal(part.vision_tower.vision_model(pixels), expected)


@pytest.mark.parametrize("layout", [(2, 3, 0, 0), (2, 3, 1, 0), (3, 1, 0, 1), (1, 1, 0, 0), (1, 2, 2, 0)])
def test_packing_against_loops(layout: tuple[int, int, int, int]) -> None:
    rows, columns, trim_y, trim_x = layout
    features = np.random.default_rng(0).normal(size=(1 + rows * columns, 16, 5)).astype(np.float32)
    newline = np.full(5, 7.0, np.float32)
    expected = list(features[0])
    for y in range(trim_y, rows * 4 - trim_y):
        for x in range(trim_x, columns * 4 - trim_x):
            expected.append(features[1 + y // 4 * columns + x // 4, y % 4 * 4 + x % 4])
        expected.append(newline)
    assert np.array_equal(np.array(pack_tiles(mx.array(features), layout, mx.array(newline))), np.stack(expected))


@ALL
def test_pictures_together_are_pictures_alone(folder: Path) -> None:
    model, processor = loaded(folder), open_model(str(folder)).processor
    images = processor(Case(folder).messages("two_images")).images
    together = model.encode_images(images)
    for image, features in zip(images, together, strict=True):
        alone = model.encode_images([image])[0]
        assert features.shape == alone.shape == (image.span[1] - image.span[0], 12)
        assert np.abs(np.array(features - alone)).max() <= 1e-5


@ALL
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_everything_is_in_the_weights_dtype(folder: Path, dtype: str) -> None:
    model = loaded(folder, dtype)
    prompt = open_model(str(folder)).processor(Case(folder).messages("one_wide"))
    features = model.encode_images(prompt.images)
    inputs = model.embed_prompt(prompt, features)
    group = KVGroup.single(model.kv_specs, 0)
    hidden = model(inputs, KVPass([group], len(prompt.token_ids)).layers)
    for array in (*features, inputs.embeds, hidden, model.logits(hidden), *group.arrays):
        assert array.dtype == getattr(mx, dtype)


def test_a_quantised_tower_embedding_keeps_the_dtype() -> None:
    model = loaded(TILES, "bfloat16")
    embeddings = model.vision_tower.vision_model.embeddings
    padded = nn.Embedding(10, 64)
    padded.weight = mx.zeros((10, 64))
    quantised = padded.to_quantized(group_size=32, bits=4, mode="mxfp4")
    embeddings.position_embedding = lambda ids: quantised(ids)[:, :8].astype(mx.float32)
    assert embeddings(mx.zeros((1, 12, 12, 3), mx.bfloat16)).dtype == mx.bfloat16


def test_text_types() -> None:
    llama = DecoderConfig.from_dict({"model_type": "llama", "sliding_window": 9})
    assert llama.kv_specs == [KVSpec(32, 128)] * 32
    assert (llama.intermediate_size, llama.attention_bias, llama.rope["rope_theta"]) == (11008, False, 10000.0)
    mistral = DecoderConfig.from_dict({"model_type": "mistral", "attention_bias": True})
    assert mistral.kv_specs == [KVSpec(8, 128, 4096)] * 32
    assert (mistral.intermediate_size, mistral.attention_bias) == (14336, False)
    endless = DecoderConfig.from_dict({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": None})
    assert endless.kv_specs == [KVSpec(32, 128)] * 32
    qwen2 = DecoderConfig.from_dict({"model_type": "qwen2"})
    assert qwen2.kv_specs == [KVSpec(32, 128)] * 32
    assert (qwen2.vocab_size, qwen2.attention_bias, qwen2.output_bias) == (151936, True, False)


def test_windows_of_some_layers() -> None:
    base = {"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5}
    assert DecoderConfig.from_dict({**base, "max_window_layers": 1}).windows == (None, 5, 5)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert DecoderConfig.from_dict({**base, "layer_types": kinds}).windows == (5, None, 5)
    with pytest.raises(ValueError, match="layer_types"):
        DecoderConfig.from_dict({**base, "layer_types": kinds[:2]})
    with pytest.raises(ValueError, match="sliding_window"):
        DecoderConfig.from_dict({**base, "sliding_window": 0, "max_window_layers": 0})


def test_config_defaults() -> None:
    config = Config.from_dict({"model_type": "llava_next", "text_config": {"vocab_size": 32064}})
    vision = config.vision
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)
    assert (vision.hidden_act, vision.layer_norm_eps, config.feature_layers) == ("quick_gelu", 1e-5, (23,))
    assert (config.projector_act, config.projector_bias, config.tie_word_embeddings) == ("gelu", True, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_token_index": 10**6},
        {"vision_feature_layer": 3},
        {"vision_feature_layer": []},
        {"model_type": "llava_next", "vision_feature_select_strategy": "full"},
    ],
)
def test_senseless_configs(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"image_token_index|vision_feature"):
        build(config_of(CLIP, **changes))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_other_parts_are_refused_by_name(part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{part}'s model_type 'pixtral'"):
        build(config_of(CLIP, **{part: {"model_type": "pixtral"}}))
