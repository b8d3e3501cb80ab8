"""Names and shapes of every layout of Idefics3 and SmolVLM, and of the real repositories."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import quantize_modules
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.models.idefics3 import Model, build
from tests.checkpoint.layouts import SPLIT, TIED, Tensors, config_of, mlx_names, quantised, tensors_of
from tests.golden import GOLDENS

TEXT_LAYER = {
    "input_layernorm.weight": (576,),
    "post_attention_layernorm.weight": (576,),
    "mlp.gate_proj.weight": (1536, 576),
    "mlp.up_proj.weight": (1536, 576),
    "mlp.down_proj.weight": (576, 1536),
    "self_attn.q_proj.weight": (576, 576),
    "self_attn.k_proj.weight": (192, 576),
    "self_attn.v_proj.weight": (192, 576),
    "self_attn.o_proj.weight": (576, 576),
}
VISION_LAYER = {
    "layer_norm1.weight": (768,),
    "layer_norm1.bias": (768,),
    "layer_norm2.weight": (768,),
    "layer_norm2.bias": (768,),
    "mlp.fc1.weight": (3072, 768),
    "mlp.fc1.bias": (3072,),
    "mlp.fc2.weight": (768, 3072),
    "mlp.fc2.bias": (768,),
    **{f"self_attn.{name}.weight": (768, 768) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    **{f"self_attn.{name}.bias": (768,) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
}


def smolvlm_256m(text: str, vision: str, connector: str, head: str, conv: tuple[int, ...]) -> dict[str, Any]:
    """Names and shapes of SmolVLM-256M with two text layers and one vision layer."""
    return {
        f"{head}.weight": (49280, 576),
        f"{connector}.modality_projection.proj.weight": (576, 12288),
        f"{text}.embed_tokens.weight": (49280, 576),
        f"{text}.norm.weight": (576,),
        **{f"{text}.layers.{i}.{name}": shape for i in range(2) for name, shape in TEXT_LAYER.items()},
        f"{vision}.embeddings.patch_embedding.weight": conv,
        f"{vision}.embeddings.patch_embedding.bias": (768,),
        f"{vision}.embeddings.position_embedding.weight": (1024, 768),
        f"{vision}.post_layernorm.weight": (768,),
        f"{vision}.post_layernorm.bias": (768,),
        **{f"{vision}.encoder.layers.0.{name}": shape for name, shape in VISION_LAYER.items()},
    }


CONFIG = {
    "model_type": "idefics3",
    "image_token_id": 49190,
    "scale_factor": 4,
    "text_config": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "vocab_size": 49280,
    },
    # The rest are the reference's defaults, as in SmolVLM2-256M.
    "vision_config": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 1,
        "image_size": 512,
        "patch_size": 16,
    },
}
HUB = smolvlm_256m("model.text_model", "model.vision_model", "model.connector", "lm_head", (768, 3, 16, 16))
MLX = smolvlm_256m("language_model", "vision_model", "connector", "language_model.lm_head", (768, 16, 16, 3))


@pytest.mark.parametrize("stored", [HUB, MLX], ids=["hub", "mlx"])
def test_real_names_and_shapes(stored: dict[str, tuple[int, ...]]) -> None:
    model = build(CONFIG)
    # Lazy: a shape costs nothing until it is evaluated.
    found = model.sanitize({name: mx.zeros(shape) for name, shape in stored.items()})
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in tree_flatten(model.parameters())
    }


def test_real_quantised_names_and_shapes() -> None:
    """MLX-community's 4-bit conversion: everything of the decoder and the connector, groups of 64."""
    stored: Tensors = {}
    for name, shape in MLX.items():
        path = name.removesuffix(".weight")
        if name == path or len(shape) != 2 or path.startswith("vision_model"):
            stored[name] = mx.zeros(shape)
            continue
        stored[name] = mx.zeros((shape[0], shape[1] // 8), mx.uint32)
        stored[f"{path}.scales"] = stored[f"{path}.biases"] = mx.zeros((shape[0], shape[1] // 64))
    model = build(CONFIG)
    found = model.sanitize(stored)
    quantize_modules(model, found)
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in tree_flatten(model.parameters())
    }
    assert repr(model.model.text_model.layers[1].mlp.down_proj).startswith("QuantizedLinear")


def in_layout(layout: str) -> tuple[Model, Tensors]:
    golden = TIED if layout.startswith("tied") else GOLDENS / "idefics3_resaved" if layout == "resaved" else SPLIT
    tensors = tensors_of(golden)
    if layout == "tied-with-head":
        tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"]
    if layout == "buffers":
        tensors["model.vision_model.embeddings.position_ids"] = mx.zeros((1, 16), mx.int32)
    if layout.startswith("mlx") or layout == "tied-mlx":
        tensors = mlx_names(tensors)
    if layout == "mlx-quantised":
        tensors, _ = quantised(tensors, lambda path, weight: QuantSpec(4, 32))
    return build(config_of(golden)), tensors


@pytest.mark.parametrize(
    "layout", ["hub", "resaved", "mlx", "mlx-quantised", "buffers", "tied", "tied-mlx", "tied-with-head"]
)
def test_sanitize_twice_is_once(layout: str) -> None:
    model, tensors = in_layout(layout)
    once = model.sanitize(dict(tensors))
    twice = model.sanitize(dict(once))
    assert list(twice) == list(once)
    assert all(mx.array_equal(twice[name], array) for name, array in once.items())
    if layout != "mlx-quantised":
        assert set(once) == {name for name, _ in tree_flatten(model.parameters())}


def test_sanitize_leaves_its_argument_alone() -> None:
    model, tensors = in_layout("mlx")
    names, shapes = list(tensors), [array.shape for array in tensors.values()]
    model.sanitize(tensors)
    assert (list(tensors), [array.shape for array in tensors.values()]) == (names, shapes)


def test_layouts_hold_the_same_values() -> None:
    model, hub = in_layout("hub")
    _, other = in_layout("mlx")
    expected, found = model.sanitize(hub), model.sanitize(other)
    assert set(found) == set(expected)
    assert all(mx.array_equal(found[name], array) for name, array in expected.items())


def test_unknown_names_stay_as_they_are() -> None:
    """So that strict binding names them as the file does."""
    model, _ = in_layout("hub")
    assert list(model.sanitize({"adapter.weight": mx.zeros((1,))})) == ["adapter.weight"]
