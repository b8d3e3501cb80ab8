"""GGUF files as the gguf package writes them, and files that are wrong in every way."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint import gguf as reader
from mlxvlm.checkpoint.ggml import GGMLType
from mlxvlm.checkpoint.gguf import GGUFFile
from mlxvlm.errors import ModelError, UnsupportedModelError, WeightsError
from tests.checkpoint.ggml_twin import SIZES, blocks_of

U32, U64, STRING, ARRAY = 4, 10, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(entries: list[bytes] = (), tensors: list[bytes] = (), data: int = 0, version: int = 3) -> bytes:  # type: ignore[assignment]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32 + data) if data else head


def opened(folder: Path, content: bytes, name: str = "a.gguf") -> GGUFFile:
    path = folder / name
    path.write_bytes(content)
    with GGUFFile(path) as file:
        return file


def plain_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


VALUES = {
    gguf.GGUFValueType.UINT8: st.integers(0, 255),
    gguf.GGUFValueType.INT8: st.integers(-128, 127),
    gguf.GGUFValueType.UINT16: st.integers(0, 65535),
    gguf.GGUFValueType.INT16: st.integers(-32768, 32767),
    gguf.GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    gguf.GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    gguf.GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    gguf.GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    gguf.GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    gguf.GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    gguf.GGUFValueType.BOOL: st.booleans(),
    gguf.GGUFValueType.STRING: st.text(max_size=20),
}
KEYS = st.text(min_size=1, max_size=12).filter(lambda key: not key.startswith(("general.", "split.")))
SCALAR = st.sampled_from(sorted(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), st.just(None), VALUES[kind]))
LIST = st.sampled_from(sorted(VALUES)).flatmap(
    lambda kind: st.tuples(
        st.just(gguf.GGUFValueType.ARRAY), st.just(kind), st.lists(VALUES[kind], min_size=1, max_size=5)
    )
)
SHAPES = st.lists(st.integers(1, 4), max_size=3)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12), st.tuples(st.sampled_from(sorted(SIZES)), SHAPES), max_size=4
)


@settings(max_examples=60, deadline=None)
@given(metadata=st.dictionaries(KEYS, SCALAR | LIST, max_size=6), tensors=TENSORS, power=st.integers(3, 8))
def test_what_the_gguf_package_writes_is_read_back(tmp_path_factory, metadata, tensors, power):
    path = tmp_path_factory.getbasetemp() / "round.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_custom_alignment(1 << power)
    for key, (kind, element, value) in metadata.items():
        writer.add_key_value(key, value, kind, element)
    stored = {}
    for number, (name, (kind, lead)) in enumerate(tensors.items()):
        shape = (*lead, 2 * SIZES[kind][1])
        blocks = blocks_of(GGMLType[kind], 2 * int(np.prod(lead)), number)
        raw_type = {"Q8_1": 0}.get(kind, GGMLType[kind].value)
        stored[name] = (kind, shape, blocks)
        if raw_type:
            writer.add_tensor(name, blocks.reshape(*lead, -1), raw_dtype=gguf.GGMLQuantizationType(raw_type))
        else:  # the gguf package takes its blocks for larger ones
            stored[name] = ("I8", (blocks.size,), blocks)
            writer.add_tensor(name, blocks.view(np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        read = {key: plain_value(value) for key, value in file.metadata.items()}
        own = {"general.architecture": "clip", "general.alignment": 1 << power}
        assert read == own | {key: value for key, (_, _, value) in metadata.items()}
        assert all(type(read[key]) is type(value) for key, (_, _, value) in metadata.items())
        assert {name: (info.kind.name, info.shape) for name, info in file.tensors.items()} == {
            name: (kind, shape) for name, (kind, shape, _) in stored.items()
        }
        for name, (_, _, blocks) in stored.items():
            assert np.array_equal(file.bytes(name), blocks)


def split_files(folder: Path, count: int = 3) -> list[Path]:
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=1)
    writer.add_uint32("answer", 42)
    for number in range(count):
        writer.add_tensor(f"t{number}", np.full((2, 3), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("model-*.gguf"))


def test_any_part_of_a_split_file_opens_all(tmp_path):
    for path in split_files(tmp_path):
        with GGUFFile(path) as file:
            assert file.metadata["answer"] == 42
            assert [info.part for info in file.tensors.values()] == [0, 1, 2]
            for number in range(3):
                assert np.all(file.bytes(f"t{number}").view("<f4") == number)


def test_parts_that_are_missing_or_mixed_up_are_named(tmp_path):
    first, second, third = split_files(tmp_path)
    third.write_bytes(second.read_bytes())
    with pytest.raises(WeightsError, match=r"00003-of-00003.gguf is part 1 by its contents, 2 by its name"):
        GGUFFile(first)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(
        WeightsError, match=r"alone.gguf is one of 3 parts; its name must be as ...-00001-of-00003.gguf"
    ):
        GGUFFile(alone)
    third.unlink()
    with pytest.raises(ModelError, match=r"no file .*model-00003-of-00003.gguf$"):
        GGUFFile(first)
    second.unlink()
    with pytest.raises(ModelError, match=r"no file .*model-00002-of-00003.gguf and 1 more of 3 parts"):
        GGUFFile(first)


def part_of(number: int, total: int, name: str) -> bytes:
    entries = [entry(f"split.{key}", U32, struct.pack("<I", value)) for key, value in (("no", number), ("count", 2))]
    entries.append(entry("split.tensors.count", U32, struct.pack("<I", total)))
    return file_of(entries, [tensor(name)], 32)


def test_counts_of_parts_may_be_missing_or_those_of_a_merged_file(tmp_path):
    merged = entry("split.count", U32, bytes(4))
    assert opened(tmp_path, file_of([merged])).metadata == {"split.count": 0}
    (tmp_path / "a-00002-of-00002.gguf").write_bytes(file_of([], [tensor("b")], 32))
    assert set(opened(tmp_path, file_of([], [tensor("a")], 32), "a-00001-of-00002.gguf").tensors) == {"a", "b"}
    for count in (1, 3):
        with pytest.raises(WeightsError, match=f"is one of {count} parts"):
            opened(tmp_path, file_of([entry("split.count", U32, struct.pack("<I", count))]), "a-00001-of-00002.gguf")


def test_tensors_of_all_parts_are_counted(tmp_path):
    (tmp_path / "a-00002-of-00002.gguf").write_bytes(part_of(1, 3, "b"))
    with pytest.raises(WeightsError, match="have 2 tensors, 3 are announced"):
        opened(tmp_path, part_of(0, 3, "a"), "a-00001-of-00002.gguf")
    with pytest.raises(WeightsError, match="repeats 'b'"):
        opened(tmp_path, part_of(0, 2, "b"), "a-00001-of-00002.gguf")
    assert set(opened(tmp_path, part_of(0, 2, "a"), "a-00001-of-00002.gguf").tensors) == {"a", "b"}


def test_version_2_and_little_things(tmp_path):
    entries = [
        entry("deep", ARRAY, array(ARRAY, 2, array(U32, 1, struct.pack("<I", 7)) + array(STRING, 1, text("x")))),
        entry("empty", ARRAY, array(STRING, 0)),
        entry("broken text", STRING, text(b"a\xff")),
        entry("flag", 7, b"\x02"),
        entry("flags", ARRAY, array(7, 2, b"\x00\x05")),
    ]
    file = opened(tmp_path, file_of(entries, [tensor("scalar", ())], 4, version=2))
    assert file.metadata["deep"][0].tolist() == [7]
    assert file.metadata["deep"][1] == ["x"]
    assert file.metadata["empty"] == []
    assert file.metadata["broken text"] == "a\ufffd"
    assert file.metadata["flag"] is True
    assert file.metadata["flags"].tolist() == [False, True]
    assert file.tensors["scalar"].shape == ()
    assert opened(tmp_path, file_of()).tensors == {}


def nested(depth: int) -> bytes:
    return array(U32, 0) if depth == 0 else array(ARRAY, 1, nested(depth - 1))


HUGE = (1 << 64) - 1
BAD: list[tuple[bytes, str]] = [
    (b"", "is no GGUF file: it is empty"),
    (b"GGUF", "header goes on behind its end"),
    (b"PK\x03\x04" + bytes(60), "is no GGUF file"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (file_of(version=1), "is GGUF version 1; 2 and 3 can be read"),
    (file_of(version=4), "is GGUF version 4"),
    (file_of(version=3 << 24), "is big-endian"),
    (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "header goes on"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "header goes on"),
    (b"GGUF" + struct.pack("<IQQ", 3, 9, 1) + entry("k", 99, bytes(64)), "header goes on"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 99) + entry("k", 99, bytes(64)), "header goes on"),
    (file_of([struct.pack("<Q", HUGE) + b"key"]) + bytes(20), "header goes on"),
    (file_of([entry("k", STRING, struct.pack("<Q", 1 << 40))]), "header goes on"),
    (file_of([entry("k", ARRAY, array(U32, 1 << 62))]), "header goes on"),
    (file_of([entry("k", ARRAY, array(STRING, 1 << 30))]), "header goes on"),
    (file_of([entry("k", ARRAY, array(STRING, 2, text("x") + struct.pack("<Q", HUGE)))]), "header goes on"),
    (file_of([entry("k", ARRAY, array(STRING, 2, text(b"x" * 8)))]), "header goes on"),
    (file_of([entry("k", ARRAY, array(ARRAY, 1 << 40, array(13, 1)))]), "header goes on"),
    (file_of([entry("k", ARRAY, array(13, 1 << 40))]), "no value has the type 13"),
    (file_of([entry("k", 99, bytes(8))]), "no value has the type 99"),
    (file_of([entry("k", ARRAY, nested(4))]), "nested too deeply"),
    (file_of([entry("k", U32, bytes(4))] * 2), "has the key 'k' twice"),
    (file_of([entry(b"\xff", U32, bytes(4))]), "a name is no UTF-8"),
    (file_of([entry("general.alignment", U32, struct.pack("<I", 24))]), "alignment of 24"),
    (file_of([entry("general.alignment", U32, bytes(4))]), "alignment of 0"),
    (file_of([entry("general.alignment", STRING, text("32"))]), "general.alignment is no integer"),
    (file_of([entry("split.count", ARRAY, array(U32, 2, bytes(8)))]), "split.count is no integer"),
    (file_of([entry("split.count", 7, b"\x01")]), "split.count is no integer"),
    (file_of([], [tensor("t")] * 2, 64), "has the tensor 't' twice"),
    (file_of([], [tensor("t", (1,) * 5)], 64), "'t' has 5 dimensions"),
    (file_of([], [tensor("t", (8, 0))], 64), "'t': shape .* holds nothing"),
    (file_of([], [tensor("t", (8,), 12)], 64), "'t': shape .* does not fit Q4K"),
    (file_of([], [tensor("t", (8,), offset=4)], 64), "does not start at a multiple of 32"),
    (file_of([], [tensor("t", (9,))], 32), "is cut off: 't' ends after the file"),
    (file_of([], [tensor("t")], 31), "is cut off: 't' ends after the file"),
    (file_of([], [tensor("t", (HUGE,) * 4)], 32), "is cut off: 't' ends"),
    (file_of([], [tensor("t", offset=1 << 63)], 32), "is cut off: 't' ends"),
    (file_of([], [tensor("a", (9,)), tensor("b", offset=32)], 96), "'a' and 'b' overlap"),
    (file_of([], [tensor("a", (1 << 40,)), tensor("b", offset=32)], 96), "'a' and 'b' overlap"),
]


@pytest.mark.parametrize(
    ("content", "message"), BAD, ids=[f"{number}-{message}" for number, (_, message) in enumerate(BAD)]
)
def test_what_is_wrong_is_said(tmp_path, content, message):
    with pytest.raises(ModelError, match=f"a.gguf:? .*{message}" if "is no integer" not in message else message):
        opened(tmp_path, content)


def test_types_that_can_not_be_read_are_refused_with_their_tensor(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"a.gguf: 't': ggml type IQ2_XXS can't be read"):
        opened(tmp_path, file_of([], [tensor("t", (256,), 16)], 128))


def test_files_that_are_not_there_or_shrink(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file .*none.gguf$"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="there is no file"):
        GGUFFile(tmp_path)
    content = file_of([], [tensor("t")], 32)
    path = tmp_path / "b.gguf"
    path.write_bytes(content)
    with GGUFFile(path) as file:
        path.write_bytes(content[:-1])
        with pytest.raises(WeightsError, match="has become shorter"):
            file.bytes("t")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.bytes("t")


def test_file_systems_without_maps_are_an_error(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(reader.mmap, "mmap", refuse)
    with pytest.raises(ModelError, match=r"a.gguf can't be mapped into memory: .*No such device"):
        opened(tmp_path, SOUND)


def test_a_header_has_a_limit(tmp_path, monkeypatch):
    content = file_of([entry("k", ARRAY, array(0, 1 << 20, bytes(1 << 20)))])
    assert opened(tmp_path, content).metadata["k"].size == 1 << 20
    monkeypatch.setattr(reader, "_HEADER_LIMIT", 1 << 20)
    with pytest.raises(WeightsError, match="header goes on behind 1 MiB"):
        opened(tmp_path, content)


SOUND = file_of(
    [
        entry("general.architecture", STRING, text("llama")),
        entry("general.alignment", U32, struct.pack("<I", 32)),
        entry("tokens", ARRAY, array(STRING, 3, text("a") + text("") + text("ccc"))),
        entry("scores", ARRAY, array(6, 3, bytes(12))),
        entry("deep", ARRAY, nested(3)),
        entry("split.count", 2, struct.pack("<H", 1)),
    ],
    [tensor("t", (32, 2), 8), tensor("u", (4,), 0, 96)],
    112,
)
HEADER = SOUND.index(text("u")) + 40
NUMBERS = st.sampled_from([0, 1, 2, 9, 31, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, HUGE]) | st.integers(
    0, HUGE
)
EDITS = st.lists(st.tuples(st.integers(4, HEADER), st.sampled_from([1, 4, 8]), NUMBERS), min_size=0, max_size=4)


@settings(max_examples=1000, deadline=None)
@given(edits=EDITS, length=st.just(len(SOUND)) | st.integers(0, len(SOUND)), noise=st.binary(max_size=8))
@example(edits=[], length=len(SOUND), noise=b"")
def test_damage_is_an_error_or_harmless(tmp_path_factory, edits, length, noise):
    content = bytearray(SOUND)
    for start, width, number in edits:
        content[start : start + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(content[:length]) + noise)
    problem = None
    tracemalloc.start()
    try:
        with GGUFFile(path) as file:
            for name, info in file.tensors.items():
                assert file.bytes(name).size == info.nbytes <= len(SOUND) + len(noise)
    except ModelError as error:
        problem = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
    if problem is not None:
        assert "damaged.gguf" in problem
        assert "\n" not in problem
        assert edits or length < len(SOUND)
