"""Grouped rows against rows kept apart, each with its own plain attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine import device, kv_cache, kv_layout
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass, capacity_for, length_class
from mlxvlm.errors import ModelError
from mlxvlm.models.base import KVSpec

HEADS, DIM = 4, 32  # the smallest group that can be quantised


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few tokens already grow, change class and share groups."""
    monkeypatch.setattr(kv_cache, "_STEP", 4)
    monkeypatch.setattr(kv_cache, "_SHORT", 8)


class PlainRow:
    """The slow twin: one row's keys and values in full, attention by the book."""

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.keys = np.zeros((spec.num_kv_heads, 0, DIM))
        self.values = np.zeros((spec.num_kv_heads, 0, DIM))

    def attend(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[H, L, Dh], [K, L, Dh] -> [H, L, Dh]."""
        first = self.keys.shape[1]
        self.keys = np.concatenate([self.keys, self.rounded(keys)], axis=1)
        self.values = np.concatenate([self.values, self.rounded(values)], axis=1)
        out = np.zeros_like(queries)
        for head in range(HEADS):
            kv = head * self.spec.num_kv_heads // HEADS
            for step in range(queries.shape[1]):
                position = first + step
                seen = [p for p in range(position + 1) if self.sees(position, p)]
                scores = self.keys[kv, seen] @ queries[head, step] * DIM**-0.5
                weights = np.exp(scores - scores.max())
                out[head, step] = weights / weights.sum() @ self.values[kv, seen]
        return out

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """What quantisation leaves of fresh keys or values."""
        spec = self.spec
        if spec.bits is None:
            return array
        packed = mx.quantize(mx.array(array), group_size=spec.group_size, bits=spec.bits)
        return np.array(mx.dequantize(*packed, group_size=spec.group_size, bits=spec.bits))

    def sees(self, query: int, key: int) -> bool:
        spec = self.spec
        in_window = spec.window is None or key > query - spec.window
        return in_window and (spec.chunk is None or key // spec.chunk == query // spec.chunk)


class Pair:
    """A KVBatch and the plain rows it must equal."""

    def __init__(self, specs: list[KVSpec], seed: int) -> None:
        self.specs = specs
        self.batch = KVBatch()
        self.plain: dict[int, list[PlainRow]] = {}
        self.random = np.random.default_rng(seed)

    def draw(self, spec: KVSpec, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shapes = ((HEADS, new, DIM), (spec.num_kv_heads, new, DIM), (spec.num_kv_heads, new, DIM))
        q, k, v = (self.random.standard_normal(shape).astype(np.float32) for shape in shapes)
        return q, k, v

    def forward(self, step: KVPass, owners: list[int], new: int) -> None:
        for layer, spec in enumerate(self.specs):
            rows = [self.draw(spec, new) for _ in owners]
            q, k, v = (mx.array(np.stack(parts)) for parts in zip(*rows, strict=True))
            ours = np.array(step.layers[layer].attend(q, k, v, DIM**-0.5))
            for i, owner in enumerate(owners):
                assert np.abs(ours[i] - self.plain[owner][layer].attend(*rows[i])).max() < 1e-5
        step.commit()

    def join(self, owner: int, chunks: list[int]) -> None:
        row = KVGroup.single(self.specs, owner)
        self.plain[owner] = [PlainRow(spec) for spec in self.specs]
        for chunk in chunks:
            self.forward(KVPass([row], chunk), [owner], chunk)
        self.batch.join(row)

    def decode(self) -> None:
        if self.batch.groups:
            step = self.batch.forward()
            self.forward(step, self.batch.owners, 1)

    def remove(self, owner: int) -> None:
        self.batch.remove(owner)
        del self.plain[owner]

    def check(self) -> None:
        assert sorted(self.batch.owners) == sorted(self.plain)
        for group in self.batch.groups:
            assert len(group.owners) == len(group.lengths)
            for owner, length in zip(group.owners, group.lengths, strict=True):
                assert length == self.plain[owner][0].keys.shape[1]


UNQUANTISED = {
    "full": [KVSpec(2, DIM)] * 2,
    "window": [KVSpec(1, DIM, window=5)],
    "chunk": [KVSpec(4, DIM, chunk=6), KVSpec(4, DIM)],
}
SPECS = UNQUANTISED | {
    f"{name}-{bits}-bits": [replace(spec, bits=bits, group_size=DIM) for spec in specs]
    for bits in (8, 4)
    for name, specs in UNQUANTISED.items()
}
LAYOUTS = pytest.mark.parametrize("bits", [None, 8, 4])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.lists(st.integers(1, 9), max_size=3)),
        st.tuples(st.just("decode"), st.integers(1, 6)),
        st.tuples(st.just("remove"), st.integers(0, 9)),
    ),
    max_size=14,
)


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS.keys())
@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 1000))
def test_rows_that_come_and_go_equal_rows_alone(
    specs: list[KVSpec], operations: list[tuple[str, Any]], seed: int
) -> None:
    pair = Pair(specs, seed)
    for count, (name, value) in enumerate(operations):
        if name == "join":
            pair.join(count, value)
        elif name == "remove" and pair.plain:
            pair.remove(list(pair.plain)[value % len(pair.plain)])
        elif name == "decode":
            for _ in range(value):
                pair.decode()
        pair.check()


def test_a_row_that_outgrows_its_group_leaves_it() -> None:
    pair = Pair([KVSpec(2, DIM)], 0)
    pair.join(0, [7])
    pair.join(1, [2])
    assert len(pair.batch.groups) == 1
    for _ in range(4):
        pair.decode()
    assert sorted(group.owners for group in pair.batch.groups) == [[0], [1]]
    pair.remove(0)
    pair.decode()
    assert pair.batch.owners == [1]


@LAYOUTS
def test_a_row_that_leaves_keeps_no_other_row_alive(bits: int | None) -> None:
    specs = [KVSpec(256, 64, bits=bits)]  # MLX lets a small array keep a buffer 16 kB larger than itself
    batch = KVBatch()
    for owner in range(4):
        batch.join(filled(specs, owner, 7))
    mx.eval(batch.groups[0].arrays)
    before, held = mx.get_active_memory(), batch.nbytes
    row = batch.groups[0].take(2)
    batch.groups.clear()
    assert before - mx.get_active_memory() > held - 2 * row.nbytes


@LAYOUTS
@pytest.mark.parametrize("joins", [True, False])
def test_a_row_of_nan_leaves_nothing_behind(bits: int | None, joins: bool) -> None:
    """Neither to a row that moves into its slot, nor to one that joins there."""
    specs, batch = [KVSpec(1, DIM, bits=bits, group_size=DIM)], KVBatch()
    # All of one class, the longest of which makes the others attend over padding.
    lengths = [(0, 7, 1.0), (1, 6, mx.nan)] if joins else [(0, 6, mx.nan), (1, 7, 1.0), (2, 2, 1.0)]
    for owner, length, value in lengths:
        batch.join(filled(specs, owner, length, value))
    batch.remove(1 if joins else 0)
    if joins:
        batch.join(filled(specs, 2, 2, 1.0))
    assert len(batch.groups) == 1
    step = KVPass(batch.groups, 1)
    new = (mx.ones((2, 1, 1, DIM)) for _ in range(3))
    assert mx.allclose(step.layers[0].attend(*new, 1.0), mx.array(1.0))


def filled(specs: list[KVSpec], owner: int, length: int, value: float = 0.0) -> KVGroup:
    """A row of `length` tokens that say nothing."""
    row = KVGroup.single(specs, owner)
    step = KVPass([row], length)
    for layer, spec in zip(step.layers, specs, strict=True):
        shape = (1, spec.num_kv_heads, length, spec.head_dim)
        mx.eval(layer.attend(*(mx.full(shape, value) for _ in range(3)), 1.0))
    step.commit()
    return row


@pytest.mark.parametrize(("bits", "share"), [(8, 9 / 32), (4, 5 / 32)])
def test_quantised_rows_take_their_share(bits: int, share: float) -> None:
    """Of float32: the bits, and a scale and a bias for 64 values."""
    plain, packed = KVSpec(2, 128), KVSpec(2, 128, bits=bits)
    sizes = [filled([spec], 0, 40).nbytes for spec in (plain, packed)]
    assert sizes[1] / sizes[0] <= share
    assert packed.bytes_per_token(mx.float32) / plain.bytes_per_token(mx.float32) == sizes[1] / sizes[0]
    # In 16 bits: 0.53 and 0.28 of what it was.
    assert packed.bytes_per_token(mx.bfloat16) == plain.bytes_per_token(mx.bfloat16) * (bits + 0.5) / 16


@pytest.mark.parametrize("new", [1, 2, 30])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_attention_equals_unpacked(bits: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to read the same keys and values, whichever is taken for so many tokens."""
    spec, found = KVSpec(2, DIM, bits=bits, group_size=DIM), []
    queries, keys, values = (mx.random.normal((1, heads, 40, DIM), key=mx.random.key(heads)) for heads in (HEADS, 2, 2))
    for copies in (0, 10**6):
        monkeypatch.setattr(kv_layout, "_SCORE_COPIES", copies)
        row = KVGroup.single([spec], 0)
        outs = []
        for first, last in ((0, 40 - new), (40 - new, 40)):
            step = KVPass([row], last - first)
            outs.append(step.layers[0].attend(*(x[:, :, first:last] for x in (queries, keys, values)), 0.2))
            step.commit()
        found.append(mx.concatenate(outs, axis=2))
    assert mx.abs(found[0] - found[1]).max() < 1e-5


@pytest.mark.parametrize(("dim", "asked", "given"), [(128, 64, 64), (128, 128, 128), (96, 64, 32), (64, 128, 32)])
def test_groups_divide_heads(dim: int, asked: int, given: int) -> None:
    (spec,) = kv_layout.quantised([KVSpec(1, dim)], 8, asked)
    assert (spec.bits, spec.group_size) == (8, given)
    assert list(kv_layout.quantised([KVSpec(1, dim)], None, asked)) == [KVSpec(1, dim)]
    with pytest.raises(ModelError, match="heads have 80 values"):
        kv_layout.quantised([KVSpec(1, dim), KVSpec(1, 80)], 8, asked)


def test_an_uncommitted_pass_leaves_no_trace() -> None:
    pair = Pair([KVSpec(2, DIM)], 0)
    pair.join(0, [3])
    failed = pair.batch.forward()
    failed.layers[0].attend(*(mx.ones((1, heads, 1, DIM)) for heads in (HEADS, 2, 2)), 1.0)
    pair.decode()
    pair.check()


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000, 4096, 4097, 100_000])
def test_capacity_holds_the_length_and_little_more(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(kv_cache, "_STEP", 256)
    capacity = capacity_for(length)
    assert length <= capacity <= max(length + 256, 1.25 * length)


@LAYOUTS
def test_one_long_row_does_not_pad_the_short_ones(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_STEP", 256)
    monkeypatch.setattr(kv_cache, "_SHORT", 512)
    specs = [KVSpec(1, 64, bits=bits)]
    batch = KVBatch()
    lengths = [4095, *[15] * 7]
    for owner, length in enumerate(lengths):
        batch.join(filled(specs, owner, length))
    real = sum(lengths) * specs[0].bytes_per_token(mx.float32)
    assert batch.nbytes < 1.6 * real  # a padded rectangle of these rows takes 7.8 times


def test_classes_double() -> None:
    assert length_class(3) == length_class(7)
    assert length_class(8) == length_class(15) == length_class(7) + 1


@LAYOUTS
@pytest.mark.parametrize("rows", [1, 3, 4], ids=["alone", "free-slot", "full"])
def test_writes_after_a_view_do_not_copy_the_buffer(bits: int | None, rows: int) -> None:
    """A decode loop's peak stays at its buffers plus one step's activations."""
    batch = KVBatch()
    for owner in range(rows):
        batch.join(filled([KVSpec(8, 64, bits=bits)], owner, 1000))
    mx.eval(batch.groups[0].arrays)
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        forward = batch.forward()
        mx.eval(forward.layers[0].attend(*(mx.ones((rows, 8, 1, 64)) for _ in range(3)), 1.0))
        forward.commit()
    # The CPU backend's quantised product copies what it reads of a buffer.
    copied = 0 if bits is None or device.is_gpu() else batch.nbytes
    assert mx.get_peak_memory() - held < copied + batch.nbytes / 4
