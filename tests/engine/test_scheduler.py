"""Turns: who gets a row and who a unit, with sequences that are numbers and an admission that counts."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.engine.admission import ANSWER_STEP, Need
from mlxvlm.engine.scheduler import PATIENCE, Scheduler
from mlxvlm.engine.sequence import Phase


class Job:
    """A sequence of so many units, of `size` in an Admission of sizes."""

    ids = itertools.count()

    def __init__(self, units: int, size: int = 1) -> None:
        self.id = next(Job.ids)
        self.work_left = units
        self.need = Need(size, 0, 0)
        self.pixel_bytes = 0
        self.phase = Phase.PREFILL

    def advance(self) -> None:
        self.work_left -= 1
        if not self.work_left:
            self.phase = Phase.DECODE


class Sizes:
    """An Admission where a need is its length."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: dict[int, int] = {}
        self.asked = 0

    def reserve(self, owner: int, need: Need) -> bool:
        self.asked += 1
        fits = sum(size for key, size in self.rows.items() if key != owner) + need.length <= self.budget
        if fits:
            self.rows[owner] = need.length
        return fits

    def release(self, owner: int) -> None:
        self.rows.pop(owner, None)


def scheduler_of(max_rows: int, budget: int = 10**9) -> tuple[Any, Sizes]:
    sizes = Sizes(budget)
    return Scheduler(max_rows, sizes), sizes  # type: ignore[arg-type]


ARRIVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=25)


@given(ARRIVALS, st.integers(1, 16))
def test_nobody_waits_long_for_a_unit_and_none_is_wasted(arrivals: list[tuple[int, int]], max_rows: int) -> None:
    scheduler, _ = scheduler_of(max_rows)
    due = sorted(((tick, Job(units)) for tick, units in arrivals), key=lambda pair: pair[0])
    waited: Counter[int] = Counter()  # units that others had since a job's last, or since it got a row
    total, served = sum(units for _, units in arrivals), 0
    for tick in itertools.count():
        while due and due[0][0] <= tick:
            scheduler.add(due.pop(0)[1])
        scheduler.admit()
        waiting = [job for job in scheduler._active if job.phase is Phase.PREFILL]
        chosen = scheduler.next_unit()
        assert (chosen is None) == (not waiting)
        if chosen is None:
            if not due:
                break
            continue
        served += 1
        for job in waiting:
            waited[job.id] += 1
            assert waited[job.id] <= PATIENCE + max_rows
        waited[chosen.id] = 0
        chosen.advance()
        if chosen.phase is Phase.DECODE:
            scheduler.remove(chosen)
    assert served == total
    assert not scheduler.is_busy


def test_a_short_prompt_goes_before_the_rest_of_a_long_one() -> None:
    scheduler, _ = scheduler_of(4)
    long, short = Job(1000), Job(3)
    scheduler.add(long)
    scheduler.admit()
    for _ in range(50):
        scheduler.next_unit().advance()
    scheduler.add(short)
    scheduler.admit()
    for _ in range(3):
        scheduler.next_unit().advance()
    assert short.phase is Phase.DECODE


def test_a_long_prompt_goes_on_in_a_stream_of_short_ones() -> None:
    scheduler, _ = scheduler_of(4)
    long = Job(20)
    scheduler.add(long)
    ticks = 0
    while long.phase is Phase.PREFILL:
        short = Job(1)
        scheduler.add(short)
        scheduler.admit()
        scheduler.next_unit().advance()
        for job in list(scheduler._active):
            if job.phase is Phase.DECODE and job is not long:
                scheduler.remove(job)
        ticks += 1
    assert ticks <= 20 * (PATIENCE + 4)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=40), st.integers(1, 5), st.data())
def test_rows_fit_and_nobody_is_passed_often(needs: list[int], max_rows: int, data: st.DataObject) -> None:
    scheduler, sizes = scheduler_of(max_rows, budget=10)
    jobs = [Job(1, size) for size in needs]
    running: list[Job] = []
    order: list[Job] = []
    for job in jobs:
        scheduler.add(job)
    while scheduler.is_busy:
        scheduler.admit()
        order += [job for job in scheduler._active if job not in running]
        running = list(scheduler._active)
        assert 1 <= len(running) <= max_rows
        assert sum(sizes.rows.values()) <= sizes.budget
        scheduler.remove(data.draw(st.sampled_from(running)))
        running = list(scheduler._active)
    assert not sizes.rows
    place = {job.id: index for index, job in enumerate(order)}
    for index, job in enumerate(jobs):
        assert sum(place[later.id] < place[job.id] for later in jobs[index + 1 :]) <= PATIENCE


def test_a_full_machine_is_not_asked_again_until_something_changes() -> None:
    scheduler, sizes = scheduler_of(9, budget=10)
    first, second = Job(1, 10), Job(1, 10)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(5):
        scheduler.admit()
    assert sizes.asked == 2
    scheduler.remove(first)
    scheduler.admit()
    assert scheduler._active == [second]


def test_one_that_ends_while_it_waits_is_gone() -> None:
    scheduler, _ = scheduler_of(1)
    running, waiting = Job(1), Job(1)
    running.pixel_bytes, waiting.pixel_bytes = 3, 5
    scheduler.add(running)
    scheduler.add(waiting)
    assert scheduler.queued_bytes == 8
    scheduler.admit()
    assert (scheduler.queued_bytes, scheduler.num_running) == (5, 1)
    scheduler.remove(waiting)
    scheduler.remove(waiting)
    assert scheduler.queued_bytes == 0
    scheduler.remove(running)
    assert not scheduler.is_busy
    assert not scheduler._passed


@pytest.mark.parametrize(("budget", "expected"), [(10**6, 3 * ANSWER_STEP), (ANSWER_STEP, ANSWER_STEP)])
def test_an_answer_without_a_limit_grows_in_steps(budget: int, expected: int) -> None:
    scheduler, sizes = scheduler_of(1, budget)
    row: Any = Job(1, ANSWER_STEP)
    row.launched, row.max_tokens, row.longest, row.full = 0, ANSWER_STEP, 3 * ANSWER_STEP, 9 * ANSWER_STEP
    scheduler.add(row)
    scheduler.admit()
    row.advance()
    grown = []
    while row.launched < row.max_tokens:
        scheduler.grow()
        grown.append(row.max_tokens - row.launched)
        row.launched += 1
    assert row.launched == expected == sizes.rows[row.id]
    assert max(grown) < 2 * ANSWER_STEP
