"""Blocks in files: a new engine of the same model goes on where the last one ended, whatever happened to the files."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxvlm.engine import block_files
from mlxvlm.engine.block_files import BlockFiles
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVBlock
from mlxvlm.errors import UsageError
from mlxvlm.models.base import KVSpec
from tests.fakes import FakeModel, answer, ask, fake_engine

PLENTY = 1 << 20
IDS = list(range(1, 14))


def block(value: float, size: int = 6, dtype: mx.Dtype = mx.float32) -> KVBlock:
    keys = (mx.arange(size) * 0.37 + value).astype(dtype)
    return KVBlock((keys, -keys))


def same(one: KVBlock | None, other: KVBlock) -> bool:
    pairs = [] if one is None else list(zip(one.parts, other.parts, strict=True))
    return bool(pairs) and all(a.dtype == b.dtype and bool(mx.array_equal(a, b)) for a, b in pairs)


def written(folder: Path, keys: list[bytes], blocks: list[KVBlock], limit: int = PLENTY) -> BlockFiles:
    """What a process leaves, as the next one finds it."""
    files = BlockFiles(folder, limit)
    files.keep(keys, blocks)
    files.close()
    return BlockFiles(folder, limit)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_block_comes_back(tmp_path: Path, dtype: mx.Dtype) -> None:
    kept = block(1, dtype=dtype)
    files = written(tmp_path / "new" / "folder", [b"a"], [kept])
    assert b"a" in files
    assert same(files.read(b"a"), kept)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert mx.array_equal(mx.load(str(path))["values"], kept.parts[1])
    assert files.read(b"b") is None


def packed() -> KVBlock:
    words, scales = mx.arange(8, dtype=mx.uint32) << 28, (mx.arange(2) * 0.37).astype(mx.bfloat16)
    return KVBlock((words, scales, -scales) * 2)


def test_a_packed_block_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To those who read as many bits."""
    files = BlockFiles(tmp_path, PLENTY, 4)
    files.keep([b"a"], [packed()])
    files.close()
    assert same(BlockFiles(tmp_path, PLENTY, 4).read(b"a"), packed())
    assert BlockFiles(tmp_path, PLENTY, 8).read(b"a") is None
    assert "have 4 bits, not 8" in caplog.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: st.DataObject) -> None:
    files = written(tmp_path, [b"a"], [block(1)])
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        changed = bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))])
        path.write_bytes(content[:at] + changed + content[at + 1 :])
    with caplog.at_level(logging.CRITICAL):
        found = files.read(b"a")
    # A change that JSON reads the same, such as in its padding, is none.
    assert same(found, block(1)) or (found is None and not path.exists() and b"a" not in files)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\2" + b"\0" * 7 + b"{}", b"\377" * 99, b"\0\10" + b"\0" * 6])
def test_what_is_no_block_is_none(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    files = written(tmp_path, [b"a"], [block(1)])
    (path,) = tmp_path.iterdir()
    path.write_bytes(content + b"[" * 4096 * (content[:2] == b"\0\10"))
    assert files.read(b"a") is None
    assert "computed anew" in caplog.text
    assert not path.exists()


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in _one_file(tmp_path / "x"))
    limit = 3 * size + 4096  # a file that is being written counts with the largest header
    files = BlockFiles(tmp_path, limit)
    for name in (b"a", b"b", b"c"):
        files.keep([name], [block(1)])
    files.keep([b"d"], [block(1)])
    files.close()
    assert files.nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= limit
    assert [name in files for name in (b"a", b"b", b"c", b"d")] == [False, True, True, True]
    again = BlockFiles(tmp_path, 2 * size)
    assert [name in again for name in (b"b", b"c", b"d")] == [False, True, True]


def _one_file(folder: Path) -> list[Path]:
    written(folder, [b"a"], [block(1)])
    return list(folder.iterdir())


def test_parents_go_last(tmp_path: Path) -> None:
    keys, blocks = [b"a", b"b", b"c"], [block(1)] * 3
    files = BlockFiles(tmp_path, PLENTY)
    files.keep(keys, blocks)
    files.close()
    files = BlockFiles(tmp_path, PLENTY)
    files.keep(keys, blocks)
    files.close()
    for left in (2, 1):
        files = BlockFiles(tmp_path, files.nbytes - 1)
        assert [name in files for name in keys] == [index < left for index in range(3)]


