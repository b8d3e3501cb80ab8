"""Keys and values of all rows, and attention over them. Knows lengths and slots, not what a row says.

Rows of similar length share a group: buffers [slots, K, capacity, Dh] a layer, each row at the left of its slot, so
that rows join, grow and leave without moving the others. A row is never in a group with rows of more than twice its
length (512 tokens and fewer count as equal), which bounds what padding costs; the linear layers still run over all rows
at once, and only attention runs group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

import mlx.core as mx

from mlxvlm.engine.kv_layout import attend, encode, part_widths
from mlxvlm.models.base import KVSpec

_STEP = 256  # tokens; capacities are multiples, as sizes that change at every step defeat MLX's buffer reuse
_SHORT = 512  # rows below this are of one class


def capacity_for(length: int) -> int:
    """Buffer length for `length` tokens: multiples of 256, coarser for long rows so that growing stays rare."""
    step = max(_STEP, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def length_class(length: int) -> int:
    """Rows of one class may share a group: lengths in [2^(c-1), 2^c)."""
    return max(length, _SHORT - 1).bit_length()


def room_in_class(length: int) -> int:
    """More tokens that a row's class has buffers for; the one beyond them moves it, which no pass may do half-way."""
    return (1 << length_class(length)) - length


_numbers = count()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class KVBlock:
    """A copy of some positions of one row, all layers in one array a part, as MLX limits how many buffers there are."""

    parts: tuple[mx.array, ...]  # of kv_layout, each layer after layer of [K, positions, width]
    number: int = field(default_factory=_numbers.__next__, compare=False)  # no other one's

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in self.parts)


