"""The cache of quantised models: hits, keys, damage, limits, and faults while writing."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxvlm.checkpoint import isq, isq_cache
from mlxvlm.checkpoint.isq import AS_IT_IS
from mlxvlm.checkpoint.isq_cache import ISQCache, entry_key
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.errors import EngineClosedError
from tests.checkpoint.wide import write_wide

Log = pytest.LogCaptureFixture
Tensors = dict[str, mx.array]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_wide(tmp_path / "source", "llama4")


def loaded(folder: Path, cache: Path | None, isq: str | None = "4@32", **options: Any) -> Tensors:
    model = open_model(str(folder)).build(LoadOptions(isq=isq, isq_cache=cache, **options), lambda done, total: None)
    return dict(tree_flatten(model.parameters()))


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and mx.array_equal(found[name], array).item()
        for name, array in expected.items()
    )


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def no_quantising(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isq, "quantized", None)


def test_the_second_load_reads_what_the_first_one_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "deep"
    first = loaded(source, cache)
    assert same(first, loaded(source, None))
    no_quantising(monkeypatch)
    assert same(loaded(source, cache), first)
    assert len(entries(cache)) == 1


def test_entries_of_everything_that_matters_are_apart(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    topology = tmp_path / "t.yaml"
    topology.write_text("0: {isq: none}")
    variants: list[dict[str, Any]] = [
        {},
        {"isq": "8@32"},
        {"isq_tower": True},
        {"topology": topology},
        {"dtype": "float16"},
    ]
    for number, options in enumerate(variants):
        assert same(loaded(source, cache, **options), loaded(source, None, **options))
        assert len(entries(cache)) == number + 1
    topology.write_text("1: {isq: none}")
    assert same(loaded(source, cache, topology=topology), loaded(source, None, topology=topology))
    assert len(entries(cache)) == len(variants) + 1


def test_a_key_is_of_the_file_the_config_and_what_computes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, config = source / "model.safetensors", {"rms_norm_eps": 1e-5}
    copy = Path(shutil.copy2(file, source / "other.safetensors"))

    def key(path: Path = file, config: dict[str, Any] = config) -> str:
        return entry_key([path], config, AS_IT_IS, mx.float32)

    keys = [key(), key(copy), key(config={"rms_norm_eps": 1e-6})]
    monkeypatch.setattr(isq_cache, "version", lambda package: "9.9")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_long_patterns_are_told_apart(source: Path, tmp_path: Path) -> None:
    """Also where they differ after as many characters as Python shows of them."""
    cache, topology = tmp_path / "cache", tmp_path / "t.yaml"
    long = "|".join(f"no_layer_{number}" for number in range(60))
    for tail in ("q_proj", "mlp|feed_forward.shared"):
        topology.write_text(f"'/{long}|{tail}/': {{isq: 4@32}}")
        options: dict[str, Any] = {"isq": None, "topology": topology}
        assert same(loaded(source, cache, **options), loaded(source, None, **options))
    assert len(entries(cache)) == 2


def test_a_cache_that_can_only_be_read_serves(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    cache = tmp_path / "cache"
    expected = loaded(source, cache)
    monkeypatch.setattr(Path, "touch", refuse)
    no_quantising(monkeypatch)
    assert same(loaded(source, cache), expected)


def test_drafts_of_killed_processes_go(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, age in ((".old.abc", 7200), (".new.abc", 0)):
        (cache / name).mkdir(parents=True)
        (cache / name / "0.safetensors").write_bytes(b"half")
        moment = time.time() - age
        os.utime(cache / name, (moment, moment))
    loaded(source, cache)
    assert {path.name for path in cache.iterdir() if path.name.startswith(".")} == {".new.abc"}


@pytest.mark.parametrize("text", ["0: {isq: none}", "'/nothing/': {isq: 4@32}", "999: {isq: 4@32}"])
def test_what_changes_nothing_is_told_and_not_kept(text: str, source: Path, tmp_path: Path, caplog: Log) -> None:
    cache, topology = tmp_path / "cache", tmp_path / "t.yaml"
    topology.write_text(text)
    plain = loaded(source, cache, isq=None, topology=topology)
    assert not any(name.endswith(".scales") for name in plain)
    assert "nothing is quantised" in caplog.text
    assert not cache.exists()


def test_an_interruption_while_writing_ends_the_load(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if seen.count(done) > 3 and done == total:
            raise EngineClosedError("loading was interrupted")

    cache = tmp_path / "cache"
    with pytest.raises(EngineClosedError):
        open_model(str(source)).build(LoadOptions(isq="4@32", isq_cache=cache), stop)
    assert not entries(cache)


def test_other_weights_are_another_entry(source: Path, tmp_path: Path) -> None:
    """Also where a file has the same name, size and header."""
    cache = tmp_path / "cache"
    loaded(source, cache)
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    status = file.stat()
    data[-3] ^= 1
    file.write_bytes(data)
    assert same(loaded(source, cache), loaded(source, None))
    assert len(entries(cache)) == 2
    # The same time too: the contents still tell.
    data[len(data) * 8 // 16] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    loaded(source, cache)
    assert len(entries(cache)) == 3


def damage(entry: Path, kind: str) -> None:
    weights, manifest = entry / "model.safetensors", entry / "manifest.json"
    if kind == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 4
        weights.write_bytes(data)
    elif kind == "cut":
        os.truncate(weights, weights.stat().st_size - 1)
    elif kind == "gone":
        weights.unlink()
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "no files":
        manifest.write_text('{"files": {}}')
    else:
        manifest.write_text(kind)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("flipped", "model.safetensors has other contents than were written"),
        ("cut", "model.safetensors has .* bytes instead of"),
        ("gone", "model.safetensors: No such file"),
        ("no manifest", "manifest.json: No such file"),
        ("no files", "manifest.json names no files"),
        ("{", "manifest.json makes no sense"),
        ("[]", "manifest.json makes no sense"),
        ('{"files": {"model.safetensors": 3}}', "manifest.json makes no sense"),
        ('{"files": []}', "manifest.json makes no sense"),
        ('{"files": {"model.safetensors": {"bytes": 1e999, "crc32": 1}}}', "manifest.json makes no sense"),
        ("[" * 100_000, "manifest.json makes no sense"),
    ],
    ids=lambda value: value[:40],
)
def test_a_damaged_entry_is_named_dropped_and_made_again(
    kind: str, problem: str, source: Path, tmp_path: Path, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    expected = loaded(source, cache)
    (entry,) = entries(cache)
    damage(entry, kind)
    caplog.clear()
    assert same(loaded(source, cache), expected)
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(entry) in line
    assert "dropped, and made again" in line
    assert re.search(problem, line)
    no_quantising(monkeypatch)
    assert same(loaded(source, cache), expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_any_flipped_bits_are_found(place: float, value: int, tmp_path: Path) -> None:
    cache = ISQCache(tmp_path / "cache")
    key = f"{place}-{value}".replace("/", "")
    array = mx.arange(64)
    cache.store(key, [("a", array)], array.nbytes)
    entry = cache.find(key)
    assert entry is not None
    file = entry / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= value
    file.write_bytes(data)
    assert cache.find(key) is None
    assert not entry.exists()


class TestLimits:
    ARRAY = mx.zeros((1000,))

    def store(self, cache: ISQCache, key: str, age: int) -> None:
        cache.store(key, [("a", self.ARRAY)], self.ARRAY.nbytes)
        entry = cache.find(key)
        assert entry is not None
        os.utime(entry / "manifest.json", (1e9 - age, 1e9 - age))

    def test_least_recently_used_goes_first(self, tmp_path: Path) -> None:
        cache = ISQCache(tmp_path, limit_bytes=14_000)
        for age, key in enumerate("abc"):
            self.store(cache, key, 100 - age)
        assert cache.find("a") is not None, "and is now the youngest"
        cache.store("d", [("a", self.ARRAY)], self.ARRAY.nbytes)
        assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "d"}

    def test_what_is_larger_than_the_limit_is_not_kept(self, tmp_path: Path, caplog: Log) -> None:
        ISQCache(tmp_path, limit_bytes=3999).store("a", [("a", self.ARRAY)], self.ARRAY.nbytes)
        assert not list(tmp_path.iterdir())
        assert "is not cached: it has 4000 bytes" in caplog.text

    def test_a_full_disk_is_left_alone(self, tmp_path: Path, caplog: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        class Usage:
            free = 3999

        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
        ISQCache(tmp_path).store("a", [("a", self.ARRAY)], self.ARRAY.nbytes)
        assert "and 3999 are free" in caplog.text
        assert not list(tmp_path.iterdir())


def test_a_folder_that_cant_be_written_costs_nothing(source: Path, tmp_path: Path, caplog: Log) -> None:
    (tmp_path / "file").write_text("")
    assert same(loaded(source, tmp_path / "file" / "cache"), loaded(source, None))
    assert "the quantised model is not cached" in caplog.text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_faults_while_writing_leave_nothing_behind(
    error: Exception, source: Path, tmp_path: Path, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[0]).write_bytes(b"half")
        raise error

    monkeypatch.setattr("mlx.core.save_safetensors", fail)
    cache = tmp_path / "cache"
    assert loaded(source, cache)
    assert "is not cached" in caplog.text
    assert not entries(cache)


def test_an_interrupted_load_keeps_nothing(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise EngineClosedError("loading was interrupted")

    cache = tmp_path / "cache"
    with pytest.raises(EngineClosedError):
        open_model(str(source)).build(LoadOptions(isq="4@32", isq_cache=cache), stop)
    assert not cache.exists()


def test_the_manifest_says_what_is_there(source: Path, tmp_path: Path) -> None:
    loaded(source, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    files = json.loads((entry / "manifest.json").read_text())["files"]
    assert files.keys() == {"model.safetensors"}
    assert {path.name for path in entry.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "model.safetensors.index.json",
    }
