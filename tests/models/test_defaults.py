"""What every field of a config is where a checkpoint leaves it out: transformers 5.23's values, by class, in full.

The references' own defaults fit together in one family only; elsewhere the few keys are given that a model needs.
"""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import pytest

from mlxvlm.models import idefics3, llama4, llava, mllama, qwen2_vl

Fields = dict[str, Any]

# LlamaConfig
LLAMA: Fields = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope": {"rope_type": "default", "rope_theta": 10000.0, "max_position_embeddings": 2048},
    "hidden_act": "silu",
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "windows": (None,) * 32,
}
# MistralConfig
MISTRAL = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope": {"rope_type": "default", "rope_theta": 10000.0, "max_position_embeddings": 131072},
    "windows": (4096,) * 32,
}
# Qwen2Config, Qwen2Attention
QWEN2 = LLAMA | {
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope": {"rope_type": "default", "rope_theta": 10000.0, "max_position_embeddings": 32768},
    "attention_bias": True,
}
# Qwen2VLTextConfig, Qwen2VLAttention
QWEN2_VL_TEXT: Fields = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope": {"rope_type": "default", "rope_theta": 1000000.0, "max_position_embeddings": 32768},
    "hidden_act": "silu",
    "attention_bias": True,
    "output_bias": False,
    "mlp_bias": False,
    "windows": (None,) * 80,
}
# Qwen2VLVisionConfig
QWEN2_VL_VISION: Fields = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "rope_theta": 10000.0,
}
# MllamaTextConfig
MLLAMA_TEXT: Fields = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope": {"rope_type": "default", "rope_theta": 500000.0, "max_position_embeddings": 131072},
    "hidden_act": "silu",
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "windows": (None,) * 40,
}
# MllamaVisionConfig
MLLAMA_VISION: Fields = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "max_num_tiles": 4,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "intermediate_layers_indices": (3, 7, 15, 23, 30),
    "supported_aspect_ratios": ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)),
}
# Llama4TextConfig
LLAMA4_TEXT: Fields = {
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope": {"rope_type": "default", "rope_theta": 500000.0, "max_position_embeddings": 131072},
    "hidden_act": "silu",
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "windows": (None,) * 48,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "use_qk_norm": True,
    "tunes_temperature": True,
    "has_rope": (True, True, True, False) * 12,
    "has_experts": (True,) * 48,
    "is_chunked": (True, True, True, False) * 12,
}
# Llama4VisionConfig
LLAMA4_VISION: Fields = {
    "hidden_size": 768,
    "intermediate_size": 5632,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 7680,
    "rope_theta": 10000.0,
}
# Idefics3VisionConfig, SmolVLMVisionConfig
IDEFICS3_VISION: Fields = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
# CLIPVisionConfig
CLIP: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# SiglipVisionConfig
SIGLIP = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
# LlavaConfig and LlavaNextConfig, where there is no vision_config at all
CLIP_L = CLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAVA_ROOT: Fields = {
    "image_token_id": 32000,
    "projector_act": "gelu",
    "projector_bias": True,
    "feature_layers": (23,),
    "drops_first": True,
    "has_class_token": True,
    "is_anyres": False,
    "tie_word_embeddings": False,
}
IDEFICS3_ROOT: Fields = {"image_token_id": 128257, "scale_factor": 2, "tie_word_embeddings": False}
QWEN2_VL_ROOT: Fields = {
    "image_token_id": 151655,
    "mrope_section": (16, 24, 24),
    "windows": (None,) * 80,
    "tie_word_embeddings": False,
}


def compare(config: Any, root: Fields, text: Fields, vision: Fields) -> None:
    """Every field of all three parts, none left out."""
    assert {name: value for name, value in vars(config).items() if not is_dataclass(value)} == root
    assert asdict(config.text) == text
    assert asdict(config.vision) == vision


EMPTY_TEXT: tuple[Fields, ...] = ({}, {"text_config": {}})
EMPTY_VISION: tuple[Fields, ...] = ({}, {"vision_config": {}})


