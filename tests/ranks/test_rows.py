"""Rank 0's messages, done elsewhere: the same rows, lengths and blocks, and an error where the two have come apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxvlm.engine import runner
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.rows import Alone, Rows
from mlxvlm.engine.sampler import sample
from mlxvlm.errors import InternalError, RanksError
from mlxvlm.models.base import KVSpec, VisionLanguageModel
from mlxvlm.models.shares import Rank
from mlxvlm.ranks.follower import FollowerRows, follow
from mlxvlm.ranks.leader import LeaderRows
from mlxvlm.ranks.shard import Shard
from tests.fakes import eventually, is_empty
from tests.golden import GOLDENS, Case
from tests.ranks.program import KEPT, ROWS
from tests.test_schedules import BLOCK, Row, Setting, Watched

FAMILIES = ("llama4_norms", "mllama_tiles", "qwen2_vl_window")


def shard_of(case: Case, index: int) -> Shard:
    """All of a model; a group of one adds nothing to what it has, but would gather too few logits."""
    shard = Shard(case.build(), Rank(index, 2), mx.distributed.init())
    shard._has_head = False
    return shard


class Recorded(Alone):
    """Ranks that only write down what they are told."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def rows(self, model: VisionLanguageModel, specs: Sequence[KVSpec]) -> Rows:
        self.held: LeaderRows = LeaderRows(model, specs, self.tell)  # type: ignore[arg-type]
        return self.held

    def tell(self, message: list[Any]) -> None:
        self.messages.append(json.loads(json.dumps(message)))  # as it would arrive


class Both(NamedTuple):
    """An engine, what it tells, and rows that follow it."""

    setting: Setting
    ranks: Recorded
    theirs: FollowerRows

    def follow(self) -> None:
        """Does what was told since the last time, when all answers have ended."""
        assert eventually(lambda: is_empty(self.setting.engine))
        messages = list(self.ranks.messages)
        del self.ranks.messages[: len(messages)]
        follow(self.theirs, messages)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    case, ranks, watched = Case(GOLDENS / request.param), Recorded(), []

    def build(progress: Any) -> VisionLanguageModel:
        watched.append(Watched(shard_of(case, 0)))
        return watched[0]

    source, model = case.open(), shard_of(case, 1)
    config = EngineConfig(
        source.max_context,
        frozenset(),
        prefill_chunk_while_decoding=64,
        prefix_block_tokens=BLOCK,
        speculation="on",
        max_draft_tokens=3,
    )
    prompts = {name: source.processor(case.messages(name), case.template) for name in case.scenarios}
    with Engine(build, source.processor, config, ranks=ranks) as engine:
        yield Both(Setting(case, engine, watched[0], prompts, {}), ranks, FollowerRows(model, model.kv_specs))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROWS, min_size=2, max_size=6), kept=KEPT)
def test_who_follows_has_the_same_rows(both: Both, rows: list[Row], kept: tuple[int, int]) -> None:
    both.setting.keep(*kept)
    both.setting.check(rows)
    both.follow()
    theirs, ours = both.theirs, both.ranks.held
    prefixes = both.setting.engine._runner.prefixes
    assert {block.number for block in prefixes._blocks.values()} <= set(theirs._blocks)
    assert theirs.batch.owners == ours.batch.owners
    assert theirs._lengths == ours._lengths
    for held in (theirs, ours):
        assert not held._alone
        assert not held._prompts
        assert not held._states
    # Nothing is kept for good: the next row tells of what is dropped.
    both.setting.keep(0, 0)
    both.setting.check([Row(0, "text_only", 2)])
    both.follow()
    assert not theirs._blocks


def test_who_follows_tries_rows_alone_too(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def failing(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise InternalError("a step failed")
        return sample(*args)

    monkeypatch.setattr(runner, "sample", failing)
    monkeypatch.setattr(both.setting.engine._decoding._speculation, "drafts", lambda rows: {})
    both.setting.check([Row(0, "text_only", 9), Row(0, "text_only", 9)])
    assert [message[0] for message in both.ranks.messages].count("attempt") >= 1
    both.follow()
    assert both.theirs._lengths == both.ranks.held._lengths


def following() -> FollowerRows:
    model = shard_of(Case(GOLDENS / "qwen2_vl_window"), 1)
    rows = FollowerRows(model, model.kv_specs)
    rows.do("begin", 1, [], 0)
    rows.do("keep", 1, {"length": 3, "delta": 0, "has_positions": False, "pictures": 0, "vision": None})
    rows.do("fill", 1, 0, 3)
    rows.do("join", 1)
    rows.do("order", 1)
    return rows


def test_rows_of_other_lengths() -> None:
    with pytest.raises(RanksError, match=r"rank 1 has rows of \[3\] tokens, not \[4\]"):
        following().do("run", [1, 1], None, [4])


def test_a_message_that_is_unknown() -> None:
    with pytest.raises(RanksError, match="'dance', which is unknown"):
        following().do("dance", 1)
