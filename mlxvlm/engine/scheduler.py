"""Which sequence gets the next row, and which the next unit of work. Knows phases and sizes, not tensors."""

from __future__ import annotations

from dataclasses import replace

from mlxvlm.engine.admission import ANSWER_STEP, Admission
from mlxvlm.engine.sequence import Phase, Sequence

PATIENCE = 8  # times that others may be served before a sequence whose turn it would be


class Scheduler:
    """At most `max_rows` sequences run at once, and no more than fit into memory.

    Rows: first come, first served; who does not fit yet is passed by at most PATIENCE others. Units: the sequence with
    the least left goes first, unless one has been passed PATIENCE times. An admitted sequence therefore gets a unit at
    least every PATIENCE + max_rows units.
    """

    def __init__(self, max_rows: int, admission: Admission) -> None:
        self._max_rows = max_rows
        self._admission = admission
        self._waiting: list[Sequence] = []
        self._active: list[Sequence] = []  # vision, prefill or decode, in order of admission
        self._passed: dict[int, int] = {}  # by sequence: how often others went before it
        self._may_admit = False  # something has changed since nobody could be admitted
        self.queued_bytes = 0  # of the pixels of those who wait

    def add(self, sequence: Sequence) -> None:
        """A prepared sequence."""
        self._waiting.append(sequence)
        self._passed[sequence.id] = 0
        self.queued_bytes += sequence.pixel_bytes
        self._may_admit = True

    def remove(self, sequence: Sequence) -> None:
        """A sequence that has ended, wherever it is."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            self.queued_bytes -= sequence.pixel_bytes
        elif sequence in self._active:
            self._active.remove(sequence)
            self._admission.release(sequence.id)
        self._passed.pop(sequence.id, None)
        self._may_admit = True

    def admit(self) -> None:
        """Fills the free rows."""
        while self._may_admit and len(self._active) < self._max_rows:
            place = self._next_row()
            if place is None:
                self._may_admit = False
                return
            for passed in self._waiting[:place]:
                self._passed[passed.id] += 1
            sequence = self._waiting.pop(place)
            self.queued_bytes -= sequence.pixel_bytes
            self._passed[sequence.id] = 0
            self._active.append(sequence)

    def _next_row(self) -> int | None:
        """The place in the queue of the first that fits, its bytes reserved."""
        for place, sequence in enumerate(self._waiting):
            if self._admission.reserve(sequence.id, sequence.need):
                return place
            if self._passed[sequence.id] >= PATIENCE:
                return None
        return None

    def grow(self) -> None:
        """Answers without a limit reserve their next step early; one that gets none before its last token ends there.

        This comes before admission: what runs goes before what waits.
        """
        for row in self.decoding:
            end = min(row.longest, row.full)
            if row.launched < row.max_tokens < end and row.launched + ANSWER_STEP // 2 >= row.max_tokens:
                max_tokens = min(row.max_tokens + ANSWER_STEP, end)
                need = replace(row.need, length=row.need.length + max_tokens - row.max_tokens)
                if self._admission.reserve(row.id, need):
                    row.need, row.max_tokens = need, max_tokens

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._active)

    @property
    def num_running(self) -> int:
        return len(self._active)

    @property
    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self._active if sequence.phase is Phase.DECODE]

    def next_unit(self) -> Sequence | None:
        """An admitted sequence that still has images to encode or a prompt to prefill; the others are passed."""
        candidates = [sequence for sequence in self._active if sequence.phase in (Phase.VISION, Phase.PREFILL)]
        if not candidates:
            return None
        chosen = max(candidates, key=lambda sequence: self._passed[sequence.id])
        if self._passed[chosen.id] < PATIENCE:
            chosen = min(candidates, key=lambda sequence: sequence.work_left)
        for sequence in candidates:
            self._passed[sequence.id] += 1
        self._passed[chosen.id] = 0
        return chosen
