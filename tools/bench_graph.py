"""Milliseconds that Python takes to build a decode step's graph of 28 layers, nothing evaluated. Last line is JSON.

    python tools/bench_graph.py [--runs 50]

Qwen2-VL with the layers of the 2B model and narrow ones at that: how wide they are changes no graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from bench_checkpoints import write_checkpoint

from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.models.base import RowState, VisionLanguageModel

LAYERS = 28
LENGTH = 20  # tokens that a row holds


def batch_of(model: VisionLanguageModel, rows: int) -> KVBatch:
    batch = KVBatch()
    for owner in range(rows):
        group = KVGroup.single(model.kv_specs, owner)
        forward = KVPass([group], LENGTH + owner)
        for layer, spec in zip(forward.layers, model.kv_specs, strict=True):
            keys = mx.zeros((1, spec.num_kv_heads, LENGTH + owner, spec.head_dim))
            mx.eval(layer.attend(keys, keys, keys, 1.0))
        forward.commit()
        batch.join(group)
    return batch


def build_s(model: VisionLanguageModel, batch: KVBatch, rows: int) -> float:
    forward = batch.forward()
    begun = time.perf_counter()
    hidden = model(model.embed_tokens(mx.zeros((rows, 1), mx.int32), [RowState()] * rows), forward.layers)
    logits = model.logits(hidden[:, -1])
    seconds = time.perf_counter() - begun
    forward.commit()
    mx.eval(logits)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    runs = parser.parse_args().runs
    mx.disable_compile()  # as the engine does on the CPU backend
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), "qwen2_vl", full_pictures=False, num_hidden_layers=LAYERS)
        model = open_model(folder).build(LoadOptions("float32"), lambda done, total: None)
        found = {}
        for rows in (1, 8):
            batch = batch_of(model, rows)
            seconds = [build_s(model, batch, rows) for _ in range(runs)]
            found[f"graph_ms_{rows}_rows"] = 1000 * statistics.median(seconds)
            print(f"{rows} rows: median {1000 * statistics.median(seconds):.2f} ms, least {1000 * min(seconds):.2f} ms")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
