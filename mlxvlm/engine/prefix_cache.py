"""Keys and values of beginnings that prompts share, in blocks. Knows ids and digests, not models or rows.

A block's key is a hash over its parent's key, its token ids and the pictures whose placeholders it holds, so that equal
keys mean equal ids and pictures from position 0 on. A prompt that departs within a block shares the positions before
that, which are found by comparing ids and pictures. Engine thread only; one cache belongs to one model.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from mlxvlm.engine.block_files import BlockFiles
from mlxvlm.engine.kv_cache import KVBlock
from mlxvlm.engine.stats import CacheStats
from mlxvlm.processors.base import PreparedImage

# A block is one copy and one file. Small ones cost a kernel a layer each, large ones are seldom whole in a file.
BLOCK_TOKENS = 64
_ROOT = b"\0" * hashlib.sha256().digest_size

# The pictures that touch a span of positions: where each begins, counted from the span's beginning, and its digest.
Touching: TypeAlias = tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Link:
    """A block of a chain, held or not; its key tells it from all others."""

    key: bytes
    parent: bytes = field(compare=False)
    ids: tuple[int, ...] = field(compare=False)
    pictures: Touching = field(compare=False)

    def shared(self, ids: Sequence[int], pictures: Touching) -> int:
        """How many first positions it shares with a span of `ids` and `pictures` after the same parent."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False)))
        differing = next((pair for pair in zip_longest(self.pictures, pictures) if pair[0] != pair[1]), ())
        return max(min([same, *(each[0] for each in differing if each is not None)]), 0)


def touching(images: Sequence[PreparedImage], start: int, count: int) -> Touching:
    """The pictures of `count` positions from `start` on."""
    spans = ((*image.span, image.digest) for image in images)
    return tuple((first - start, digest) for first, end, digest in spans if first < start + count and end > start)


def link(parent: bytes, ids: Sequence[int], start: int, images: Sequence[PreparedImage]) -> Link:
    """The block whose `ids` begin at position `start`; of `images`, those that touch it count."""
    pictures = touching(images, start, len(ids))
    # Lengths go in, so that no two lists of ids and digests join to the same bytes.
    key = hashlib.sha256(parent + struct.pack("<q", len(ids)) + np.array(ids, np.int64).tobytes())
    for first, digest in pictures:
        key.update(struct.pack("<qq", -first, len(digest)) + digest)
    return Link(key.digest(), parent, tuple(ids), pictures)


