"""tools/fit_table.py adds up what doctor adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mlxvlm.checkpoint.estimate import memory_need
from mlxvlm.checkpoint.isq import Recipe
from mlxvlm.checkpoint.recipe import parse_type
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.cli.options import size_text
from tests.checkpoint.wide import write_wide

TOOL = Path(__file__).parent.parent / "tools" / "fit_table.py"


def test_the_table_has_the_sizes_of_each_type(tmp_path: Path) -> None:
    folder = write_wide(tmp_path, "llava_next")
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    tensors = {
        name: {"shape": list(array.shape), "dtype": names[str(array.dtype).removeprefix("mlx.core.")]}
        for name, array in read_weights(folder).items()
    }
    (folder / "tensors.json").write_text(json.dumps(tensors))
    command = [sys.executable, str(TOOL), str(folder), "--tokens", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cells = done.stdout.splitlines()[-1].split("|")[2:-1]
    for cell, kind in zip(cells, (None, 8, 4), strict=True):
        recipe = Recipe() if kind is None else Recipe(parse_type(kind))
        need = memory_need(str(folder), None, "bfloat16", recipe)
        assert cell.strip() == f"{size_text(need.weights_bytes)}: 8 GB"
