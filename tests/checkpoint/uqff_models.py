"""Tiny models of every family, wide enough to be quantised, with random weights by checkpoint names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxvlm.families import family_of
from tests.golden import GOLDENS

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 160,
    "max_position_embeddings": 512,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        **_TEXT,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "image_token_id": 141,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
        },
    },
    "idefics3": {
        "model_type": "idefics3",
        "image_token_id": 5,
        "scale_factor": 2,
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {**_VISION, "image_size": 16, "patch_size": 4},
    },
    "llava": {
        "model_type": "llava",
        "image_token_index": 5,
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
    },
    "mllama": {
        "model_type": "mllama",
        "image_token_index": 5,
        "text_config": {**_TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
    },
    "llama4": {
        "model_type": "llama4",
        "image_token_index": 5,
        "text_config": {
            **_TEXT,
            "head_dim": 32,
            "intermediate_size": 32,
            "intermediate_size_mlp": 128,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        "vision_config": {
            **_VISION,
            "intermediate_size": 128,
            "image_size": 16,
            "patch_size": 4,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
    },
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(CONFIGS[family])), **changes}


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by the model's own names, which every family's sanitize takes."""
    rng = np.random.default_rng(seed)
    model = family_of(config).build_model(config)
    return {
        name: (rng.normal(size=array.shape) * 0.1).astype(np.float32)
        for name, array in tree_flatten(model.parameters())
    }


def linear_paths(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The modules that can be quantised in groups of 32, and their shapes."""
    model = family_of(config).build_model(config)
    found = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    return {path: tuple(module.weight.shape) for path, module in found.items() if module.weight.shape[-1] % 32 == 0}


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], file: str = "model.safetensors"
) -> Path:
    """A model folder whose small files are a golden's; no weights if there are no tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (GOLDENS / "qwen2_vl_tied").glob("*.json"):
        if path.name not in ("config.json", "golden.json"):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        mx.save_safetensors(str(folder / file), {name: mx.array(array) for name, array in tensors.items()})
    return folder
