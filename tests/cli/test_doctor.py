"""`mlxvlm doctor`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from mlxvlm import __version__
from mlxvlm.cli import main
from mlxvlm.cli.options import size_text
from tests.checkpoint.llama_cpp.pairs import MMPROJ, TEXT, Kind, write_pair
from tests.checkpoint.test_uqff import samples, write_model
from tests.checkpoint.uqff_models import config_of
from tests.golden import GOLDENS

Capture = pytest.CaptureFixture[str]


def test_the_machine(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for row in ("mlxvlm", "python", "platform", "mlx", "device", "memory", "hub cache"):
        assert re.search(rf"^{row} +\S", out, re.MULTILINE)
    assert __version__ in out


def test_a_model(capsys: Capture) -> None:
    model = GOLDENS / "idefics3_split"
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert main(["doctor", "-m", str(model), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    weights = re.search(r"^weights +([\d.]+) kB", out, re.MULTILINE)
    assert weights
    # float16 on disk with a small header, float32 in memory
    assert 1.7 * stored < float(weights[1]) * 1e3 < 2 * stored
    assert re.search(r"2048 tokens +[\d.]+ [kMG]B for weights and KV cache: fits", out)


def test_tensors_that_are_not_the_models_are_named(capsys: Capture, tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDENS / "idefics3_split", tmp_path / "model"))
    assert main(["doctor", "-m", str(model)]) == 0
    assert re.search(r"^tensors +\d+, names and shapes are the model's", capsys.readouterr().out, re.MULTILINE)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (model / "config.json").write_text(json.dumps(config))
    assert main(["doctor", "-m", str(model)]) == 0
    assert "gate_proj.weight (32, 32) instead of (64, 32)" in capsys.readouterr().out


def kv_line(capsys: Capture, *flags: str) -> str:
    assert main(["doctor", "-m", "demo", "--dtype", "float32", *flags]) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("KV cache"))


def test_quantised_keys_and_values(capsys: Capture) -> None:
    """512 values a token: keys and values of 2 heads in 4 layers; with a scale and a bias for each 32 of them."""
    assert "2.05 MB for 1000 tokens, 2048" in kv_line(capsys)
    assert "640.0 kB for 1000 tokens in 8 bits" in kv_line(capsys, "--kv-bits", "8", "--kv-group-size", "32")
    assert "384.0 kB for 1000 tokens in 4 bits" in kv_line(capsys, "--kv-bits", "4")
    assert main(["doctor", "-m", str(GOLDENS / "idefics3_split"), "--kv-bits", "4"]) == 4
    assert "heads have 16 values" in capsys.readouterr().err


def test_gguf_and_uqff_files(capsys: Capture, tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "gguf", GOLDENS / "idefics3_split", Kind.Q8_0)
    assert main(["doctor", "-m", str(pair / TEXT), "--mmproj", str(pair / MMPROJ), "--requantize", "none"]) == 0
    out = capsys.readouterr().out
    assert f"{pair / TEXT} (idefics3)" in out
    assert "names and shapes are the model's" in out
    folder, config = tmp_path / "uqff", config_of("qwen2_vl")
    [file, _] = write_model(folder, config, samples(config, ["q4_0", "afq4"]))
    for flags in ([], ["--from-uqff", str(file)]):
        assert main(["doctor", "-m", str(folder), *flags]) == 0
        assert "names and shapes are the model's" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["./nowhere", "not a name"])
def test_a_model_that_is_not_there(name: str, capsys: Capture) -> None:
    assert main(["doctor", "-m", name]) == 4
    assert capsys.readouterr().err.startswith("mlxvlm: error: no such model")


def test_a_folder_that_is_no_model(capsys: Capture, tmp_path: Path) -> None:
    assert main(["doctor", "-m", str(tmp_path)]) == 4
    assert "no model" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "text"), [(512, "0.5 kB"), (2.5e6, "2.50 MB"), (4.49e9, "4.49 GB")])
def test_sizes_read_well(size: float, text: str) -> None:
    assert size_text(size) == text
