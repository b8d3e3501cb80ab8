"""Synthetic checkpoints of each family for the benches: real pictures and heads, few and narrow layers, random weights.

Tokenizers and templates are those of the golden cases. Widths are what a CPU can do in seconds: MLX's CPU backend
multiplies some 10^9 numbers a second.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.write import write_shards
from mlxvlm.families import family_of

Json = dict[str, Any]
GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
CONTEXT = 16384
TEXT: Json = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
}
RATIOS = [[high, wide] for high in range(1, 5) for wide in range(1, 5) if high * wide <= 4]
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Case:
    """A golden case, and what its files become. `compute`: what a tower must have smaller to run on a CPU."""

    golden: str
    vision: Json
    text: Json = field(default_factory=dict)
    config: Json = field(default_factory=dict)
    preprocessor: Json = field(default_factory=dict)
    processor: Json = field(default_factory=dict)
    compute: tuple[Json, Json] = ({}, {})  # of vision_config, of preprocessor_config.json


_CLIP: Json = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "image_size": 336,
    "patch_size": 14,
}
_CLIP_SIZE: Json = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
# Of Idefics3-8B, LLaVA 1.5, LLaVA 1.6 Mistral, Llama 3.2 Vision, Llama 4 Scout and Qwen2-VL: what shapes pictures.
CASES: dict[str, Case] = {
    "idefics3": Case(
        "idefics3_split",
        {"hidden_size": 144, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 2}
        | {"image_size": 364, "patch_size": 14},
        text={"rope_scaling": None},
        preprocessor={"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}},
        processor={"image_seq_len": 169},
    ),
    "llava": Case(
        "llava_clip",
        _CLIP,
        config={
            "vision_feature_layer": -2,
            "projector_hidden_act": "gelu",
            "vision_feature_select_strategy": "default",
        },
        text={"rms_norm_eps": 1e-5, "hidden_act": "silu"},
        preprocessor=_CLIP_SIZE,
        processor={"patch_size": 14},
    ),
    "llava_next": Case(
        "llava_next_tiles",
        _CLIP,
        text={"sliding_window": None, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
        config={"image_grid_pinpoints": PINPOINTS, "projector_hidden_act": "gelu", "vision_feature_layer": -2}
        | {"vision_feature_select_strategy": "default"},
        preprocessor={**_CLIP_SIZE, "image_grid_pinpoints": PINPOINTS},
        processor={"patch_size": 14},
    ),
    "llama4": Case(
        "llama4_norms",
        {"hidden_size": 176, "intermediate_size": 704, "num_attention_heads": 2, "num_hidden_layers": 2}
        | {"image_size": 336, "patch_size": 14, "num_channels": 3, "norm_eps": 1e-5, "initializer_range": 0.02}
        | {
            "hidden_act": "gelu",
            "pixel_shuffle_ratio": 0.5,
            "projector_dropout": 0.0,
            "rope_theta": 10000.0,
            "vision_feature_layer": -1,
        }
        | {"vision_feature_select_strategy": "default"}
        | dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 256),
        text={"intermediate_size_mlp": 768, "intermediate_size": 512, "num_local_experts": 4}
        | {"rope_scaling": None, "attention_chunk_size": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
        preprocessor={"size": {"height": 336, "width": 336}, "max_patches": 16},
        processor={"patch_size": 14},
    ),
    "mllama": Case(
        "mllama_tiles",
        {"hidden_size": 160, "intermediate_size": 640, "attention_heads": 2, "num_hidden_layers": 3}
        | {"image_size": 560, "patch_size": 14, "num_global_layers": 1, "vision_output_dim": 480}
        | {"num_channels": 3, "max_num_tiles": 4, "supported_aspect_ratios": RATIOS},
        preprocessor={"size": {"height": 560, "width": 560}, "max_image_tiles": 4},
        compute=({"image_size": 280}, {"size": {"height": 280, "width": 280}}),
    ),
    "qwen2_vl": Case(
        "qwen2_vl_tied",
        {"embed_dim": 160, "hidden_size": 256, "num_heads": 2, "depth": 2, "mlp_ratio": 4, "patch_size": 14}
        | {"spatial_patch_size": 14},
        text={"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}, "sliding_window": 32768},
        # The published max_pixels fill a context; this is the value that its README advises.
        preprocessor={"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280, "patch_size": 14},
    ),
}


def write_checkpoint(folder: Path, family: str, *, full_pictures: bool, **text: Any) -> Path:
    """A folder that both runtimes open; `text` overrides the decoder's config.

    full_pictures: preprocessing exactly as published; else the tower takes what a CPU can do.
    """
    case = CASES[family]
    golden = GOLDENS / case.golden
    folder.mkdir(parents=True, exist_ok=True)
    for path in golden.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("golden.json", "model.safetensors.index.json"):
            shutil.copyfile(path, folder / path.name)
    vision, preprocessor = ({}, {}) if full_pictures else case.compute
    config: Json = json.loads((folder / "config.json").read_text()) | case.config
    decoder = config.get("text_config", config)
    decoder |= {**TEXT, **case.text, **text}
    config["vision_config"] |= case.vision | vision
    (folder / "config.json").write_text(json.dumps(config))
    _update(folder / "preprocessor_config.json", case.preprocessor | preprocessor)
    _update(folder / "processor_config.json", case.processor)
    _write_weights(folder, config)
    return folder


def _update(path: Path, values: Json) -> None:
    if values:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _write_weights(folder: Path, config: Json) -> None:
    """Normal weights under hub names, Llama 4's experts fused as on the hub."""
    shapes = [(name, array.shape) for name, array in tree_flatten(family_of(config).build_model(config).parameters())]
    shapes += [(name, shape) for name, shape in _unused(config, dict(shapes)).items()]

    def tensors() -> Iterator[tuple[str, mx.array]]:
        parts: dict[str, mx.array] = {}
        for number, (name, shape) in enumerate(shapes):
            scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            array = scale + 0.05 * mx.random.normal(shape, key=mx.random.key(number))
            if len(shape) == 4:  # a convolution, [O, C, kH, kW] on the hub
                array = mx.contiguous(array.transpose(0, 3, 1, 2))
            if ".experts." not in name:
                yield name, array
                continue
            parts[name] = array
        for name in [name for name in parts if ".gate_proj" in name]:
            path = name.removesuffix(".gate_proj.weight")
            gate, up, down = (parts[f"{path}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            yield f"{path}.gate_up_proj", mx.contiguous(mx.concatenate([gate, up], axis=1).swapaxes(1, 2))
            yield f"{path}.down_proj", mx.contiguous(down.swapaxes(1, 2))

    write_shards(folder, tensors())


def _unused(config: Json, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """CLIP's last layer and norm, which LLaVA looks past: checkpoints have them, and other runtimes ask for them."""
    tower = "vision_tower.vision_model."
    if not any(name.startswith(tower) for name in shapes):
        return {}
    last = config["vision_config"]["num_hidden_layers"] - 1
    before, after = (f"{tower}encoder.layers.{number}." for number in (last - 1, last))
    found = {name.replace(before, after): shape for name, shape in shapes.items() if name.startswith(before)}
    norm = {f"{tower}post_layernorm.{part}": (config["vision_config"]["hidden_size"],) for part in ("weight", "bias")}
    return {name: shape for name, shape in (found | norm).items() if name not in shapes}
