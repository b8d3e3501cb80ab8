"""Rows that join and leave a batch at any step give the tokens that they give alone: transformers' own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine import kv_cache
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.engine.stream import Stream
from mlxvlm.models.base import Inputs, RowState, VisionLanguageModel
from mlxvlm.processors.base import Prompt
from tests.fakes import eventually
from tests.golden import GOLDENS, Case

LONGEST = 24  # tokens that a golden has
BLOCK = 7  # tokens that the prefix cache keeps together


class Row(NamedTuple):
    """A request that comes in during decode step `join` and wants `max_tokens`, or is cancelled in a later step."""

    join: int
    scenario: str
    max_tokens: int = LONGEST
    cancel: int | None = None


class Watched:
    """A model that tells the number of each decode step before it runs."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self.plan: Plan | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: Inputs, cache: Sequence[Any]) -> mx.array:
        return self._model(inputs, cache)

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        if self.plan is not None:
            self.plan.step(len(rows))
        return self._model.embed_tokens(token_ids, rows)


class Plan:
    """Submits and cancels rows from inside decode steps, so that the engine's next tick finds them."""

    def __init__(self, engine: Engine, prompts: dict[str, Prompt], rows: Sequence[Row]) -> None:
        self._engine, self._prompts, self._rows = engine, prompts, rows
        self.streams: dict[int, Stream] = {}
        self.sizes: list[int] = []  # rows in each step
        self._lock = threading.Lock()  # around starting: the last step may still run when all answers are read

    def start(self, index: int) -> None:
        with self._lock:
            if index not in self.streams:
                self._submit(index, self._rows[index])

    def _submit(self, index: int, row: Row) -> None:
        sampling = SamplingParams(max_tokens=row.max_tokens, ignore_eos=True, top_logprobs=0)
        self.streams[index] = self._engine.submit(Request(sampling=sampling, prompt=self._prompts[row.scenario]))

    def step(self, size: int) -> None:
        self.sizes.append(size)
        number = len(self.sizes)
        for index, row in enumerate(self._rows):
            if index not in self.streams and row.join <= number:
                self.start(index)
                assert eventually(lambda: not self._engine._commands.empty())
            if index in self.streams and row.cancel == number:
                self.streams[index].cancel()

    def run(self) -> list[Completion]:
        """Starts the first row and waits; a row whose step never comes starts when all others have ended."""
        answers: dict[int, Completion] = {}
        while len(answers) < len(self._rows):
            running = [index for index in list(self.streams) if index not in answers]
            if not running:
                self.start(min(set(range(len(self._rows))) - set(answers)))
            for index in running:
                answers[index] = self.streams[index].result()
        return [answers[index] for index in range(len(self._rows))]


class Setting(NamedTuple):
    case: Case
    engine: Engine
    model: Watched
    prompts: dict[str, Prompt]
    singles: dict[str, list[float]]

    def keep(self, blocks: int, features: int) -> None:
        """Sets the sizes of the caches, the features' in bytes."""
        runner = self.engine._runner
        runner.prefixes.max_bytes = (
            blocks * BLOCK * sum(spec.bytes_per_token(mx.float32) for spec in runner.model.kv_specs)
        )
        runner.features.max_bytes = features
        runner.prefixes.shrink(runner.prefixes.max_bytes)
        runner.features.shrink(features)

    def check(self, rows: Sequence[Row]) -> list[int]:
        """Runs rows together and compares each with what it is alone; the sizes of the batch."""
        self.model.plan = plan = Plan(self.engine, self.prompts, rows)
        for row, answer in zip(rows, plan.run(), strict=True):
            expected = self.case.expected(row.scenario)["greedy"]
            found = list(answer.token_ids)
            assert found == expected[: len(found)], row
            assert len(found) == row.max_tokens or row.cancel is not None
            alone = self.alone(row.scenario)[: len(found)]
            assert [each.logprob for each in answer.logprobs] == pytest.approx(alone, abs=1e-4), row
        return plan.sizes

    def alone(self, scenario: str) -> list[float]:
        """The logprobs of a scenario's tokens with no other row beside it."""
        if scenario not in self.singles:
            self.model.plan = None
            sampling = SamplingParams(max_tokens=LONGEST, ignore_eos=True, top_logprobs=0)
            answer = self.engine.generate(Request(sampling=sampling, prompt=self.prompts[scenario]))
            self.singles[scenario] = [each.logprob for each in answer.logprobs]
        return self.singles[scenario]


def opened(case: Case) -> Iterator[Setting]:
    source = case.open()
    watched: list[Watched] = []

    def build(progress: Any) -> VisionLanguageModel:
        watched.append(Watched(source.build(LoadOptions("float32"), progress)))
        return watched[0]

    prompts = {scenario: source.processor(case.messages(scenario), case.template) for scenario in case.scenarios}
    config = EngineConfig(
        source.max_context, source.defaults.eos_token_ids, prefill_chunk_while_decoding=64, prefix_block_tokens=BLOCK
    )
    with Engine(build, source.processor, config) as engine:
        yield Setting(case, engine, watched[0], prompts, {})


@pytest.fixture(scope="module")
def setting(case: Case) -> Iterator[Setting]:
    yield from opened(case)


SCHEDULE = (
    Row(0, "two_images"),
    Row(1, "text_only", 7),
    Row(2, "one_tall", 15),
    Row(3, "long_text", 11),
    Row(5, "one_wide", 1),
    Row(6, "two_images", 9, cancel=12),
    Row(9, "text_only"),
    Row(11, "one_tall", 2),
    Row(16, "one_wide", 20),
)


@pytest.mark.parametrize("short", [512, 32], ids=["one-group", "groups"])
def test_rows_join_and_leave(setting: Setting, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all lengths in one buffer; and in several, which rows that grow change."""
    monkeypatch.setattr(kv_cache, "_SHORT", short)
    sizes = setting.check(SCHEDULE)
    changes = [after - before for before, after in pairwise(sizes)]
    assert max(sizes) >= 4
    assert sum(change > 0 for change in changes) >= 4
    assert sum(change < 0 for change in changes) >= 4


FAMILIES = ("idefics3_split", "llama4_norms", "llava_next_tiles", "mllama_tiles", "qwen2_vl_window", "smolvlm2_tied")
NAMES = st.sampled_from(["text_only", "one_wide", "one_tall", "one_rgba", "two_images", "long_text"])
ROWS = st.builds(
    Row, st.integers(0, 20), NAMES, st.integers(1, LONGEST), st.none() | st.none() | st.integers(1, LONGEST)
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Setting]:
    yield from opened(Case(GOLDENS / request.param))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ROWS, min_size=2, max_size=7),
    short=st.sampled_from([512, 32]),
    caches=st.tuples(st.sampled_from([0, 2, 9, 30]), st.sampled_from([0, 10_000, 1 << 20])),
)
def test_any_schedule(
    family: Setting, rows: list[Row], short: int, caches: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    family.keep(*caches)
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "_SHORT", short)
        family.check(rows)
