"""Loading a 16-bit checkpoint in 4 bits: in-situ quantisation, the cache, and the naive way, each in its own process.

    python tools/bench_load.py [--layers 18] [--isq 4] [--runs 3]

Writes a synthetic LLaVA checkpoint (bfloat16, 2.2 GB at 18 layers) into a temporary folder. `naive` is what loaders
without in-situ quantisation do: build the model in full, nn.quantize it, evaluate. The last line is JSON: medians of
seconds, peak resident bytes, and ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import bind
from mlxvlm.checkpoint.build import build, recipe_of
from mlxvlm.checkpoint.isq import make_plan
from mlxvlm.checkpoint.load import LoadOptions, ModelSource
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.checkpoint.write import write_shards
from mlxvlm.families import family_of

MODES = ("naive", "isq", "cached")
DTYPE = "bfloat16"  # what a GPU keeps; the CPU backend's own choice would be float32


def synthetic(layers: int) -> dict[str, Any]:
    """LLaVA 1.5's shapes at a quarter of the width, so that a small machine holds it in full as well."""
    return {
        "model_type": "llava",
        "text_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_hidden_layers": layers,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    }


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random weights, shard by shard."""
    (folder / "config.json").write_text(json.dumps(synthetic(layers)))
    model = family_of(synthetic(layers)).build_model(synthetic(layers))
    shapes = [(name, array.shape) for name, array in tree_flatten(model.parameters())]

    def tensors() -> Any:
        for number, (name, shape) in enumerate(shapes):
            array = mx.random.normal(shape, mx.bfloat16, scale=0.02, key=mx.random.key(number))
            mx.eval(array)
            yield name, array

    write_shards(folder, tensors())


def naive(folder: Path, options: LoadOptions) -> Any:
    model = family_of(config_of(folder)).build_model(config_of(folder))
    plan = make_plan(model, recipe_of(options))
    bind(model, read_weights(folder), options.dtype, lambda done, total: None)

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        spec = plan.specs.get(path)
        return {"bits": spec.bits, "group_size": spec.group_size, "mode": spec.mode} if spec else False

    nn.quantize(model, class_predicate=choose)
    mx.eval(model.parameters())
    return model


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def child(mode: str, folder: Path, cache: Path, isq: str) -> dict[str, float]:
    """One load in this process."""
    mx.disable_compile()
    cached = cache if mode == "cached" else None
    options = LoadOptions(DTYPE, isq, isq_cache=cached)
    begun = time.perf_counter()
    if mode == "naive":
        model = naive(folder, options)
    else:
        # The processor's files are no part of this.
        source = SimpleNamespace(
            name=folder.name, folder=folder, config=config_of(folder), family=family_of(config_of(folder)), read=None
        )
        model = build(cast(ModelSource, source), options, lambda done, total: None)
    seconds = time.perf_counter() - begun
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        "peak_mlx_bytes": mx.get_peak_memory(),
        "model_bytes": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
    }


def measure(mode: str, folder: Path, cache: Path, isq: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", mode, str(folder), str(cache), "--isq", isq]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    # In a process of its own: a child's peak begins at its parent's.
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_checkpoint, args=(folder, args.layers))
    writer.start()
    writer.join()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cache = folder / "cache"
    print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16; quantised to {args.isq}")
    first = measure("cached", folder, cache, args.isq)  # fills the cache
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(args.runs):
        for mode in MODES:  # in turns: a shared machine's speed drifts
            runs[mode].append(measure(mode, folder, cache, args.isq))
    median = {
        mode: {key: statistics.median(run[key] for run in found) for key in found[0]} for mode, found in runs.items()
    }
    for mode, found in median.items():
        print(f"{mode:<7} {found['seconds']:6.2f} s   peak {found['peak_rss_bytes'] / 1e6:7.0f} MB resident")
    isq, model_bytes = median["isq"], median["isq"]["model_bytes"]
    return {
        "source_bytes": size,
        "model_bytes": model_bytes,
        "isq_filling_the_cache_seconds": first["seconds"],
        "median": median,
        "isq_peak_bar": 1.25 * model_bytes + 150e6,
        "isq_peak_over_bar": isq["peak_rss_bytes"] / (1.25 * model_bytes + 150e6),
        "isq_peak_over_naive": isq["peak_rss_bytes"] / median["naive"]["peak_rss_bytes"],
        "isq_seconds_over_cached": isq["seconds"] / median["cached"]["seconds"],
        "isq_seconds_over_naive": isq["seconds"] / median["naive"]["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--isq", default="4")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("MODE", "FOLDER", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        mode, folder, cache = args.child
        print(json.dumps(child(mode, Path(folder), Path(cache), args.isq)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(Path(folder), args)))


if __name__ == "__main__":
    main()
