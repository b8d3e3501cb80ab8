"""A table of names and shapes: what transformers' own models call their tensors in memory, and what it saves."""

from __future__ import annotations

from pathlib import Path

from goldens_json import read_json, write_json
from list_tensors import meta_model, saved_tensors

CASES = (
    "idefics3_split",
    "llama4_dense",
    "llava_clip",
    "llava_next_tiles",
    "mllama_tiles",
    "qwen2_vl_tied",
    "qwen2_vl_window",
    "smolvlm2_tied",
)


def write_tables(out: Path) -> None:
    """{case: {"memory": {name: shape}, "saved": {name: shape}}}"""
    table = {}
    for case in CASES:
        model = meta_model(read_json(out / case / "config.json"))
        layouts = {"memory": model.state_dict(), "saved": saved_tensors(model)}
        table[case] = {
            layout: {name: list(tensor.shape) for name, tensor in tensors.items()}
            for layout, tensors in layouts.items()
        }
    write_json(out / "tensor_names.json", table, compact_below=2)
