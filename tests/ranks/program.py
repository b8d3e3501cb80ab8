"""What each rank of a test runs: `python -m tests.ranks.program JOBS`, with the environment of mlx.launch.

JOBS: a JSON list of checkpoints and how to load them. Rank 0 asks each on its own and with all ranks, and writes a line
of JSON for it: its name, and what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint.load import LoadOptions, ModelSource, open_model
from mlxvlm.engine import kv_cache
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.models.shares import Share
from mlxvlm.processors.base import Prompt
from mlxvlm.ranks.place import Member, find_place
from mlxvlm.ranks.roles import Lead, take_part
from tests.golden import GOLDENS, Case
from tests.test_schedules import BLOCK, LONGEST, NAMES, SCHEDULE, Row, Setting, Watched

FEW = 4  # tokens
KEPT = st.tuples(st.sampled_from([0, 2, 9, 30]), st.sampled_from([0, 10_000, 1 << 20]))
ROWS = st.builds(
    Row, st.integers(0, 20), NAMES, st.integers(1, LONGEST), st.none() | st.none() | st.integers(1, LONGEST)
)


@dataclass(frozen=True)
class Job:
    """A checkpoint, the golden case whose prompts it is asked, and how it is loaded."""

    name: str
    folder: str
    golden: str
    isq: str | None = None
    kv_bits: int | None = None
    examples: int = 3  # random schedules
    is_brief: bool = False

    @cached_property
    def source(self) -> ModelSource:
        return open_model(self.folder)

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        case = Case(GOLDENS / self.golden)
        return {name: self.source.processor(case.messages(name), case.template) for name in case.scenarios}

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            self.source.max_context,
            frozenset(),
            kv_bits=self.kv_bits,
            kv_group_size=32,
            prefill_chunk_while_decoding=64,
            prefix_block_tokens=BLOCK,
        )

    def build(self, progress: Any, share: Share | None = None) -> VisionLanguageModel:
        return self.source.build(LoadOptions("float32", isq=self.isq), progress, share)


@dataclass(frozen=True)
class Alone:
    """What one rank answers; in the place of a Case."""

    answers: dict[str, list[int]]

    def expected(self, scenario: str) -> dict[str, Any]:
        return {"greedy": self.answers[scenario]}


class Watching(Lead):
    """Whose model is watched."""

    def build(self, progress: Any) -> VisionLanguageModel:
        self.watched = Watched(super().build(progress))
        return self.watched


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=LONGEST, ignore_eos=True, temperature=0.9, top_p=0.95, seed=seed)


def answers_of(engine: Engine, prompts: dict[str, Prompt]) -> tuple[dict[str, list[int]], list[list[int]]]:
    """Each prompt on its own: greedy, and some sampled."""
    greedy = SamplingParams(max_tokens=LONGEST, ignore_eos=True)
    alone = {
        name: list(engine.generate(Request(prompt=prompt, sampling=greedy)).token_ids)
        for name, prompt in prompts.items()
    }
    return alone, sampled_of(engine, prompts)


def sampled_of(engine: Engine, prompts: dict[str, Prompt]) -> list[list[int]]:
    """Of all prompts together."""
    streams = [
        engine.submit(Request(prompt=prompt, sampling=sampled(seed))) for seed, prompt in enumerate(prompts.values())
    ]
    return [list(stream.result().token_ids) for stream in streams]


@contextmanager
def both(job: Job, member: Member) -> Iterator[tuple[Setting, list[list[int]]]]:
    """The engine of all ranks, and what one rank alone says."""
    with Engine(job.build, job.source.processor, job.config) as one:
        alone, seeded = answers_of(one, job.prompts)
    lead = Watching(member, job.build, {"the job": job.name})
    with Engine(lead.build, job.source.processor, job.config, ranks=lead) as engine:
        yield Setting(Alone(alone), engine, lead.watched, job.prompts, {}), seeded  # type: ignore[arg-type]


def check(job: Job, member: Member) -> None:
    with both(job, member) as (setting, seeded):
        expected: dict[str, list[int]] = setting.case.answers  # type: ignore[attr-defined]
        if job.is_brief:
            check_together(setting, expected)
            return
        greedy, found = answers_of(setting.engine, job.prompts)
        assert greedy == expected, "alone"
        assert found == seeded, "sampled"
        hits = setting.engine.stats().prefix_cache.hits
        assert sampled_of(setting.engine, job.prompts) == seeded, "with warm prefixes"
        assert setting.engine.stats().prefix_cache.hits > hits
        setting.check(SCHEDULE)

        @settings(max_examples=job.examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(rows=st.lists(ROWS, min_size=2, max_size=7), kept=KEPT)
        def any_schedule(rows: Sequence[Row], kept: tuple[int, int]) -> None:
            setting.keep(*kept)
            setting.check(rows)

        any_schedule()


def check_together(setting: Setting, expected: dict[str, list[int]]) -> None:
    """All prompts at once, twice, the second time with one that is cancelled."""
    few = SamplingParams(max_tokens=FEW, ignore_eos=True)
    for is_cancelled in (False, True):
        streams = {
            name: setting.engine.submit(Request(prompt=prompt, sampling=few))
            for name, prompt in setting.prompts.items()
        }
        if is_cancelled:
            cancelled = streams.pop(next(iter(streams)))
            next(iter(cancelled))
            cancelled.cancel()
        for name, stream in streams.items():
            assert list(stream.result().token_ids) == expected[name][:FEW], name


def main() -> None:
    place = find_place(os.environ)
    assert place is not None
    member = Member(place)
    kv_cache._SHORT = 32  # so that rows change groups
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        job = Job(**entry)
        if member.follows:
            with suppress(SystemExit):
                take_part(member, job.build, {"the job": job.name}, None, (job.kv_bits, 32))
            continue
        problem = ""
        try:
            check(job, member)
        except BaseException:  # noqa: BLE001 - the test that reads the line fails with it
            problem = traceback.format_exc()
        print(json.dumps({"name": job.name, "problem": problem}), flush=True)
        if problem:
            sys.exit(1)


if __name__ == "__main__":
    main()
