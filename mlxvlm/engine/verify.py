"""Checks guesses of several rows in one forward pass. Knows rows and tensors, not who guessed.

A row's choice is a pure function of its logits, its history and its step. So each position is given the very choice
that an ordinary step would make there, and a guess holds where it equals that choice: what comes out is what comes out
without guesses, greedy or sampled, and nothing need be rejected at random (Leviathan et al. 2023, arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine.rows import Rows
from mlxvlm.engine.sampler import Result, read, sample
from mlxvlm.engine.sequence import Sequence


class Verification:
    """A pass that runs: each row's last token and its guesses, none for some rows.

    Shorter rows are padded at their end. Only what read() finds right counts in the KV cache, and until then no row may
    join or leave.
    """

    def __init__(self, rows: Rows, sequences: Seq[Sequence], drafts: Mapping[int, Seq[int]]) -> None:
        by_id = {sequence.id: sequence for sequence in sequences}
        width = 1 + max(map(len, drafts.values()))
        self._rows = rows
        self.rows = [by_id[owner] for owner in rows.order(width)]
        self.drafts = [list(drafts.get(row.id, ())) for row in self.rows]
        fed = [[row.last_token, *draft, *[0] * (width - 1 - len(draft))] for row, draft in self._pairs]
        places = [first * width + step for first, draft in enumerate(self.drafts) for step in range(1 + len(draft))]
        self._logits = rows.run(mx.array(fed, mx.uint32), places)  # [N, V]
        self._samplers = [
            row.sampler.ahead(draft[:step], self._logits.shape[-1])
            for row, draft in self._pairs
            for step in range(1 + len(draft))
        ]
        mx.async_eval(self._logits)

    @property
    def _pairs(self) -> list[tuple[Sequence, list[int]]]:
        return list(zip(self.rows, self.drafts, strict=True))

    def read(self, masks: NDArray[np.uint32] | None = None) -> list[list[Result]]:
        """Waits: of each row the choices up to the first that was not guessed, which is the last.

        masks [B, words] as in sampler.sample; only rows without a guess may need theirs.
        """
        sizes = [1 + len(draft) for draft in self.drafts]
        found = sample(self._logits, self._samplers, None if masks is None else np.repeat(masks, sizes, axis=0))
        results = read(found, self._samplers)
        runs, first = [], 0
        for row, draft in self._pairs:
            right = 0
            while right < len(draft) and results[first + right][0] == draft[right]:
                right += 1
            row.sampler = self._samplers[first + right]
            runs.append(results[first : first + right + 1])
            first += 1 + len(draft)
        self._rows.commit([len(run) for run in runs])
        for row, run in zip(self.rows, runs, strict=True):
            row.launched += len(run)
        return runs
