"""Which sequence gets the next unit of work. Knows phases, not tensors."""

from __future__ import annotations

from collections import deque

from mlxvlm.engine.sequence import Phase, Sequence


class Scheduler:
    """First come, first served; at most `max_rows` sequences hold a KV cache at once."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []  # vision, prefill or decode, in order of admission

    def add(self, sequence: Sequence) -> None:
        """A prepared sequence."""
        self._waiting.append(sequence)

    def admit(self) -> None:
        """Drops what has ended, then fills the free rows."""
        self._active = [sequence for sequence in self._active if not sequence.done]
        while self._waiting and len(self._active) < self._max_rows:
            sequence = self._waiting.popleft()
            if not sequence.done:
                self._active.append(sequence)

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._active)

    @property
    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self._active if sequence.phase is Phase.DECODE]

    def next_unit(self) -> Sequence | None:
        """The first admitted sequence that still has images to encode or a prompt to prefill."""
        for sequence in self._active:
            if sequence.phase in (Phase.VISION, Phase.PREFILL):
                return sequence
        return None