def test_a_block_too_large_is_not_written(tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    assert b"a" not in written(tmp_path, [b"a"], [block(1, 5000)], 20_000)
    assert not list(tmp_path.iterdir())


def test_few_blocks_wait_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the chain's beginning, where a part of it is of use."""
    monkeypatch.setattr(block_files, "_MAX_WAITING", 2)
    files = BlockFiles(tmp_path, PLENTY)
    hold = threading.Event()
    files._writer.submit(hold.wait, 20)
    files.keep([b"a", b"b", b"c"], [block(1)] * 3)
    hold.set()
    files.close()
    assert [name in files for name in (b"a", b"b", b"c")] == [True, True, False]


def test_left_overs_of_a_crash_go(tmp_path: Path) -> None:
    old, new = tmp_path / "61.1.part", tmp_path / "62.2.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    BlockFiles(tmp_path, PLENTY).close()
    assert list(tmp_path.iterdir()) == [new]


def test_a_full_disk_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert b"a" not in written(tmp_path, [b"a"], [block(1)])
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


# The engine.


def filing(folder: Path, model: FakeModel | None = None, **config: Any) -> Engine:
    sizes = {"prefix_cache_bytes": PLENTY, "prefix_block_tokens": 2, "model_id": "fake"}
    return fake_engine(model, **{**sizes, "prefix_cache_dir": folder, **config})


def used_twice(folder: Path, model: FakeModel | None = None, **config: Any) -> None:
    with filing(folder, model, **config) as engine:
        for last in (3, 4):
            assert list(engine.generate(ask([*IDS, last], 3)).token_ids) == answer([*IDS, last], 3)


def test_prefixes_survive_a_restart(tmp_path: Path) -> None:
    used_twice(tmp_path)
    forwards: list[int] = []
    model = FakeModel(on_call=lambda x: forwards.append(x.shape[1]))
    with filing(tmp_path, model) as engine:
        again = engine.generate(ask([*IDS, 5], 3))
        assert list(again.token_ids) == answer([*IDS, 5], 3)
        assert again.usage.cached_tokens == 12
        assert forwards == [1, 1, 1, 1]
        assert engine.stats().prefix_cache.hits == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mlxvlm")]


def test_a_prompt_used_once_is_not_written(tmp_path: Path) -> None:
    with filing(tmp_path) as engine:
        engine.generate(ask(IDS, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [{"model_id": "another"}, {"prefix_block_tokens": 3}, {"kv_bits": 8}, {"kv_bits": 4}])
def test_another_model_takes_nothing(tmp_path: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    narrow = FakeModel(KVSpec(1, 32))
    used_twice(tmp_path, narrow)
    with filing(tmp_path, narrow, **other) as engine:
        assert engine.generate(ask(IDS, 3)).usage.cached_tokens == 0
    assert not caplog.text  # what is another's is not damaged


def test_models_that_share_files_must_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model_id"):
        filing(tmp_path, model_id="")


@pytest.mark.parametrize("memory", [0, 2 * 64, 4 * 64])
def test_little_memory_takes_what_fits(tmp_path: Path, memory: int) -> None:
    used_twice(tmp_path)
    with filing(tmp_path, prefix_cache_bytes=memory) as engine:
        for last in (5, 6):
            again = engine.generate(ask([*IDS, last], 3))
            assert list(again.token_ids) == answer([*IDS, last], 3)
            assert again.usage.cached_tokens == memory // 32


def test_files_that_are_damaged_or_gone_are_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    used_twice(tmp_path)
    # In the order of the chain, as the fake's keys are its ids, which rise.
    paths = sorted(tmp_path.iterdir(), key=lambda path: mx.load(str(path))["keys"].max().item())
    with filing(tmp_path) as engine:
        paths[0].write_bytes(b"broken")
        paths[1].unlink()
        for last in (5, 6):
            assert list(engine.generate(ask([*IDS, last], 3)).token_ids) == answer([*IDS, last], 3)
    shutil.rmtree(tmp_path)
    with filing(tmp_path / "in" / "its" / "place") as engine:
        assert list(engine.generate(ask(IDS, 3)).token_ids) == answer(IDS, 3)
    assert "computed anew" in caplog.text


def test_a_folder_that_vanishes_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with filing(tmp_path / "gone") as engine:
        engine.generate(ask(IDS, 3))
        shutil.rmtree(tmp_path / "gone")
        assert list(engine.generate(ask(IDS, 3)).token_ids) == answer(IDS, 3)
    assert "is not kept" in caplog.text


def test_closing_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = block_files._head
    monkeypatch.setattr(block_files, "_head", lambda *args: time.sleep(0.05) or head(*args))
    used_twice(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 7  # the last one was used in part


def test_running_rows_go_on_between_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used_twice(tmp_path)
    forwards: list[int] = []
    reads: list[int] = []
    read = BlockFiles.read
    monkeypatch.setattr(BlockFiles, "read", lambda *args: reads.append(len(forwards)) or read(*args))
    with filing(tmp_path, FakeModel(on_call=lambda x: forwards.append(x.shape[1]))) as engine:
        running = engine.submit(ask([50], 2000))
        next(iter(running))
        assert engine.generate(ask([*IDS, 5], 3)).usage.cached_tokens == 12
        running.cancel()
    assert len(set(reads)) == len(reads) == 6
