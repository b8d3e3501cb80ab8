"""Weight files: which ones are read, and what is said of damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.weights import read_weights, weight_files
from mlxvlm.errors import ModelError, WeightsError
from tests.checkpoint.layouts import INDEX

TENSORS = {
    "a.weight": mx.arange(32, dtype=mx.float32).reshape(4, 8),
    "b": mx.ones((3,), mx.float16),
    "c.scales": mx.ones((2, 2), mx.uint8),
}


def save(folder: Path, *names: str) -> bytes:
    """Files of one tensor each, named after the file; the bytes of the last."""
    folder.mkdir(exist_ok=True)
    for name in names:
        mx.save_safetensors(str(folder / name), {name: mx.ones((2, 2))})
    return (folder / names[-1]).read_bytes()


def index(folder: Path, *names: Any) -> None:
    weight_map = {f"tensor{number}": name for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def error_of(folder: Path, kind: type[ModelError] = WeightsError) -> str:
    with pytest.raises(ModelError) as caught:
        read_weights(folder)
    assert type(caught.value) is kind
    assert caught.value.exit_code == 4
    text = str(caught.value)
    assert "\n" not in text
    return text


class TestWhichFiles:
    def test_the_shards_of_the_index_and_no_others(self, tmp_path: Path) -> None:
        save(tmp_path, "model-1.safetensors", "model-2.safetensors", "model-old.safetensors")
        index(tmp_path, "model-2.safetensors", "model-1.safetensors", "model-2.safetensors")
        assert set(read_weights(tmp_path)) == {"model-1.safetensors", "model-2.safetensors"}

    def test_all_in_the_folder_without_an_index(self, tmp_path: Path) -> None:
        save(tmp_path, "weights.00.safetensors", "weights.01.safetensors")
        save(tmp_path / "onnx", "model.safetensors")
        assert set(read_weights(tmp_path)) == {"weights.00.safetensors", "weights.01.safetensors"}

    def test_other_runtimes_files_are_ignored(self, tmp_path: Path) -> None:
        save(tmp_path, "consolidated.safetensors", "consolidated.00.safetensors", "model.safetensors")
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
        assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]

    def test_only_consolidated_is_none(self, tmp_path: Path) -> None:
        save(tmp_path, "consolidated.safetensors")
        assert "has no weights (*.safetensors)" in error_of(tmp_path, ModelError)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
    def test_pickle_only(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"pickle")
        assert "PyTorch's pickle format only; safetensors are needed" in error_of(tmp_path, ModelError)

    def test_nothing(self, tmp_path: Path) -> None:
        assert f"{tmp_path} has no weights" in error_of(tmp_path, ModelError)

    def test_missing_shards_are_all_named(self, tmp_path: Path) -> None:
        save(tmp_path, "model-2.safetensors")
        index(tmp_path, *(f"model-{number}.safetensors" for number in (1, 2, 3)))
        assert "lacks 2 of 3 weight files: model-1.safetensors, model-3.safetensors" in error_of(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            {"metadata": {"total_size": 1}},
            {"weight_map": {}},
            {"weight_map": None},
            {"weight_map": ["model.safetensors"]},
            {"weight_map": "model.safetensors"},
        ],
        ids=str,
    )
    def test_index_without_a_weight_map(self, content: Any, tmp_path: Path) -> None:
        save(tmp_path, "model.safetensors")
        (tmp_path / INDEX).write_text(json.dumps(content))
        assert "has no weight_map" in error_of(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"[1]", b"{", b"\xff\xfe", b'"model.safetensors"', b"null", b"[" * 10**5],
        ids=lambda raw: repr(raw[:20]),
    )
    def test_index_that_is_no_json_object(self, content: bytes, tmp_path: Path) -> None:
        save(tmp_path, "model.safetensors")
        (tmp_path / INDEX).write_bytes(content)
        assert INDEX in error_of(tmp_path, ModelError)


OUTSIDE = ["../outside.safetensors", "../../etc/outside.safetensors", "sub/../../outside.safetensors", "ABSOLUTE"]
NO_SHARDS = [
    "sub/model.safetensors",
    "..\\outside.safetensors",
    "*.safetensors",
    "model.npz",
    "model.gguf",
    "model.bin",
]


@pytest.mark.parametrize(
    "name", [*OUTSIDE, *NO_SHARDS, "", ".", "..", "model.safetensors\n", "\0.safetensors", 7, None]
)
def test_an_index_never_leads_out_of_its_folder(name: Any, tmp_path: Path) -> None:
    save(tmp_path, "outside.safetensors")
    folder = tmp_path / "model"
    save(folder, "model.safetensors")
    save(folder / "sub", "model.safetensors")
    name = str(tmp_path / "outside.safetensors") if name == "ABSOLUTE" else name
    index(folder, "model.safetensors", name)
    assert "names files that are no safetensors beside it" in error_of(folder)


class TestDamage:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "model.safetensors"
        mx.save_safetensors(str(path), TENSORS)
        return path

    @pytest.mark.parametrize("length", [0, 3, 8, 40, -1, -100])
    def test_truncated(self, file: Path, length: int) -> None:
        """Nothing, part of the length, no header, part of the header, and two cuts in the data."""
        raw = file.read_bytes()
        file.write_bytes(raw[:length])
        assert f"{file} is damaged or truncated" in error_of(file.parent)

    @pytest.mark.parametrize("raw", [b"garbage" * 100, b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04" + b"\x00" * 60])
    def test_garbage(self, file: Path, raw: bytes) -> None:
        file.write_bytes(raw)
        assert "is damaged or truncated" in error_of(file.parent)

    def test_git_lfs_pointer(self, file: Path) -> None:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")
        text = error_of(file.parent)
        assert str(file) in text
        assert "`git lfs pull`" in text

    def test_the_damaged_one_of_several_is_named(self, file: Path) -> None:
        save(file.parent, "model-2.safetensors")
        (file.parent / "model-2.safetensors").write_bytes(b"")
        assert "model-2.safetensors is damaged" in error_of(file.parent)

    @pytest.mark.parametrize(
        "header",
        [
            b"[]",
            b"7",
            b"{",
            b'{"a":' * 5000,
            b'{"a": 3}',
            b'{"a": {"dtype": "F32", "shape": [4, 4]}}',
            b'{"a": {"dtype": "F64", "shape": [4, 2], "data_offsets": [0, 64]}}',
            b'{"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [64, 128]}}',
            b'{"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [-64, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0]}}',
            b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 64]}}',
            b'{"a": {"dtype": "F32", "shape": [1099511627776, 4], "data_offsets": [0, 64]}}',
            # What mx.load takes without a word: cut to 32 bits, negative, no integers, bytes used twice or not at all.
            b'{"a": {"dtype": "F32", "shape": [4294967297, 16], "data_offsets": [0, 64]}}',
            b'{"a": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}}',
            b'{"a": {"dtype": "F32", "shape": [4.5, 4], "data_offsets": [0, 64]}}',
            b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},'
            b'"b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}',
            b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}',
            b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}',
            b'{"a": {"dtype": 7, "shape": [4, 4], "data_offsets": [0, 64]}}',
            b'{"\xff": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}',
        ],
        ids=lambda header: repr(header[:70]),
    )
    def test_header_that_lies(self, file: Path, header: bytes) -> None:
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
        assert "is damaged or truncated" in error_of(file.parent)

    def test_dimensions_beyond_mlx(self, file: Path) -> None:
        """Of an empty tensor, which fits any file."""
        header = b'{"a": {"dtype": "F32", "shape": [4294967296, 0], "data_offsets": [0, 0]}}'
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        assert "a has the shape [4294967296, 0]" in error_of(file.parent)

    @pytest.mark.parametrize(
        "dtype", [mx.bool_, mx.uint16, mx.uint64, mx.int64, mx.complex64, mx.int8, mx.bfloat16], ids=str
    )
    def test_types_of_mlx(self, file: Path, dtype: mx.Dtype) -> None:
        array = mx.array([0, 1, 1]).astype(dtype)
        mx.save_safetensors(str(file), {"a": array})
        assert mx.array_equal(read_weights(file.parent)["a"], array)
        read = TensorFile(file).read("a").mlx()
        assert (read.dtype, read.tolist()) == (dtype, array.tolist())

    def test_a_folder_named_like_a_file(self, file: Path) -> None:
        file.unlink()
        file.mkdir()
        assert f"{file} can't be read: Is a directory" in error_of(file.parent)

    def test_a_link_to_nothing(self, file: Path) -> None:
        """What is left in the hub's cache when its blobs were deleted."""
        file.unlink()
        file.symlink_to(file.parent / "blob")
        assert f"{file} can't be read: No such file" in error_of(file.parent)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 400),
)
@example(flips=[(7, 255)], cut=None)
def test_no_bytes_give_anything_but_tensors_or_our_error(
    flips: list[tuple[int, int]], cut: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), TENSORS)
    raw = bytearray(file.read_bytes())
    for place, value in flips:
        raw[place % len(raw)] = value
    file.write_bytes(raw[:cut])
    try:
        weights = read_weights(tmp_path)
    except WeightsError:
        return
    mx.eval(weights)
    assert sum(array.nbytes for array in weights.values()) <= len(raw)