@pytest.mark.parametrize("text", EMPTY_TEXT)
@pytest.mark.parametrize("vision", EMPTY_VISION)
def test_mllama(text: Fields, vision: Fields) -> None:
    """MllamaConfig."""
    root = {"cross_attention_layers": frozenset({3, 8, 13, 18, 23, 28, 33, 38})}
    compare(mllama.Config.from_dict({**text, **vision}), root, MLLAMA_TEXT, MLLAMA_VISION)


@pytest.mark.parametrize("text", EMPTY_TEXT)
def test_qwen2_vl(text: Fields) -> None:
    """Qwen2VLConfig."""
    width = {"hidden_size": 8192}  # the tower's own default is the width of a smaller decoder
    found = qwen2_vl.Config.from_dict({**text, "vision_config": width})
    compare(found, QWEN2_VL_ROOT, QWEN2_VL_TEXT, QWEN2_VL_VISION | width)
    assert asdict(qwen2_vl.VisionConfig()) == QWEN2_VL_VISION


@pytest.mark.parametrize("text", EMPTY_TEXT)
def test_llama4(text: Fields) -> None:
    """Llama4Config."""
    sizes = {"hidden_size": 1408, "vision_output_dim": 4096}  # those of the class don't fit each other
    found = llama4.Config.from_dict({**text, "vision_config": sizes})
    compare(found, {"image_token_id": 200092}, LLAMA4_TEXT, LLAMA4_VISION | sizes)
    fields = llama4.VisionConfig.__dataclass_fields__.values()
    assert {field.name: field.default for field in fields} == LLAMA4_VISION


@pytest.mark.parametrize("vision", EMPTY_VISION)
@pytest.mark.parametrize(("text", "eps"), [({}, 1e-5), ({"text_config": {}}, 1e-6)])
def test_idefics3(text: Fields, eps: float, vision: Fields) -> None:
    """Idefics3Config and SmolVLMConfig, whose own text config has another eps than LlamaConfig."""
    scale = {"scale_factor": 7}  # the class's 2 does not divide the tower's 7 patches a side
    found = idefics3.Config.from_dict({**text, **vision, **scale})
    compare(found, IDEFICS3_ROOT | scale, LLAMA | {"rms_norm_eps": eps}, IDEFICS3_VISION)
    eight = {"image_size": 256}
    assert idefics3.Config.from_dict({"vision_config": eight}).scale_factor == IDEFICS3_ROOT["scale_factor"]


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@pytest.mark.parametrize(("kind", "text"), [(None, LLAMA), ("llama", LLAMA), ("mistral", MISTRAL), ("qwen2", QWEN2)])
@pytest.mark.parametrize(("tower", "vision"), [(None, CLIP_L), ({}, CLIP), ({"model_type": "clip_vision_model"}, CLIP)])
def test_llava(model_type: str, kind: str | None, text: Fields, tower: Fields | None, vision: Fields) -> None:
    """LlavaConfig, LlavaNextConfig."""
    size = {"vocab_size": 32064}  # <image> is one past the class's own
    config: Fields = {"model_type": model_type, "text_config": {**size, **({"model_type": kind} if kind else {})}}
    if tower is not None:
        config["vision_config"] = tower
    layers = {"feature_layers": (vision["num_hidden_layers"] - 1,), "is_anyres": model_type == "llava_next"}
    compare(llava.Config.from_dict(config), LLAVA_ROOT | layers, text | size, vision)


def test_llava_with_siglip() -> None:
    config = {"text_config": {"vocab_size": 32064}, "vision_config": {"model_type": "siglip_vision_model"}}
    root = LLAVA_ROOT | {"feature_layers": (11,), "has_class_token": False}
    compare(llava.Config.from_dict(config), root, LLAMA | {"vocab_size": 32064}, SIGLIP)


def test_llava_without_any_parts() -> None:
    found = llava.Config.from_dict({"image_token_index": 5})
    compare(found, LLAVA_ROOT | {"image_token_id": 5}, LLAMA, CLIP_L)