class KVGroup:
    """The rows of one length class; also a single row's own cache while its prompt is prefilled."""

    def __init__(self, specs: Sequence[KVSpec]) -> None:
        self.specs = specs
        self.owners: list[int] = []
        self.lengths: list[int] = []
        self.kind = length_class(0)
        self._slots = 0
        self._capacity = 0
        # Each layer's parts [slots, K, capacity, width]; none until the first write, which brings the dtype.
        self._layers: list[list[mx.array]] = [[] for _ in specs]

    @classmethod
    def single(cls, specs: Sequence[KVSpec], owner: int, blocks: Sequence[KVBlock] = (), length: int = 0) -> KVGroup:
        """A cache for one row: empty, or with the first `length` positions of blocks that follow one another."""
        group = cls(specs)
        group.owners, group.lengths, group._slots = [owner], [length], 1
        if blocks:
            group._fill(blocks, length)
        return group

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, empty slots included."""
        return sum(int(buffer.nbytes) for buffer in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        return [buffer for buffers in self._layers for buffer in buffers]

    def reserve(self, new: int) -> None:
        """Room for `new` more tokens in every row."""
        needed = max(self.lengths) + new
        if needed > self._capacity:
            self._resize(self._slots, capacity_for(needed))

    def join(self, row: KVGroup) -> None:
        """Takes over another group's only row, which must not be used afterwards."""
        if not self.owners:
            self.__dict__.update(row.__dict__)
            return
        slot, length = len(self.owners), row.lengths[0]
        slots = self._slots if slot < self._slots else 2 * self._slots
        capacity = max(self._capacity, capacity_for(max(length, 1)))
        if (slots, capacity) != (self._slots, self._capacity):
            self._resize(slots, capacity)
        for layer, sources in enumerate(row._layers):
            if sources and length:
                for target, source in zip(self._buffers(layer, sources), sources, strict=True):
                    target[slot : slot + 1, :, :length] = source[:, :, :length]
                    target[slot : slot + 1, :, length:] = 0  # of a row that was here: NaN comes through any mask
        self.owners.append(row.owners[0])
        self.lengths.append(length)

    def remove(self, owner: int) -> None:
        """Frees a row's slot; the last row moves into it, so that rows stay at the front."""
        slot, last = self.owners.index(owner), len(self.owners) - 1
        if slot != last:
            length = self.lengths[last]
            for buffer in self.arrays:
                buffer[slot : slot + 1, :, :length] = buffer[last : last + 1, :, :length]
                buffer[slot : slot + 1, :, length:] = 0  # as in join()
            self.owners[slot], self.lengths[slot] = self.owners[last], self.lengths[last]
        self.owners.pop()
        self.lengths.pop()
        # Never more than two slots a row: admission counts on it.
        if self.owners and 2 * len(self.owners) < self._slots:
            self._resize(self._slots // 2, self._capacity)

    def take(self, owner: int) -> KVGroup:
        """A row as a group of its own, removed from here."""
        slot = self.owners.index(owner)
        row = KVGroup.single(self.specs, owner)
        row.lengths = [self.lengths[slot]]
        row._capacity = min(self._capacity, capacity_for(max(row.lengths[0], 1)))
        # Copies: a view would keep the whole buffer alive and make the next write copy it.
        row._layers = [
            [mx.contiguous(buffer[slot : slot + 1, :, : row._capacity]) for buffer in buffers]
            for buffers in self._layers
        ]
        mx.eval(row.arrays)
        self.remove(owner)
        return row

    def copy(self, owner: int, start: int, end: int) -> KVBlock:
        """Positions [start, end) of a row; not evaluated yet."""
        slot = self.owners.index(owner)
        # No views, which would keep the whole buffers alive and make the next write copy them.
        return KVBlock(
            tuple(
                mx.contiguous(mx.concatenate([run.flatten() for run in _by_width(buffers, slot, start, end)]))
                for buffers in zip(*filter(None, self._layers), strict=True)
            )
        )

    def places(self, new: int) -> mx.array:
        """Where `new` tokens of each slot go, the same in every layer: positions [slots, 1, L, 1], 0 for free ones."""
        starts = [*self.lengths, *[0] * (self._slots - len(self.lengths))]
        return (mx.array(starts)[:, None] + mx.arange(new))[:, None, :, None]

    def write(self, layer: int, keys: mx.array, values: mx.array, places: mx.array | None) -> list[mx.array]:
        """Appends [B, K, L, Dh]; the parts that the rows hold now, [B, K, S, width], with padding after shorter rows.

        A row on its own needs no `places`: its tokens go in one slice.
        """
        count, new, start = keys.shape[0], keys.shape[2], self.lengths[0]
        held = max(self.lengths) + new
        parts = encode(self.specs[layer], keys, values)
        buffers = self._buffers(layer, parts)
        for part, fresh in enumerate(parts):
            if places is None:
                buffers[part][:1, :, start : start + new] = fresh
            else:
                # Faster than writing by [slots, :, positions], and as much in place. Free slots get zeros, which who
                # joins overwrites.
                free = self._slots - count
                fresh = mx.pad(fresh, [(0, free), (0, 0), (0, 0), (0, 0)]) if free else fresh
                buffers[part] = mx.put_along_axis(buffers[part], places, fresh, axis=2)
        return [buffer[:count, :, :held] for buffer in buffers]

    def _buffers(self, layer: int, like: Sequence[mx.array]) -> list[mx.array]:
        if not self._layers[layer]:
            room = (self._slots, self.specs[layer].num_kv_heads, self._capacity)
            self._layers[layer] = [mx.zeros((*room, part.shape[-1]), part.dtype) for part in like]
        return self._layers[layer]

    def _fill(self, blocks: Sequence[KVBlock], length: int) -> None:
        # Values of a position, for each layer and part.
        widths = [[spec.num_kv_heads * width for width in part_widths(spec)] for spec in self.specs]
        first_part = sum(layer[0] for layer in widths)
        sizes = [block.parts[0].size // first_part for block in blocks]
        unused = sum(sizes) - length  # of the last block; admission counts no room for it
        self._capacity = capacity_for(length + 1)  # what comes next fits without another copy
        for part, flat in enumerate(zip(*(block.parts for block in blocks), strict=True)):
            first = 0  # of the layer, in each position
            for layer, spec in enumerate(self.specs):
                heads, last = spec.num_kv_heads, first + widths[layer][part]
                pieces = [
                    array[first * size : last * size].reshape(1, heads, size, -1)
                    for array, size in zip(flat, sizes, strict=True)
                ]
                pieces[-1] = pieces[-1][:, :, : sizes[-1] - unused]
                rest = mx.zeros((1, heads, self._capacity - length, pieces[0].shape[-1]), flat[0].dtype)
                self._layers[layer].append(mx.concatenate([*pieces, rest], axis=2))
                first = last
        mx.eval(self.arrays)

    def _resize(self, slots: int, capacity: int) -> None:
        rows, filled = len(self.owners), min(self._capacity, capacity)
        for buffers in self._layers:
            for part, old in enumerate(buffers):
                grown = mx.zeros((slots, old.shape[1], capacity, old.shape[3]), old.dtype)
                grown[:rows, :, :filled] = old[:rows, :, :filled]
                buffers[part] = grown
        self._slots, self._capacity = slots, capacity


class LayerCache:
    """One layer's Cache in one forward pass."""

    def __init__(self, forward: KVPass, layer: int) -> None:
        self._forward = forward
        self._layer = layer

    @property
    def offset(self) -> int | mx.array:
        return self._forward.offset

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        mixed, first = [], 0
        for group, places in zip(self._forward.groups, self._forward.places, strict=True):
            rows = slice(first, first + len(group.owners))
            first = rows.stop
            parts = group.write(self._layer, keys[rows], values[rows], places)
            mixed.append(self._attend(group, queries[rows], parts, scale))
        return mixed[0] if len(mixed) == 1 else mx.concatenate(mixed)

    def _attend(self, group: KVGroup, queries: mx.array, parts: list[mx.array], scale: float) -> mx.array:
        spec = group.specs[self._layer]
        if len(group.owners) == 1 and queries.shape[2] == 1:
            # One token of one row sees everything from its window's or chunk's first position on: no mask.
            first = _first_visible(spec, group.lengths[0])
            return attend(spec, queries, [part[:, :, first:] for part in parts], scale, None)
        return attend(spec, queries, parts, scale, self._forward.mask(group, spec))


class KVPass:
    """One forward pass of `new` tokens in every row of some groups. Lengths move only at commit()."""

    def __init__(self, groups: Sequence[KVGroup], new: int) -> None:
        self.groups = groups
        self._new = new
        for group in groups:
            group.reserve(new)
        lengths = [length for group in groups for length in group.lengths]
        self.offset: int | mx.array = lengths[0] if len(lengths) == 1 else mx.array(lengths)
        self.places = [group.places(new) if len(group.owners) > 1 else None for group in groups]
        self._masks: dict[tuple[int, int | None, int | None], mx.array | str] = {}

    @property
    def layers(self) -> list[LayerCache]:
        """Made when asked for: kept here they would be a cycle, and buffers would wait for the garbage collector."""
        return [LayerCache(self, layer) for layer in range(len(self.groups[0].specs))]

    def mask(self, group: KVGroup, spec: KVSpec) -> mx.array | str:
        """bool [B, 1, L, S], the same for all layers of a kind; "causal" where MLX's own will do."""
        key = (id(group), spec.window, spec.chunk)
        if key not in self._masks:
            plain = len(group.owners) == 1 and spec.window is None and spec.chunk is None
            self._masks[key] = "causal" if plain else visible(group.lengths, self._new, spec)
        return self._masks[key]

    def commit(self, counts: Sequence[int] | None = None) -> None:
        """The pass was built without an error: its tokens count; or only the first so many of each row, in batch order.

        What does not count is overwritten by the next pass. Until this is called no row may join or leave.
        """
        given = iter(counts or ())
        for group in self.groups:
            group.lengths = [length + (self._new if counts is None else next(given)) for length in group.lengths]


def _by_width(buffers: Sequence[mx.array], slot: int, start: int, end: int) -> list[mx.array]:
    """Positions of a slot, [layers * K, positions, width]: one array of all layers that follow with the same width."""
    runs = (list(run) for _, run in groupby(buffers, key=lambda buffer: buffer.shape[-1]))
    return [mx.concatenate([buffer[slot, :, start:end] for buffer in run]) for run in runs]


def visible(lengths: Sequence[int], new: int, spec: KVSpec) -> mx.array:
    """bool [B, 1, L, S]: which held positions each new token of each row may look at."""
    query = (mx.array(list(lengths))[:, None] + mx.arange(new)[None])[:, None, :, None]  # [B, 1, L, 1]
    key = mx.arange(max(lengths) + new)[None, None, None]  # [1, 1, 1, S]
    mask = key <= query
    if spec.window is not None:
        mask = mask & (key > query - spec.window)
    if spec.chunk is not None:
        mask = mask & (key // spec.chunk == query // spec.chunk)
    return mask


def _first_visible(spec: KVSpec, position: int) -> int:
    first = 0
    if spec.window is not None:
        first = max(first, position - spec.window + 1)
    if spec.chunk is not None:
        first = max(first, position // spec.chunk * spec.chunk)
    return first


class KVBatch:
    """All decoding rows in their groups. Batch order is group by group, slot by slot."""

    def __init__(self) -> None:
        self.groups: list[KVGroup] = []

    @property
    def owners(self) -> list[int]:
        return [owner for group in self.groups for owner in group.owners]

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    def group_of(self, owner: int) -> KVGroup | None:
        """Where a row is, None if it is not here."""
        return next((group for group in self.groups if owner in group.owners), None)

    def join(self, row: KVGroup) -> None:
        """Adds a row; its own buffers are used as they are when no other row is of its class."""
        row.kind = length_class(row.lengths[0])
        for group in self.groups:
            if group.kind == row.kind:
                group.join(row)
                return
        self.groups.append(row)

    def remove(self, owner: int) -> None:
        """Drops a row's keys and values."""
        for group in self.groups:
            if owner in group.owners:
                group.remove(owner)
        self._drop_empty()

    def take(self, owner: int) -> KVGroup:
        """A row as a group of its own, removed from here."""
        row = next(group for group in self.groups if owner in group.owners).take(owner)
        self._drop_empty()
        return row

    def forward(self, new: int = 1) -> KVPass:
        """A decode step of all rows, `new` tokens each; rows that outgrew their group change it first."""
        self._regroup()
        return KVPass(self.groups, new)

    def _regroup(self) -> None:
        strays = []
        for group in self.groups:
            kinds = [length_class(length) for length in group.lengths]
            if len(kinds) == 1 and not any(other.kind == kinds[0] for other in self.groups):
                group.kind = kinds[0]  # a row on its own takes its buffers along
                continue
            for owner, kind in zip(list(group.owners), kinds, strict=True):
                if kind != group.kind:
                    strays.append(group.take(owner))
        if strays:
            self._drop_empty()
            for row in strays:
                self.join(row)

    def _drop_empty(self) -> None:
        self.groups = [group for group in self.groups if group.owners]
