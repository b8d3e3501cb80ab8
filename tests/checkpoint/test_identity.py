"""A model's identity: the same for the same weights loaded alike, another for all else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mlxvlm.checkpoint.load import LoadOptions, open_model
from tests.checkpoint.llama_cpp.pairs import MMPROJ, TEXT, write_pair
from tests.golden import GOLDENS

MODEL = GOLDENS / "idefics3_split"


def identity(folder: Path, options: LoadOptions | None = None) -> str:
    return open_model(str(folder)).identity(options or LoadOptions())


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(MODEL, tmp_path / "copy"))
    assert identity(copy) == identity(MODEL) == identity(MODEL, LoadOptions(isq_cache=tmp_path))
    assert len(identity(MODEL)) == 32


@pytest.mark.parametrize(
    "options",
    [LoadOptions("bfloat16"), LoadOptions(isq=8), LoadOptions(isq=8, isq_tower=True), LoadOptions(requantize="none")],
)
def test_other_options_make_another_model(options: LoadOptions) -> None:
    assert identity(MODEL, options) != identity(MODEL)


def test_other_files_make_another_model(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(MODEL, tmp_path / "copy"))
    weights = sorted(copy.glob("*.safetensors"))[0]
    data, status = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identity(copy) != identity(MODEL)
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert identity(copy) == identity(MODEL)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"model_type"', '"note": 1, "model_type"', 1))
    assert identity(copy) != identity(MODEL)


def test_gguf_files_make_one_too(tmp_path: Path) -> None:
    folder = write_pair(tmp_path, GOLDENS / "qwen2_vl_tied")
    text, both = open_model(str(folder / TEXT)), open_model(str(folder))
    assert (text.files, both.files) == ((folder / TEXT,), (folder / TEXT, folder / MMPROJ))
    before = both.identity(LoadOptions())
    assert text.identity(LoadOptions()) != before
    (folder / MMPROJ).touch()
    assert both.identity(LoadOptions()) != before
