"""Whole checkpoint folders of the four formats, damaged in every way: they load, or one clear line says why not.

Nothing else is allowed: no other exception, no crash, no hang, no allocation beyond a few times the files.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.quantize import quantize_folder, quantize_uqff
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.checkpoint.write import write_shards
from mlxvlm.errors import MlxvlmError
from tests.checkpoint.llama_cpp.pairs import write_pair
from tests.checkpoint.wide import CASES, write_wide
from tests.golden import GOLDENS

ROOM = 96 << 20  # of address space, far above what the largest sound folder takes
HANG = timedelta(seconds=20)
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 31, 33, 2**16, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**400,
    -(2**31), 0.5, 1e30, float("nan"), float("inf"), "", "x", "4", "\n", "../x", [], [-1], [2**40, 2**40], [[]], ["x"],
    {}, {"a": 1}, {"bits": 3},
]  # fmt: skip
WORDS = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
GGUF_CASES = ("smolvlm2_tied", "qwen2_vl_tied", "llava_clip", "llama4_norms")


def silent(done: int, total: int) -> None:
    pass


def write_hub(folder: Path, family: str) -> Path:
    """Two shards or more, and their index."""
    write_wide(folder, family)
    tensors = read_weights(folder)
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors.items(), 300_000)
    return folder


def write_mlx(folder: Path, family: str) -> Path:
    source = write_wide(folder.with_name("source"), family)
    quantize_folder(str(source), folder, recipe_of(LoadOptions(isq="4@32")), "auto", silent)
    return folder


def write_uqff(folder: Path, family: str) -> Path:
    source = write_wide(folder.with_name("source"), family)
    quantize_uqff(str(source), folder, recipe_of(LoadOptions(isq="4@32")), "auto", silent)
    return folder


def write_gguf(folder: Path, case: str) -> Path:
    return write_pair(folder, GOLDENS / case)


FORMATS: dict[str, tuple[Callable[[Path, str], Path], tuple[str, ...], int]] = {
    "safetensors": (write_hub, tuple(CASES), 100),
    "mlx": (write_mlx, tuple(CASES), 100),
    "uqff": (write_uqff, tuple(CASES), 100),
    "gguf": (write_gguf, GGUF_CASES, 150),
}
SOURCES = [(kind, name) for kind, (_, names, _) in FORMATS.items() for name in names]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands in a JSON document, the document itself too."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def odd_json(data: st.DataObject, raw: bytes) -> bytes:
    """One value, or key's value, that makes no sense; or a neighbour's."""
    document = json.loads(raw)
    path = data.draw(st.sampled_from(list(places(document))[1:]))
    if data.draw(st.integers(0, 7)) == 0:
        owner = document
        for key in path[:-1]:
            owner = owner[key]
        del owner[path[-1]]
        return json.dumps(document).encode()
    return json.dumps(changed(document, path, data.draw(st.sampled_from(ODD)))).encode()


def odd_header(data: st.DataObject, raw: bytes) -> bytes:
    """As odd_json, inside a safetensors container."""
    length = int.from_bytes(raw[:8], "little")
    header = odd_json(data, raw[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def cut(data: st.DataObject, raw: bytes) -> bytes:
    return raw[: data.draw(st.integers(0, len(raw) - 1) | st.integers(0, min(4096, len(raw) - 1)))]


def overwritten(data: st.DataObject, raw: bytes) -> bytes:
    """Words of any size at any place, the header's more often."""
    copy = bytearray(raw)
    where = st.integers(0, len(raw) - 1) | st.integers(0, min(len(raw), 8192) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        place, size = data.draw(where), data.draw(st.sampled_from([1, 4, 8]))
        word = data.draw(st.sampled_from(WORDS) | st.integers(0, 255)) % 256**size
        copy[place : place + size] = word.to_bytes(size, "little")
    return bytes(copy[: len(raw)])


def nested(data: st.DataObject, raw: bytes) -> bytes:
    """Far deeper than any parser follows."""
    return data.draw(st.sampled_from([b"[", b'{"a":'])) * 100_000


def damaged(data: st.DataObject, path: Path, raw: bytes) -> bytes:
    ways = [cut, overwritten]
    if path.suffix == ".json":
        ways += [*[odd_json] * 8, nested]
    elif path.suffix in (".safetensors", ".uqff"):
        ways += [odd_header] * 2
    return data.draw(st.sampled_from(ways))(data, raw)


def chosen(data: st.DataObject, files: list[Path]) -> Path:
    """Weights half of the time, the config and the index often."""
    weights = [path for path in files if path.suffix in (".safetensors", ".uqff", ".gguf")]
    configs = [path for path in files if path.name in ("config.json", "model.safetensors.index.json")]
    return data.draw(st.sampled_from(data.draw(st.sampled_from([weights, weights, configs or weights, files]))))


@contextmanager
def little_room() -> Iterator[None]:
    """Allocations of more than ROOM fail, where the system can do that."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def loads(folder: Path, isq: str | None) -> None:
    """It does, or it raises our own error with one line."""
    problem = "none"
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        with little_room():
            open_model(str(folder)).build(LoadOptions(isq=isq), silent)
    except MlxvlmError as error:
        problem = str(error)
    assert len(problem.splitlines()) == 1
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert mx.get_peak_memory() - before <= 8 * size + (1 << 20)


@pytest.fixture(scope="module", params=SOURCES, ids="-".join)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    kind, name = request.param
    folder = FORMATS[kind][0](tmp_path_factory.mktemp("sound") / kind, name)
    for path in folder.iterdir():  # what loading never opens
        if path.name in ("README.md", "golden.json"):
            path.unlink()
    for isq in (None, "4@32"):
        open_model(str(folder)).build(LoadOptions(isq=isq), silent)
    return kind, folder


def test_damage_is_named_or_does_no_harm(sound: tuple[str, Path]) -> None:
    kind, folder = sound
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    @settings(max_examples=FORMATS[kind][2], deadline=HANG, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        path = chosen(data, list(files))
        path.write_bytes(damaged(data, path, files[path]))
        try:
            loads(folder, data.draw(st.sampled_from([None, "4@32"])))
        finally:
            path.write_bytes(files[path])

    check()


def test_no_room_is_noticed() -> None:
    """What the others rely on."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no limit on address space here")
    with little_room(), pytest.raises(MemoryError):
        np.ones(2 * ROOM, np.uint8)


def test_a_damaged_manifest_of_the_cache_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "mlxvlm")  # a line for each
    folder = write_wide(tmp_path / "model", "smolvlm")
    options = LoadOptions(isq="4@32", isq_cache=tmp_path / "cache")

    def parameters() -> dict[str, mx.array]:
        with little_room():
            return dict(tree_flatten(open_model(str(folder)).build(options, silent).parameters()))

    expected = parameters()
    (manifest,) = options.isq_cache.glob("*/manifest.json")
    raw = manifest.read_bytes()

    @settings(max_examples=100, deadline=HANG, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        manifest.write_bytes(damaged(data, manifest, raw))
        found = parameters()
        assert all(mx.array_equal(found[name], array) for name, array in expected.items())

    check()
