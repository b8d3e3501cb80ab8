"""Parts of stored tensors against NumPy's slices, and files that change under the reader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.errors import WeightsError


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> tuple[TensorFile, Mapping[str, np.ndarray]]:
    """Tensors of several types and ranks, none but the first aligned."""
    arrays: dict[str, np.ndarray] = {"odd": np.arange(3, dtype=np.uint8)}
    for kind in (np.uint8, np.float16, np.uint32, np.float32):
        for shape in ((7,), (5, 8), (3, 4, 6)):
            name = f"{np.dtype(kind).name}_{len(shape)}"
            arrays[name] = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    path = tmp_path_factory.mktemp("numbers") / "a.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(array) for name, array in arrays.items()})
    return TensorFile(path), arrays


@pytest.mark.parametrize("ranges", [{}, {0: [range(3, 5)]}, {1: [range(2)]}, {1: [range(2), range(5, 8)]}])
@pytest.mark.parametrize("fault", ["shorter", "gone"])
def test_files_that_change_under_the_reader(ranges: Mapping[int, Any], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((5, 8))})
    file = TensorFile(path)
    file.read_part("a", ranges)
    if fault == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    expected = "can't be read: No such file" if fault == "gone" else r"is damaged or truncated \(a ends too early\)"
    with pytest.raises(WeightsError, match=expected):
        file.read_part("a", ranges)


@given(st.data())
def test_parts_are_slices(numbers: tuple[TensorFile, Mapping[str, np.ndarray]], data: st.DataObject) -> None:
    file, arrays = numbers
    name = data.draw(st.sampled_from(sorted(arrays)))
    expected, ranges = arrays[name], {}
    for axis in data.draw(st.sets(st.sampled_from(range(expected.ndim)))):
        size = expected.shape[axis]
        borders = sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=6)))
        pieces = [range(start, stop) for start, stop in zip(borders[::2], borders[1::2], strict=False)]
        ranges[axis] = pieces
        expected = np.take(expected, [place for piece in pieces for place in piece], axis)
    before = file.bytes_read
    found = file.read_part(name, ranges)
    assert found.shape == expected.shape
    assert np.array_equal(found.bits, expected)
    assert file.bytes_read - before == expected.nbytes
