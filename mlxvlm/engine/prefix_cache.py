"""Keys and values of beginnings that prompts share, in blocks. Knows ids and digests, not models or rows.

A block's key is a hash over its parent's key, its token ids and the pictures whose placeholders it holds, so that equal
keys mean equal ids and pictures from position 0 on. Engine thread only; one cache belongs to one model.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlxvlm.engine.block_files import BlockFiles
from mlxvlm.engine.kv_cache import KVBlock
from mlxvlm.engine.stats import CacheStats
from mlxvlm.processors.base import PreparedImage

# What a prompt shares is cut to whole blocks, so small ones save more: of a LLaVA prompt of 600 tokens with another
# question, 256 leave 88 tokens and a cut picture to run, 64 leave 24.
BLOCK_TOKENS = 64
_ROOT = b"\0" * hashlib.sha256().digest_size


def block_key(parent: bytes, ids: Sequence[int], start: int, images: Sequence[PreparedImage]) -> bytes:
    """The key of the block whose `ids` begin at position `start`; of `images`, those that touch it count."""
    key = hashlib.sha256(parent + np.array(ids, np.int64).tobytes())
    for image in images:
        first, end = image.span
        if first < start + len(ids) and end > start:
            # With its length, so that no two lists of digests join to the same bytes.
            key.update(struct.pack("<qq", start - first, len(image.digest)) + image.digest)
    return key.digest()


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
        self._blocks: OrderedDict[bytes, KVBlock] = OrderedDict()

    def extend(self, keys: list[bytes], ids: Sequence[int], images: Sequence[PreparedImage]) -> None:
        """Appends the keys of those whole blocks of `ids` that `keys` does not have yet."""
        size = self.block_tokens
        for index in range(len(keys), len(ids) // size if self.max_bytes else 0):
            start = index * size
            keys.append(block_key(keys[-1] if keys else self._root, ids[start : start + size], start, images))

    def count(self, keys: Sequence[bytes]) -> int:
        """How many blocks of a chain are held."""
        return next((index for index, key in enumerate(keys) if key not in self._blocks), len(keys))

    def record(self, hit: bool) -> None:
        """Counts a prompt."""
        self.hits += hit
        self.misses += not hit

    def lookup(self, keys: Sequence[bytes]) -> list[KVBlock]:
        """The blocks that are held of a chain, from its beginning."""
        held = keys[: self.count(keys)]
        self._touch(held)
        blocks = [self._blocks[key] for key in held]
        if self._files is not None:
            self._files.keep(held, blocks)  # what a second prompt begins with is worth a file
        return blocks

    def fetch(self, keys: Sequence[bytes], room: float = math.inf) -> bool:
        """Brings the next block of a chain into memory; False if no file has it or there is no room."""
        held = self.count(keys)
        if self._files is None or held == len(keys) or keys[held] not in self._files:
            return False
        block = self._files.read(keys[held])
        if block is None:
            return False
        self.store(keys[: held + 1], lambda start, end: block, room)
        return self.count(keys) > held

    def close(self) -> None:
        """Waits for files that are being written."""
        if self._files is not None:
            self._files.close()

    def store(self, keys: Sequence[bytes], copy: Callable[[int, int], KVBlock], room: float = math.inf) -> None:
        """Adds what is missing of a chain, as far as it fits into `room` bytes in all.

        `copy(start, end)` gives a block of positions.
        """
        size = self.block_tokens
        held = self.count(keys)
        self._touch(keys[:held])
        own = set(keys)
        try:
            while held < len(keys):
                block = copy(held * size, (held + 1) * size)
                if not self._make_room(min(self.max_bytes, room) - block.nbytes, own):
                    break
                mx.eval(block.parts)
                self._blocks[keys[held]] = block
                self.nbytes += block.nbytes
                held += 1
        finally:
            self._touch(keys[:held])
        if self._is_eager and self._files is not None:
            self._files.keep(keys[:held], [self._blocks[key] for key in keys[:held]])

    def shrink(self, max_bytes: float) -> None:
        """Drops blocks until at most `max_bytes` are held."""
        while self.nbytes > max_bytes:
            self._drop_oldest()

    def stats(self) -> CacheStats:
        return CacheStats(self.hits, self.misses, len(self._blocks), self.nbytes)

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _make_room(self, max_bytes: float, own: set[bytes]) -> bool:
        """Whether at most `max_bytes` are held, after dropping what is not `own`."""
        if max_bytes < 0:
            return False
        while self.nbytes > max_bytes:
            if not self._blocks or next(iter(self._blocks)) in own:
                return False
            self._drop_oldest()
        return True

    def _drop_oldest(self) -> None:
        _, block = self._blocks.popitem(last=False)
        self.nbytes -= block.nbytes
