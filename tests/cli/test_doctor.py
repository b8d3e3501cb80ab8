"""`mlxvlm doctor`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from mlxvlm import __version__
from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.estimate import memory_need
from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.cli import doctor, main
from mlxvlm.cli.options import size_text
from tests.checkpoint.llama_cpp.pairs import MMPROJ, TEXT, Kind, write_pair
from tests.checkpoint.sharing import wide
from tests.checkpoint.test_uqff import samples, write_model
from tests.checkpoint.uqff_models import config_of
from tests.checkpoint.wide import write_wide
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


class TestShards:
    """What each of several Macs needs; that the sizes are right is held in tests/checkpoint/test_share_need.py."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        return str(write_wide(tmp_path / "m", "llama4", config=wide("llama4")))

    def rows(self, capsys: Capture, *argv: str) -> str:
        assert main(["doctor", "--dtype", "float32", *argv]) == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize("flags", [(), ("--isq", "4@32"), ("--kv-bits", "8", "--kv-group-size", "32")])
    def test_sizes_of_each(self, flags: tuple[str, ...], folder: str, capsys: Capture) -> None:
        out = self.rows(capsys, "-m", folder, "--shards", "4", *flags)
        recipe = recipe_of(LoadOptions(isq="4@32" if "--isq" in flags else None))
        need = memory_need(folder, dtype="float32", recipe=recipe)
        first, last = need.share(0, 4), need.share(3, 4)
        for name, each in ("rank 0", first), ("ranks 1 to 3, each at most", last):
            sizes = f"{size_text(each.weights_bytes)}, {size_text(each.loading_bytes)} while loading"
            assert f" {name}: {sizes}; KV cache " in out
        whole, *others = re.findall(r"KV cache +([\d.]+) ([kM])B for 1000 tokens", out)
        sizes = [float(size) * (1000 if unit == "M" else 1) for size, unit in (whole, *others)]
        assert sizes[1:] == [pytest.approx(sizes[0] / 4, abs=10)] * 2
        assert "for weights and KV cache: fits 4 Macs like this one" in out
        assert "8 Macs at most; the KV cache of each shrinks up to 4" in out
        assert "1 Mac like this one has room" in out

    def test_how_many_have_room(self, folder: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        def total(count: int) -> int:
            needs = [memory_need(folder).share(rank, count) for rank in range(count)]
            return max(max(need.loading_bytes, need.weights_bytes + 2048 * need.kv_bytes_per_token) for need in needs)

        totals = [total(count) for count in range(1, 9)]
        assert min(totals) == totals[-1]
        for usable in (*[each + 1 for each in totals], 1000):
            count = next((str(count) for count, each in enumerate(totals, 1) if each < usable), "no number of")
            monkeypatch.setattr(doctor, "_usable_bytes", lambda machine, usable=usable: usable)
            out = self.rows(capsys, "-m", folder, "--shards", "2")
            shortest = re.findall(r"^  \d+ tokens +(.+) Macs? like this one ha(?:ve|s) room", out, re.MULTILINE)[0]
            assert shortest == count

    def test_what_no_group_fits_is_told_of_all(self, tmp_path: Path, capsys: Capture) -> None:
        folder = write_wide(tmp_path / "m", "idefics3", config=wide("idefics3", head_dim=16, intermediate_size=96))
        line = "mlp.down_proj and 1 more, as no group of 4@64 divides 24 inputs"
        for count, times in ((2, 0), (4, 1)):
            assert self.rows(capsys, "-m", str(folder), "--isq", "4@64", "--shards", str(count)).count(line) == times

    def test_without_a_model(self, capsys: Capture) -> None:
        assert main(["doctor", "--shards", "2"]) == 2
        assert "of Macs for -m MODEL" in capsys.readouterr().err

    def test_refusals(self, folder: str, tmp_path: Path, capsys: Capture) -> None:
        uqff, config = tmp_path / "uqff", config_of("qwen2_vl")
        write_model(uqff, config, samples(config, ["q4_0", "afq4"]))
        pair = write_pair(tmp_path / "gguf", GOLDENS / "idefics3_split", Kind.Q8_0)
        for model in (uqff, pair, pair / TEXT):
            assert main(["doctor", "-m", str(model), "--shards", "2"]) == 2
            said = capsys.readouterr()
            assert "GGUF and UQFF files can't be shared by several machines" in said.err
            assert "on disk" not in said.out
        for count, why in (("9", "8 attention heads can't be shared by 9 ranks"), ("0", "--shards is a number from 1")):
            assert main(["doctor", "-m", folder, "--shards", count]) == 2
            assert why in capsys.readouterr().err

    def test_a_misfit_is_not_shared(self, folder: str, capsys: Capture) -> None:
        config = json.loads((Path(folder) / "config.json").read_text())
        config["text_config"]["intermediate_size"] *= 2
        (Path(folder) / "config.json").write_text(json.dumps(config))
        out = self.rows(capsys, "-m", folder, "--shards", "2")
        assert "wrongly shaped" in out
        assert "rank 0" not in out


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
