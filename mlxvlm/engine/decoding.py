"""Decode steps of all rows: which one is started when, and what comes out of it. Knows no prompts and no threads.

A step is started before the one before it is read, so the device never waits for Python; only where guesses of the
next tokens may be had, tokens are read first. docs/engine.md has both orders.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.drafts import Speculation
from mlxvlm.engine.runner import ModelRunner, Step
from mlxvlm.engine.sampler import Result, read
from mlxvlm.engine.sequence import Sequence
from mlxvlm.engine.verify import Verification
from mlxvlm.errors import InputError, InternalError, MlxvlmError


class Ends(NamedTuple):
    """How requests end: with the error of some work for them, with an error, or well; or how they go on."""

    guarded: Callable[[Seq[Sequence], Callable[[], None]], bool]
    fail: Callable[[Seq[Sequence], MlxvlmError], None]
    forget: Callable[[Sequence], None]
    shift: Callable[[Sequence], None]


@dataclass
class Counts:
    """Totals since an engine's start; see EngineStats."""

    steps: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Decoding:
    """The decode half of a tick."""

    def __init__(
        self, runner: ModelRunner, constraints: Constraints, speculation: Speculation, ends: Ends, counts: Counts
    ) -> None:
        self.pending: Step | None = None  # runs on the device, and is not read yet
        self._runner = runner
        self._constraints = constraints
        self._speculation = speculation
        self._ends = ends
        self._counts = counts

    def advance(self, decoding: list[Sequence]) -> None:
        """One step of all rows, which gives each the tokens that were guessed right and one more.

        Without guesses a step is started, then the one before is read: some of its rows may have had their last in it.
        """
        self._fail_lost(decoding)
        if self.pending is None or self._speculation.expects(self._in_batch(decoding)):
            self._read_pending()
            if self._speculate(self._in_batch(decoding)):
                return
        previous, rows = self.pending, self._in_batch(decoding)
        self.pending = None
        # Whose failure it is comes out below; that there was one may matter to other ranks at once.
        if rows and not self._ends.guarded([], partial(self._launch, rows, previous)):
            self._launch_without_culprits(rows, previous)
        self._retire()
        if previous is not None:
            self._ends.guarded(previous.rows, partial(self._deliver, previous))
        if self.pending is not None and self.pending.sampled is None:
            self._ends.guarded(self.pending.rows, self._choose)

    def _in_batch(self, decoding: list[Sequence]) -> list[Sequence]:
        owners = set(self._runner.batch.owners)
        return [sequence for sequence in decoding if sequence.id in owners]

    def _fail_lost(self, decoding: list[Sequence]) -> None:
        """Rows neither in the batch nor with their last token on its way would never end."""
        under_way = {row.id for row in self.pending.rows} if self.pending is not None else set()
        on_their_way = under_way.union(self._runner.batch.owners)
        lost = [row for row in decoding if row.id not in on_their_way]
        if lost:
            self._ends.fail(lost, InternalError("the request has lost its keys and values"))

    def _read_pending(self) -> None:
        step, self.pending = self.pending, None
        if step is not None:
            self._ends.guarded(step.rows, partial(self._deliver, step))

    def _speculate(self, rows: list[Sequence]) -> bool:
        """Whether there were guesses. If their pass can't be started, an ordinary step tells whose error it is."""
        drafts = self._speculation.drafts(rows)
        started: list[Verification] = []
        if not drafts or not self._ends.guarded([], lambda: started.append(self._runner.verify(rows, drafts))):
            return False
        self._counts.steps += 1
        return self._ends.guarded(rows, partial(self._check, started.pop())) or True

    def _check(self, verification: Verification) -> None:
        rows = verification.rows
        runs = verification.read(self._masks(rows))
        self._fail_stuck(rows)
        for row, draft, run in zip(rows, verification.drafts, runs, strict=True):
            if draft and not row.done:
                self._speculation.settle(row, len(draft), len(run) - 1)
                row.drafted_tokens += len(draft)
                self._counts.drafted_tokens += len(draft)
        self._hand_out(rows, runs)

    def _launch(self, rows: list[Sequence], previous: Step | None) -> None:
        self.pending = self._runner.decode(rows, previous)
        self._counts.steps += 1

    def _launch_without_culprits(self, rows: list[Sequence], previous: Step | None) -> None:
        """A step has failed: rows that also fail alone end, the others get the step once more."""
        rest = [row for row in rows if self._ends.guarded([row], partial(self._runner.attempt, row, previous))]
        if rest:
            self._ends.guarded(rest, partial(self._launch, rest, previous))

    def _retire(self) -> None:
        """Rows whose last token is on its way leave the batch. What is kept of them may bring the step's own error."""
        step = self.pending
        for row in [] if step is None else step.rows:
            if step is not None and row.launched >= row.max_tokens:
                self._ends.guarded(step.rows, partial(self._runner.drop, row))

    def _choose(self) -> None:
        """Samples a step that waited for the tokens before it: the device has its forward pass to do meanwhile."""
        step, self.pending = self.pending, None
        assert step is not None
        masks = self._masks(step.rows)
        self._fail_stuck(step.rows)
        self.pending = self._runner.choose(step, masks)

    def _masks(self, rows: Seq[Sequence]) -> NDArray[np.uint32] | None:
        """What grammars allow next, once a token; None without any."""
        answers = [(row.constraint, row.token_ids) if row.constraint else None for row in rows]
        return self._constraints.masks(answers) if any(answers) else None

    def _fail_stuck(self, rows: Seq[Sequence]) -> None:
        for row in rows:
            if row.constraint is not None and row.constraint.error is not None:
                self._ends.fail([row], InputError(row.constraint.error))

    def _deliver(self, step: Step) -> None:
        """Reads a step and hands its tokens out."""
        assert step.sampled is not None
        self._hand_out(step.rows, [[result] for result in read(step.sampled, [row.sampler for row in step.rows])])

    def _hand_out(self, rows: Seq[Sequence], runs: Seq[Seq[Result]]) -> None:
        """Each row's next tokens, the last of which was not guessed; what comes after an end is passed over."""
        for row, run in zip(rows, runs, strict=True):
            for left, (token_id, is_bad, logprob) in zip(reversed(range(len(run))), run, strict=True):
                if row.done:
                    break
                if is_bad:
                    self._ends.fail([row], InternalError("the model produced NaN for this request"))
                    break
                row.accepted_tokens += left > 0
                if self._ends.guarded([row], partial(row.accept, token_id, logprob)):
                    self._counts.generated_tokens += 1
                    self._counts.accepted_tokens += left > 0
                    if row.done:
                        self._ends.forget(row)
                if row.outgrows:
                    self._ends.guarded([row], partial(self._shift, row))
                    break

    def _shift(self, row: Sequence) -> None:
        """The context is full: the row starts again from what is kept of it."""
        self._runner.drop(row)  # after guesses it is still in the batch
        self._speculation.forget(row.id)
        self._ends.shift(row)

    def forget(self, sequence: Sequence) -> None:
        """A request has ended: its row leaves."""
        # Keeping its keys and values waits for the step under way, and may be where that step's error shows.
        under_way = [] if self.pending is None else self.pending.rows
        self._ends.guarded(under_way, partial(self._runner.drop, sequence))
        self._speculation.forget(sequence.id)
