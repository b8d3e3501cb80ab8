"""What keeps a share from being loaded, and the cache of each rank's quantised share."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint import isq
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.errors import UsageError, WeightsError
from tests.checkpoint.layouts import write
from tests.checkpoint.sharing import assert_same, built, share_of, silent, tensors_of, wide
from tests.checkpoint.wide import write_wide

Log = pytest.LogCaptureFixture


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("faults")
    return {family: write_wide(root / family, family, config=wide(family)) for family in ("llama4", "mllama")}


class TestErrors:
    @pytest.mark.parametrize("index", range(2))
    def test_too_many_ranks_before_anything_is_read(
        self, index: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TensorFile, "_read", None)
        monkeypatch.setattr(TensorFile, "_read_apart", None)
        with pytest.raises(UsageError, match=r"8 attention heads can't be shared by 9 ranks: use \d at most"):
            built(folders["llama4"], share_of(index, 9), isq="4")

    @pytest.mark.parametrize("index", range(2))
    @pytest.mark.parametrize("spoil", ["missing", "unknown", "wrongly shaped"])
    def test_misfits_are_the_same_for_all(
        self, index: int, spoil: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        """Also where this rank has no part of the tensor: all ranks end alike."""
        weights = read_weights(folders["mllama"])
        name = next(name for name in weights if name.startswith("vision_model.") and "q_proj" in name)
        if spoil == "missing":
            del weights[name]
        elif spoil == "unknown":
            weights["vision_model.more"] = weights[name]
        else:
            weights[name] = weights[name][:-1]
        folder = write(tmp_path / "m", folders["mllama"], weights)
        found = set()
        for share in (None, share_of(index, 2)):
            with pytest.raises(WeightsError, match=f"1 {spoil}: vision_model") as error:
                built(folder, share)
            found.add(str(error.value))
        assert len(found) == 1

    @pytest.mark.parametrize("isq", [None, "4@32"])
    @pytest.mark.parametrize("family", ["llama4", "idefics3"])
    def test_a_file_that_shrinks_meanwhile(self, family: str, isq: str | None, tmp_path: Path) -> None:
        for part in (3, 20):
            folder = write_wide(tmp_path / str(part), family, config=wide(family))
            file = folder / "model.safetensors"

            def shrink(done: int, total: int, file: Path = file, part: int = part) -> None:
                os.truncate(file, min(file.stat().st_size, 40_000 * part))

            with pytest.raises(WeightsError, match=r"can't be read|is damaged or truncated \(\S+ ends too early\)"):
                open_model(str(folder)).build(LoadOptions(isq=isq), shrink, share_of(0, 2))

    def test_a_damaged_file(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = write(tmp_path / "m", folders["mllama"], read_weights(folders["mllama"]))
        os.truncate(folder / "model.safetensors", 300_000)
        found = set()
        for share in (None, share_of(0, 2), share_of(1, 2)):
            with pytest.raises(WeightsError, match="is damaged or truncated") as error:
                built(folder, share)
            found.add(str(error.value))
        assert len(found) == 1

    def test_files_that_are_not_read_in_part(self, folders: dict[str, Path]) -> None:
        source = replace(open_model(str(folders["mllama"])), read=lambda *args: None)  # type: ignore[arg-type, return-value]
        with pytest.raises(UsageError, match="GGUF and UQFF files can't be shared by several machines"):
            source.build(LoadOptions(), silent, share_of(0, 2))


class TestCache:
    def test_each_rank_finds_its_own(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, cache = folders["llama4"], tmp_path / "cache"
        shares = [None, *(share_of(index, count) for count in (2, 4) for index in range(count))]
        first = [tensors_of(built(folder, share, isq="4@32", isq_cache=cache)) for share in shares]
        assert len(list(cache.iterdir())) == len(shares)
        assert not mx.array_equal(*(np.array(first[index]["language_model.lm_head.weight"]) for index in (1, 2)))
        titles = {json.loads(path.read_text())["of"] for path in cache.glob("*/manifest.json")}
        assert f"{folder} --isq 4@32 (rank 3 of 4)" in titles
        monkeypatch.setattr(isq, "quantized", None)
        for share, expected in zip(shares, first, strict=True):
            assert_same(tensors_of(built(folder, share, isq="4@32", isq_cache=cache)), expected)

    def test_a_damaged_entry_is_made_again(self, folders: dict[str, Path], tmp_path: Path, caplog: Log) -> None:
        cache = tmp_path / "cache"
        first = tensors_of(built(folders["llama4"], share_of(1, 2), isq="4@32", isq_cache=cache))
        (file,) = cache.glob("*/model.safetensors")
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size - 100)
            stream.write(b"\xff" * 8)
        assert_same(tensors_of(built(folders["llama4"], share_of(1, 2), isq="4@32", isq_cache=cache)), first)
        assert "is damaged" in caplog.text

    def test_too_many_ranks(self, folders: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="can't be shared by 9 ranks"):
            built(folders["llama4"], share_of(0, 9), isq="4@32", isq_cache=tmp_path)
        assert not list(tmp_path.iterdir())
