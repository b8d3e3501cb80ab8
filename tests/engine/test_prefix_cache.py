"""Blocks of keys and values that prompts share: their keys, their order and their bytes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, takewhile

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine.feature_cache import FeatureCache
from mlxvlm.engine.kv_cache import KVBatch, KVBlock, KVGroup, KVPass
from mlxvlm.engine.kv_layout import quantised
from mlxvlm.engine.prefix_cache import Link, PrefixCache, link, touching
from mlxvlm.models.base import KVSpec
from mlxvlm.processors.base import PreparedImage

PLENTY = 1 << 20
SPECS = [KVSpec(4, 64), KVSpec(2, 64), KVSpec(1, 32)]


def image(digest: bytes, start: int, end: int) -> PreparedImage:
    return PreparedImage(np.zeros(1, np.float32), (1,), (start, end), digest)


def chain(ids: Sequence[int], images: Sequence[PreparedImage] = (), size: int = 4) -> list[Link]:
    keys: list[Link] = []
    PrefixCache(1, size).extend(keys, ids, images)
    return keys


def test_a_key_depends_on_all_that_comes_before() -> None:
    ids = list(range(12))
    keys = chain(ids)
    assert len(keys) == len(set(keys)) == 3
    assert chain([99, *ids[1:]])[0] != keys[0]
    assert not set(chain([99, *ids[1:]])) & set(keys)
    assert chain([*ids[:11], 99])[:2] == keys[:2]
    assert chain([*ids, 5, 6]) == keys
    assert len(set(chain([7] * 12))) == 3


def test_a_key_depends_on_the_pictures_that_touch_its_block() -> None:
    ids = [1] * 12
    plain, keys = chain(ids), chain(ids, [image(b"a", 5, 7)])
    assert keys[0] == plain[0]
    assert not set(keys[1:]) & set(plain)
    others = [image(b"b", 5, 7), image(b"a", 4, 7), image(b"a", 6, 7), image(b"", 5, 7)]
    assert len({keys[1], *(chain(ids, [other])[1] for other in others)}) == 5
    # A block within a picture knows where in the picture it is.
    assert chain(ids, [image(b"a", 2, 12)])[1] != chain(ids, [image(b"a", 3, 12)])[1]
    both = [image(b"a", 4, 5), image(b"b", 5, 6)], [image(b"b", 4, 5), image(b"a", 5, 6)]
    assert chain(ids, both[0])[1] != chain(ids, both[1])[1]


def test_two_digests_are_not_one_longer_digest() -> None:
    offset = (4).to_bytes(8, "little")
    joined = b"a" + offset + (1).to_bytes(8, "little") + b"b"
    assert link(b"", [1], 4, [image(b"a", 0, 9), image(b"b", 0, 9)]) != link(b"", [1], 4, [image(joined, 0, 9)])


LETTERS = st.lists(st.integers(0, 1), max_size=6)
PICTURES = st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.integers(0, 12), st.integers(1, 4)), max_size=2)


@settings(max_examples=300)
@given(LETTERS, LETTERS, PICTURES, PICTURES)
def test_what_two_blocks_share_is_what_has_equal_keys(
    one: list[int], other: list[int], mine: list[tuple[bytes, int, int]], theirs: list[tuple[bytes, int, int]]
) -> None:
    """Of two blocks at position 4, whose pictures may begin before it."""
    ones, others = (
        [image(digest, start, start + width) for digest, start, width in sorted(each, key=lambda each: each[1])]
        for each in (mine, theirs)
    )
    found = link(b"", one, 4, ones).shared(other, touching(others, 4, len(other)))
    lengths = range(1, min(len(one), len(other)) + 1)
    equal = takewhile(lambda n: link(b"", one[:n], 4, ones) == link(b"", other[:n], 4, others), lengths)
    assert found == len(list(equal))


def test_the_rest_of_a_row_is_shared_up_to_where_a_prompt_departs() -> None:
    cache, ids = PrefixCache(PLENTY, 4), list(range(10))
    cuts: list[tuple[int, int]] = []

    def store(ids: list[int]) -> None:
        copy = lambda start, end: cuts.append((start, end)) or block()  # noqa: E731
        cache.store(cache.to_end(chain(ids), ids, ()), copy)

    store(ids)
    assert cuts == [(0, 4), (4, 8), (8, 10)]
    store(ids)
    store(ids[:9])
    store(ids[:6])
    assert len(cuts) == 3, "all of that is held"
    store([*ids[:6], 99, 98])
    store([*ids, 10])
    assert cuts[3:] == [(4, 8), (8, 11)]
    cases = ([*ids, 10, 11], 11), ([*ids[:7], 1, 2], 7), ([*ids[:6], 99, 1], 7), (ids[:3], 3), ([1], 0), ([], 0)
    for asked, shared in cases:
        found, count = cache.match(chain(asked), asked, ())
        assert count == shared
        assert len(found) == len(cache.lookup(found)) == -(-shared // 4)
    assert cache.match(chain(ids), ids, [image(b"a", 9, 10)])[1] == 9
    cache.shrink(0)
    assert not cache._children


def test_keys_are_made_as_ids_become_known() -> None:
    ids, images = list(range(20)), [image(b"a", 6, 9)]
    keys: list[Link] = []
    cache = PrefixCache(1, 3)
    for length in range(21):
        cache.extend(keys, ids[:length], images)
    assert keys == chain(ids, images, 3)


def block(nbytes: int = 8) -> KVBlock:
    return KVBlock((mx.zeros(nbytes // 8), mx.zeros(nbytes // 8)))


class PlainCache:
    """The slow twin: a list of (key, parent, last use) and a search."""

    def __init__(self, limit: int) -> None:
        self.limit, self.now = limit, 0
        self.entries: dict[Link, tuple[Link | None, int]] = {}

    def held(self, keys: list[Link]) -> list[Link]:
        return [key for index, key in enumerate(keys) if all(k in self.entries for k in keys[: index + 1])]

    def use(self, keys: list[Link]) -> None:
        self.now += 1
        for key, parent in zip(keys, [None, *keys], strict=False):
            self.entries[key] = (parent, self.now)

    def store(self, keys: list[Link]) -> None:
        held = self.held(keys)
        for key in keys[len(held) :]:
            if len(self.entries) == self.limit:
                parents = {parent for parent, _ in self.entries.values()}
                leaves = [name for name in self.entries if name not in parents and name not in keys]
                if not leaves:
                    break
                del self.entries[min(leaves, key=lambda name: self.entries[name][1])]
            held.append(key)
            self.use(held)
        self.use(held)


@settings(max_examples=80, deadline=None)
@given(
    limit=st.integers(1, 8),
    calls=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), min_size=1, max_size=5)), max_size=30),
)
def test_the_cache_equals_its_slow_twin(limit: int, calls: list[tuple[bool, list[int]]]) -> None:
    """What is held of each chain; which of several leaves of one age goes first is left open."""
    cache, twin = PrefixCache(8 * limit, 1), PlainCache(limit)
    for stores, ids in calls:
        keys = chain(ids, size=1)
        if stores:
            cache.store(keys, lambda start, end: block())
            twin.store(keys)
        else:
            assert len(cache.lookup(keys)) == len(twin.held(keys))
            twin.use(twin.held(keys))
        assert set(cache._blocks) == set(twin.entries) == {each for held in cache._children.values() for each in held}
        assert cache.nbytes == 8 * len(twin.entries) <= cache.max_bytes


def test_children_go_before_their_parents() -> None:
    cache = PrefixCache(8 * 6, 1)
    trunk = chain([1, 2, 3], size=1)
    for ids in ([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6]):
        cache.store(chain(ids, size=1), lambda start, end: block())
    for held in range(5, -1, -1):
        cache.shrink(8 * held)
        assert cache.stats().entries == held
        found = [cache.count(keys) for keys in (trunk, chain([1, 2, 3, 4], size=1), chain([1, 2, 6], size=1))]
        assert sum(key in cache._blocks for key in trunk) == found[0]


def test_a_chain_that_does_not_fit_keeps_its_beginning() -> None:
    cache, copies = PrefixCache(8 * 3, 1), []
    keys = chain(range(9), size=1)
    cache.store(keys, lambda start, end: copies.append(start) or block())
    assert cache.count(keys) == 3
    assert copies == [0, 1, 2, 3]
    other = chain([5, 6], size=1)
    cache.store(other, lambda start, end: block())
    assert (cache.count(other), cache.count(keys)) == (2, 1)


def test_a_copy_that_fails_leaves_the_cache_whole() -> None:
    cache = PrefixCache(PLENTY, 1)
    keys = chain([1, 2, 3], size=1)

    def explode(start: int, end: int) -> KVBlock:
        if start == 2:
            raise RuntimeError("the device failed")
        return block()

    with pytest.raises(RuntimeError):
        cache.store(keys, explode)
    assert cache.count(keys) == 2
    cache.shrink(8)
    assert cache.count(keys) == 1


def test_a_cache_of_no_bytes_hashes_nothing() -> None:
    keys: list[Link] = []
    PrefixCache(0, 1).extend(keys, [1, 2], [])
    assert keys == []


def random_row(length: int, owner: int = 0, specs: Sequence[KVSpec] = SPECS) -> KVGroup:
    row = KVGroup.single(specs, owner)
    step = KVPass([row], length)
    for layer, spec in zip(step.layers, specs, strict=True):
        new = [mx.random.normal((1, spec.num_kv_heads, length, spec.head_dim)) for _ in range(3)]
        mx.eval(layer.attend(*new, 1.0))
    step.commit()
    mx.eval(row.arrays)
    return row


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("cuts", [[0, 5], [0, 3, 6], [0, 1, 2, 300], [0, 256, 512]])
def test_a_row_made_of_blocks_is_the_row(cuts: list[int], bits: int | None) -> None:
    batch, specs = KVBatch(), quantised(SPECS, bits, 64)
    for owner in range(3):
        batch.join(random_row(300 if cuts[-1] <= 300 else 520, owner, specs))
    group = batch.group_of(1)
    assert group is not None
    blocks = [group.copy(1, start, end) for start, end in pairwise(cuts)]
    length = cuts[-1] - 1
    row = KVGroup.single(specs, 7, blocks, length)
    assert (row.owners, row.lengths) == ([7], [length])
    slot = group.owners.index(1)
    for mine, theirs in zip(row.arrays, group.arrays, strict=True):
        assert mx.array_equal(mine[:, :, :length], theirs[slot : slot + 1, :, :length])
        assert not mine[:, :, length:].any()
    before = row.nbytes
    row.reserve(1)
    assert row.nbytes == before


@pytest.mark.parametrize(
    "specs", [SPECS, [KVSpec(1, 128)], quantised(SPECS, 4, 64)], ids=["layers", "one-head", "4-bits"]
)
def test_no_view_is_stored(specs: list[KVSpec]) -> None:
    """Also of a single layer with one head, whose slices are contiguous as they are."""
    mx.clear_cache()
    gc.collect()
    floor = mx.get_active_memory()
    cache, keys = PrefixCache(1 << 30, 64), chain(range(640), size=64)
    row = random_row(640, specs=specs)
    cache.store(keys[:9], partial(row.copy, 0))
    del row
    held = mx.get_active_memory() - floor
    per_token = sum(spec.bytes_per_token(mx.float32) for spec in specs)
    assert cache.nbytes == 9 * 64 * per_token
    assert 0 <= held - cache.nbytes < 4096
    cache.shrink(4 * 64 * per_token)
    assert cache.count(keys) == 4
    assert 0 <= mx.get_active_memory() - floor - cache.nbytes < 4096
    cache.shrink(0)
    assert mx.get_active_memory() - floor < 4096


def test_storing_does_not_make_the_next_step_copy() -> None:
    row = random_row(1000)
    cache = PrefixCache(1 << 30, 64)
    cache.store(chain(range(1000), size=64), partial(row.copy, 0))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step = KVPass([row], 1)
    for layer, spec in zip(step.layers, SPECS, strict=True):
        mx.eval(layer.attend(*(mx.zeros((1, spec.num_kv_heads, 1, spec.head_dim)) for _ in range(3)), 1.0))
    assert mx.get_peak_memory() - before < row.nbytes / 8


def test_features_by_digest() -> None:
    cache = FeatureCache(100)
    for name in (b"a", b"b"):
        cache.put(name, mx.zeros(10))
    assert cache.get(b"a") is not None
    cache.put(b"c", mx.zeros(10))
    assert [cache.get(name) is None for name in (b"a", b"b", b"c")] == [False, True, False]
    cache.put(b"d", mx.zeros(26))
    assert cache.get(b"d") is None
    assert cache.stats().entries == 2
    cache.put(b"a", mx.zeros(10))
    assert cache.nbytes == 80
    cache.shrink(0)
    assert cache.nbytes == 0
