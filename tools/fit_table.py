"""How large a Mac each model needs, as a Markdown table: weights, keys and values of a context, by doctor's sums.

    python tools/fit_table.py [--tokens 8192] FOLDER [FOLDER ...]

A FOLDER holds config.json and tensors.json: {"name": {"shape": [...], "dtype": "BF16"}, ...}. No weights are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx

from mlxvlm.checkpoint.estimate import DTYPES, need_of
from mlxvlm.checkpoint.isq import AS_IT_IS, Recipe
from mlxvlm.checkpoint.recipe import parse_type
from mlxvlm.cli.options import size_text

MACS_GB = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
TYPES = (None, 8, 4)  # --isq
ACTIVATIONS_GB = 1.0  # a prefill chunk, a batch of pictures, what the caches keep


def usable_gb(memory_gb: float) -> float:
    """What macOS recommends that a GPU keeps resident, as reported for Apple Silicon: 2/3, from 36 GB on 3/4."""
    return memory_gb * (2 / 3 if memory_gb < 36 else 3 / 4)


def row(folder: Path, tokens: int) -> str:
    config = json.loads((folder / "config.json").read_text())
    tensors = json.loads((folder / "tensors.json").read_text())
    weights = {name: mx.zeros(entry["shape"], DTYPES[entry["dtype"]]) for name, entry in tensors.items()}
    cells = []
    for kind in TYPES:
        recipe = AS_IT_IS if kind is None else Recipe(parse_type(kind))
        need = need_of(config, weights, "bfloat16", recipe)
        total = (need.weights_bytes + min(tokens, need.max_context) * need.kv_bytes_per_token) / 1e9 + ACTIVATIONS_GB
        mac = next((f"{memory} GB" for memory in MACS_GB if usable_gb(memory) >= total), "more than one")
        cells.append(f"{size_text(need.weights_bytes)}: {mac}")
    return f"| {folder.name.replace('__', '/')} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=8192, help="of the context (default: %(default)s)")
    args = parser.parse_args()
    print("| model | 16 bits | `--isq 8` | `--isq 4` |\n|---|---|---|---|")
    for folder in args.folders:
        print(row(folder, args.tokens))


if __name__ == "__main__":
    main()
