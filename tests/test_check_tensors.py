"""tools/check_tensors.py accepts a checkpoint's own tensors, whatever wrote it, and names what is wrong with others."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.checkpoint.weights import read_weights
from tests.golden import GOLDENS, Case

TOOL = Path(__file__).parent.parent / "tools" / "check_tensors.py"
NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_tensors", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(array.shape), "dtype": NAMES[array.dtype]} for name, array in read_weights(folder).items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_goldens_fit(case: Case, tool: ModuleType) -> None:
    tensors = listed(case.folder)
    assert tool.verdict(config_of(case.folder), tensors) == ""
    assert tool.num_values(tensors) == sum(array.size for array in read_weights(case.folder).values())


@pytest.mark.parametrize("name", ["idefics3_split", "llama4_norms", "llava_clip", "mllama_tiles", "qwen2_vl_tied"])
def test_what_is_wrong_is_named(name: str, tool: ModuleType) -> None:
    folder = GOLDENS / name
    config, tensors = config_of(folder), listed(folder)
    chosen = next(
        name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in name
    )
    lost = {name: entry for name, entry in tensors.items() if name != chosen}
    assert chosen in tool.verdict(config, lost)
    assert "adapter.weight" in tool.verdict(config, {**tensors, "adapter.weight": {"shape": [3], "dtype": "F32"}})
    rows, columns = tensors[chosen]["shape"]
    turned = {**tensors, chosen: {"shape": [columns + 1, rows], "dtype": "F32"}}
    assert chosen in tool.verdict(config, turned)


def test_a_line_a_list(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = GOLDENS / "mllama_tiles" / "config.json", listed(GOLDENS / "mllama_tiles")
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(tensors))
    bad.write_text(json.dumps({**tensors, "adapter.weight": {"shape": [3], "dtype": "F32"}}))
    monkeypatch.setattr(sys, "argv", ["check_tensors", str(config), str(good)])
    assert tool.main() == 0
    values = sum(math.prod(entry["shape"]) for entry in tensors.values())
    assert capsys.readouterr().out == f"{good}: {len(tensors)} tensors, {values:,} values, all in their places\n"
    monkeypatch.setattr(sys, "argv", ["check_tensors", str(config), str(good), str(bad)])
    assert tool.main() == 1
    assert "adapter.weight" in capsys.readouterr().out
