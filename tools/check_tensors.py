"""Checks lists of tensor names and shapes against the models that configs describe; nothing is read or allocated.

    python tools/check_tensors.py CONFIG.json TENSORS.json [TENSORS.json ...]

TENSORS.json: {"name": {"shape": [...], "dtype": "BF16"}, ...}, such as tools/list_tensors.py writes. A line for each
list; exits 1 if one does not fit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxvlm.checkpoint.estimate import DTYPES, misfit
from mlxvlm.families import family_of


def verdict(config: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> str:
    """ "" if the tensors, in any known layout, are exactly the model's."""
    weights = {name: mx.zeros(entry["shape"], DTYPES[entry["dtype"]]) for name, entry in tensors.items()}
    model = family_of(config).build_model(config)
    named = model.sanitize(weights)
    if set(model.sanitize(dict(named))) != set(named):
        return "sanitize changes names the second time"
    return misfit(model, named)


def num_values(tensors: dict[str, dict[str, Any]]) -> int:
    """Stored numbers: of an unquantised list the parameters, with what the model leaves out."""
    return sum(math.prod(entry["shape"]) for entry in tensors.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("tensors", type=Path, nargs="+")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    failed = False
    for path in args.tensors:
        tensors = json.loads(path.read_text())
        problem = verdict(config, tensors)
        failed = failed or bool(problem)
        print(f"{path}: {len(tensors)} tensors, {num_values(tensors):,} values, {problem or 'all in their places'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
