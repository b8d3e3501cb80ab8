"""Writes a golden checkpoint anew in the layouts that are found in the wild, and computes logits of such folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from tests.golden import GOLDENS, Case

Tensors = dict[str, mx.array]
Recipe = Callable[[str, mx.array], QuantSpec | None]  # path and weight of a module -> how it is quantised

SPLIT = GOLDENS / "idefics3_split"
TIED = GOLDENS / "smolvlm2_tied"
CONV = "vision_model.embeddings.patch_embedding"
INDEX = "model.safetensors.index.json"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write(
    folder: Path,
    source: Path,
    tensors: Tensors,
    *,
    config: dict[str, Any] | None = None,
    file: str = "model.safetensors",
    metadata: dict[str, str] | None = None,
) -> Path:
    """A checkpoint of one weight file whose small files are the source's."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != INDEX:
            (folder / path.name).write_text(path.read_text())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    # Contiguous: the file format stores bytes in order.
    saved = {name: mx.contiguous(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / file), saved, metadata=metadata or {"format": "pt"})
    return folder


def mlx_names(tensors: Mapping[str, mx.array]) -> Tensors:
    """As MLX-community conversions of the family are stored: other prefixes, channels-last convolution."""
    renamed = {}
    for name, array in tensors.items():
        name = name.removeprefix("model.").replace("text_model.", "language_model.")
        name = f"language_model.{name}" if name.startswith("lm_head.") else name
        renamed[name] = array.transpose(0, 2, 3, 1) if name == f"{CONV}.weight" else array
    return renamed


def write_mlx(folder: Path, source: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    return write(folder, source, tensors, config=config, metadata={"format": "mlx"})


def quantised(tensors: Tensors, recipe: Recipe) -> tuple[Tensors, dict[str, QuantSpec]]:
    """Each chosen module's weight packed, scales (and biases) beside it."""
    packed, specs = dict(tensors), {}
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        spec = recipe(path, array) if leaf == "weight" and array.ndim == 2 else None
        if spec is None:
            continue
        specs[path] = spec
        parts = mx.quantize(array, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        packed.update(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False))
    return packed, specs


def dequantised(tensors: Tensors, specs: Mapping[str, QuantSpec]) -> Tensors:
    """The slow twin of a quantised checkpoint: ordinary float32 matrices."""
    plain = dict(tensors)
    for path, spec in specs.items():
        weight, scales = plain.pop(f"{path}.weight"), plain.pop(f"{path}.scales")
        biases = plain.pop(f"{path}.biases", None)
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        plain[f"{path}.weight"] = mx.dequantize(
            weight, scales, biases, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
        ).astype(mx.float32)
    return plain


def quantised_config(config: dict[str, Any], specs: Mapping[str, QuantSpec], *, mixed: bool) -> dict[str, Any]:
    """The config with its `quantization` block; `mixed` names every module's own numbers."""
    entries = {
        path: {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode} for path, spec in specs.items()
    }
    block: dict[str, Any] = dict(next(iter(entries.values())))
    if mixed:
        block.update(entries)
    return {**config, "quantization": block, "quantization_config": block}


def tensors_of(folder: Path) -> Tensors:
    return read_weights(folder)


def logits(folder: Path, golden: Path, scenario: str = "two_images", dtype: str = "float32") -> np.ndarray:
    """[L, V] of a scenario of the golden case that `folder` was made from."""
    source = open_model(str(folder))
    model = source.build(LoadOptions(dtype), lambda done, total: None)
    prompt = source.processor(Case(golden).messages(scenario))
    features = model.encode_images(prompt.images) if prompt.images else []
    inputs = model.embed_prompt(prompt, features)
    forward = KVPass([KVGroup.single(model.kv_specs, 0)], len(prompt.token_ids))
    return np.array(model.logits(model(inputs, forward.layers))[0].astype(mx.float32))
