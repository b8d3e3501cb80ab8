"""Random checkpoints of each family whose layers are wide enough for quantisation groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvlm.families import family_of
from tests.golden import GOLDENS

# Golden case, and what its config becomes: 32 fits one group, 64 and 96 several, 48 none.
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "idefics3": ("idefics3_split", TEXT, {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}),
    "llama4": (
        "llama4_norms",
        {**TEXT, "intermediate_size_mlp": 128},
        {"hidden_size": 32, "intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32}
        | {"vision_output_dim": 32},
    ),
    "llava_next": ("llava_next_tiles", TEXT, {"hidden_size": 32, "intermediate_size": 48}),
    "mllama": ("mllama_tiles", TEXT, {"hidden_size": 32, "intermediate_size": 64, "vision_output_dim": 96}),
    "qwen2_vl": (
        "qwen2_vl_tied",
        TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        {"embed_dim": 32, "hidden_size": 64},
    ),
    "smolvlm": ("smolvlm2_tied", TEXT, {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}),
}


def config_of(family: str) -> dict[str, Any]:
    golden, text, vision = CASES[family]
    config: dict[str, Any] = json.loads((GOLDENS / golden / "config.json").read_text())
    part = config.get("text_config", config)
    part |= text
    config["vision_config"] |= vision
    return config


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, mx.array]:
    """Normal weights under hub names; Llama 4's experts fused as on the hub."""
    model = family_of(config).build_model(config)
    tensors = {}
    for number, (name, array) in enumerate(tree_flatten(model.parameters())):
        tensors[name] = 0.3 * mx.random.normal(array.shape, key=mx.random.key(1000 * seed + number))
    for name in [name for name in tensors if ".experts.gate_proj" in name]:
        path = name.removesuffix(".gate_proj.weight")
        gate, up, down = (tensors.pop(f"{path}.{part}_proj.weight") for part in ("gate", "up", "down"))
        tensors[f"{path}.gate_up_proj"] = mx.concatenate([gate, up], axis=1).swapaxes(1, 2)
        tensors[f"{path}.down_proj"] = down.swapaxes(1, 2)
    return tensors


def write_wide(folder: Path, family: str, dtype: mx.Dtype = mx.float32, config: dict[str, Any] | None = None) -> Path:
    """A folder that opens as the golden case's does, with other weights."""
    golden = GOLDENS / CASES[family][0]
    folder.mkdir(parents=True, exist_ok=True)
    for path in golden.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            (folder / path.name).write_text(path.read_text())
    config = config or config_of(family)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: mx.contiguous(array.astype(dtype)) for name, array in tensors_of(config).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    return folder
