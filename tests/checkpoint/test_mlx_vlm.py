"""Folders that `quantize_folder` writes, opened by mlx-vlm itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.quantize import quantize_folder
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.processors.base import Prompt
from tests.checkpoint.wide import CASES, config_of, write_wide

IDS = [1, 9, 17, 4, 33, 8, 21, 50, 12]
LOGITS = 1e-5  # absolute, of logits up to 3
SCRIPT = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_vlm.utils import load_model

mx.set_default_device(mx.cpu)
folder, ids = json.loads(sys.argv[1])
model = load_model(Path(folder))
quantised = sum(hasattr(module, "bits") for _, module in model.named_modules())
logits = model.language_model(mx.array([ids])).logits.astype(mx.float32)
print("ANSWER" + json.dumps([quantised, logits[0].tolist()]))
"""


# What mlx-vlm has no default for, or another one than transformers.
TEXT: dict[str, dict[str, Any]] = {
    "idefics3": {"rope_scaling": None},  # it has none there
    # Its queries and keys are normalised with this epsilon, whatever the config says; equal factors divide by zero.
    "llama4": {
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "factor": 4.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
    },
    "llava_next": {"rms_norm_eps": 1e-5},
    "smolvlm": {"tie_word_embeddings": False},
}
VISION: dict[str, dict[str, Any]] = {
    "llama4": {
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "num_channels": 3,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "rope_theta": 10000.0,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
}


def complete(folder: Path, family: str) -> Path:
    """A source checkpoint with all that mlx-vlm looks for: every key, and the layers of a tower that nothing uses."""
    config = config_of(family)
    config.get("text_config", config).update(TEXT.get(family, {}))
    config["vision_config"] |= VISION.get(family, {})
    config["tie_word_embeddings"] = config.get("tie_word_embeddings", False) and family != "smolvlm"
    write_wide(folder, family, config=config)
    tensors = dict(read_weights(folder))
    tower = "vision_tower.vision_model"
    for name, array in list(tensors.items()):
        if name.startswith(f"{tower}.encoder.layers.0."):
            tensors[name.replace("layers.0", "layers.1")] = array
        elif name.startswith(f"{tower}.pre_layrnorm."):
            tensors[name.replace("pre_layrnorm", "post_layernorm")] = array
        elif "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            # Without a picture these layers do nothing; mlx-vlm has them look at their own queries.
            tensors[name] = mx.zeros_like(array)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    return folder


def silent(done: int, total: int) -> None:
    pass


def theirs(python: Path, folder: Path) -> tuple[int, np.ndarray]:
    """Quantised modules, and logits [L, V] of IDS."""
    command = [python, "-c", SCRIPT, json.dumps([str(folder), IDS])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    quantised, logits = json.loads(lines[0].removeprefix("ANSWER"))
    return quantised, np.array(logits, np.float32)


def ours(folder: Path) -> tuple[int, np.ndarray]:
    model = open_model(str(folder)).build(LoadOptions("float32"), silent)
    assert isinstance(model, nn.Module)
    inputs = model.embed_prompt(Prompt(tuple(IDS)), [])
    forward = KVPass([KVGroup.single(model.kv_specs, 0)], len(IDS))
    logits = model.logits(model(inputs, forward.layers))[0].astype(mx.float32)
    return sum(hasattr(module, "bits") for _, module in model.named_modules()), np.array(logits)


@pytest.mark.peers("mlx-vlm")
@pytest.mark.parametrize(("isq", "tower"), [("4@32", False), ("mxfp4", True), ("8", True)])
@pytest.mark.parametrize("family", CASES)
def test_the_folder_opens_and_says_the_same(
    family: str, isq: str, tower: bool, tmp_path: Path, mlx_vlm_python: Path
) -> None:
    """SmolVLM with a head of its own: mlx-vlm has no tied one there. Mllama's cross-attention gates are closed."""
    source, out = complete(tmp_path / "source", family), tmp_path / "out"
    quantize_folder(str(source), out, recipe_of(LoadOptions(isq=isq, isq_tower=tower)), "auto", silent)
    quantised, logits = theirs(mlx_vlm_python, out)
    expected, own = ours(out)
    assert quantised == expected
    assert np.abs(logits - own).max() <= LOGITS
