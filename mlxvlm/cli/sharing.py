"""What each of several Macs would need of a model, and how many would do. Knows sizes, reads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

from mlxvlm.cli.options import size_text
from mlxvlm.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from mlxvlm.checkpoint.estimate import MemoryNeed

_CONTEXTS = (2048, 8192, 32768, 131072)  # tokens, as far as the model goes


@dataclass(frozen=True)
class Sharing:
    """A model, and Macs that have `usable` bytes for it. kv_bits, kv_group_size: see kv_layout.quantised()."""

    need: MemoryNeed
    usable: int
    kv_bits: int | None
    kv_group_size: int

    @cached_property
    def _known(self) -> dict[int, Sequence[MemoryNeed]]:
        return {}

    @cached_property
    def contexts(self) -> Sequence[int]:
        """Tokens that are told of."""
        return sorted({min(tokens, self.need.max_context) for tokens in _CONTEXTS})

    def bytes_per_token(self, need: MemoryNeed) -> int:
        """Of keys and values. Raises ModelError where they can't be held in these bits."""
        from mlxvlm.engine.kv_layout import quantised

        specs = quantised(need.kv_specs, self.kv_bits, self.kv_group_size)
        return sum(spec.bytes_per_token(need.dtype) for spec in specs)

    def total(self, need: MemoryNeed, tokens: int) -> int:
        """Bytes at most: weights with their keys and values, or while loading."""
        return max(need.weights_bytes + tokens * self.bytes_per_token(need), need.loading_bytes)

    def fits(self, needs: Sequence[MemoryNeed], tokens: int) -> bool:
        """Whether each of some Macs has room."""
        return all(self.total(need, tokens) < self.usable for need in needs)

    def extremes(self, count: int) -> Sequence[MemoryNeed]:
        """Of rank 0, which alone has tower and embeddings, and of the last, whose part of what is shared is largest.

        Raises UsageError and UnsupportedModelError where so many can't share the model.
        """
        if count not in self._known:
            self._known[count] = [self.need.share(index, count) for index in sorted({0, count - 1})]
        return self._known[count]

    @cached_property
    def most(self) -> int:
        """The largest number that can share it."""
        return next(count for count in range(self.need.most_ranks, 0, -1) if self._can_share(count))

    def least(self, tokens: int) -> int | None:
        """The smallest number of Macs that have room; None where none is large enough."""
        # One of them has the average at least.
        whole = self.need.weights_bytes + tokens * self.bytes_per_token(self.need)
        counts = range(max(1, ceil(whole / self.usable)), self.most + 1)
        return next((n for n in counts if self._can_share(n) and self.fits(self.extremes(n), tokens)), None)

    def rows(self, count: int) -> list[tuple[str, str]]:
        """What is told of `count` Macs: names and values. Raises as `extremes`."""
        return [] if self.need.misfit else list(self._rows(count))

    def _rows(self, count: int) -> Iterator[tuple[str, str]]:
        needs = self.extremes(count)
        others = "rank 1" if count == 2 else f"ranks 1 to {count - 1}, each at most"
        for title, who, need in zip((_macs(count), ""), ("rank 0", others), needs, strict=False):
            held = size_text(1000 * self.bytes_per_token(need))
            sizes = f"{size_text(need.weights_bytes)}, {size_text(need.loading_bytes)} while loading"
            yield title, f"{who}: {sizes}; KV cache {held} for 1000 tokens"
        for line in needs[0].left:
            yield "", line
        for tokens in self.contexts:
            totals = " and ".join(size_text(self.total(need, tokens)) for need in needs)
            verdict = "fits" if self.fits(needs, tokens) else "does not fit"
            yield f"  {tokens} tokens", f"{totals} for weights and KV cache: {verdict} {_macs(count)} like this one"
        up_to = min(self.need.kv_specs[0].num_kv_heads, self.most)
        yield "can share it", f"{_macs(self.most)} at most; the KV cache of each shrinks up to {up_to}"
        for tokens in self.contexts:
            least = self.least(tokens)
            room = "no number of Macs" if least is None else _macs(least)
            yield f"  {tokens} tokens", f"{room} like this one {'has' if least == 1 else 'have'} room"

    def _can_share(self, count: int) -> bool:
        try:
            self.extremes(count)
        except (UsageError, UnsupportedModelError):
            return False
        return True


def _macs(count: int) -> str:
    return f"{count} Mac" if count == 1 else f"{count} Macs"