class PrefixCache:
    """Blocks by key, at most `max_bytes` of them; 0 turns it off. The longest unused goes first, a child before its
    parent: what is held of a chain is always its beginning.
    """

    def __init__(
        self,
        max_bytes: int,
        block_tokens: int = BLOCK_TOKENS,
        root: bytes = _ROOT,
        files: BlockFiles | None = None,
        is_eager: bool = False,
    ) -> None:
        """`files` outlive the process, so that `root` must then tell all models apart that write to them.

        They are written when a second prompt uses a block, or, if `is_eager`, at once.
        """
        self.block_tokens = block_tokens
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = self.misses = 0  # prompts of which something was held, or nothing
        self._root, self._files, self._is_eager = root, files, is_eager
        # Least recently used first. A parent always comes after its children, so the first of all is a leaf.
        self._blocks: OrderedDict[Link, KVBlock] = OrderedDict()
        self._children: dict[bytes, list[Link]] = {}  # of what is held, by parent

    def extend(self, chain: list[Link], ids: Sequence[int], images: Sequence[PreparedImage]) -> None:
        """Appends those whole blocks of `ids` that `chain` does not have yet."""
        size = self.block_tokens
        for index in range(len(chain), len(ids) // size if self.max_bytes else 0):
            start = index * size
            chain.append(link(self._end_of(chain), ids[start : start + size], start, images))

    def to_end(self, chain: Sequence[Link], ids: Sequence[int], images: Sequence[PreparedImage]) -> list[Link]:
        """A chain of whole blocks with the rest of `ids` as one more, unless some block begins with that."""
        start = len(chain) * self.block_tokens
        _, known = self._nearest(chain, ids, images)
        rest = ids[start:] if self.max_bytes and start + known < len(ids) else ()
        return [*chain, link(self._end_of(chain), rest, start, images)] if rest else list(chain)

    def match(
        self, chain: Sequence[Link], ids: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[list[Link], int]:
        """The blocks that hold the beginning of `ids`, whose whole ones are `chain`, and how many positions they hold.

        The last one may hold more positions than are shared.
        """
        held = list(chain[: self.count(chain)])
        nearest, shared = self._nearest(held, ids, images)
        return [*held, *nearest], len(held) * self.block_tokens + shared

    def _nearest(
        self, chain: Sequence[Link], ids: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[list[Link], int]:
        """After a chain, the block (none, or one) that shares most positions with what follows, and how many."""
        start = len(chain) * self.block_tokens
        rest, pictures = ids[start : start + self.block_tokens], touching(images, start, self.block_tokens)
        found = [(child.shared(rest, pictures), child) for child in self._children.get(self._end_of(chain), ())]
        shared, child = max(found, key=lambda each: each[0], default=(0, None))
        return ([child] if child is not None and shared else []), shared

    def _end_of(self, chain: Sequence[Link]) -> bytes:
        return chain[-1].key if chain else self._root

    def count(self, chain: Sequence[Link]) -> int:
        """How many blocks of a chain are held."""
        return next((index for index, each in enumerate(chain) if each not in self._blocks), len(chain))

    def record(self, hit: bool) -> None:
        """Counts a prompt."""
        self.hits += hit
        self.misses += not hit

    def lookup(self, chain: Sequence[Link]) -> list[KVBlock]:
        """The blocks that are held of a chain, from its beginning."""
        held = chain[: self.count(chain)]
        self._touch(held)
        self._keep(held)  # what a second prompt begins with is worth a file
        return [self._blocks[each] for each in held]

    def fetch(self, chain: Sequence[Link], room: float = math.inf) -> bool:
        """Brings the next block of a chain into memory; False if no file has it or there is no room."""
        held = self.count(chain)
        if self._files is None or held == len(chain) or chain[held].key not in self._files:
            return False
        block = self._files.read(chain[held].key)
        if block is None:
            return False
        self.store(chain[: held + 1], lambda start, end: block, room)
        return self.count(chain) > held

    def close(self) -> None:
        """Waits for files that are being written."""
        if self._files is not None:
            self._files.close()

    def store(self, chain: Sequence[Link], copy: Callable[[int, int], KVBlock], room: float = math.inf) -> None:
        """Adds what is missing of a chain, as far as it fits into `room` bytes in all.

        `copy(start, end)` gives a block of positions.
        """
        held = self.count(chain)
        self._touch(chain[:held])
        own = set(chain)
        try:
            while held < len(chain):
                start = held * self.block_tokens
                block = copy(start, start + len(chain[held].ids))
                if not self._make_room(min(self.max_bytes, room) - block.nbytes, own):
                    break
                mx.eval(block.parts)
                self._blocks[chain[held]] = block
                self._children.setdefault(chain[held].parent, []).append(chain[held])
                self.nbytes += block.nbytes
                held += 1
        finally:
            self._touch(chain[:held])
        if self._is_eager:
            self._keep(chain[:held])

    def _keep(self, chain: Sequence[Link]) -> None:
        """Has files written of the whole blocks of a chain: only those are looked for there, by their keys."""
        if self._files is not None:
            whole = [each for each in chain if len(each.ids) == self.block_tokens]
            self._files.keep([each.key for each in whole], [self._blocks[each] for each in whole])

    def shrink(self, max_bytes: float) -> None:
        """Drops blocks until at most `max_bytes` are held."""
        while self.nbytes > max_bytes:
            self._drop_oldest()

    def stats(self) -> CacheStats:
        return CacheStats(self.hits, self.misses, len(self._blocks), self.nbytes)

    def _touch(self, chain: Sequence[Link]) -> None:
        for each in reversed(chain):
            self._blocks.move_to_end(each)

    def _make_room(self, max_bytes: float, own: set[Link]) -> bool:
        """Whether at most `max_bytes` are held, after dropping what is not `own`."""
        if max_bytes < 0:
            return False
        while self.nbytes > max_bytes:
            if not self._blocks or next(iter(self._blocks)) in own:
                return False
            self._drop_oldest()
        return True

    def _drop_oldest(self) -> None:
        dropped, block = self._blocks.popitem(last=False)
        self.nbytes -= block.nbytes
        siblings = self._children[dropped.parent]
        siblings.remove(dropped)
        if not siblings:
            del self._children[dropped.parent]
