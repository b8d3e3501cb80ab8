"""Rows that are sampled, each in its own way, over random schedules: what each gives alone in a fresh engine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Delta, Request
from mlxvlm.engine.stream import Stream, collect
from mlxvlm.messages import user
from mlxvlm.processors.base import Prompt
from tests.test_prefix_families import Family, assert_same

FAMILIES = ("idefics3_split", "llama4_norms", "llava_next_tiles", "mllama_tiles", "qwen2_vl_window")
COUNT = 14  # tokens of an answer
WAYS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1),
    SamplingParams(temperature=1.0, top_k=20, repetition_penalty=1.3, frequency_penalty=0.5, seed=2),
    SamplingParams(temperature=1.5, min_p=0.05, presence_penalty=1.0, logit_bias={5: 3.0, 9: -100.0}, seed=1),
    SamplingParams(temperature=0.9, typical_p=0.7, seed=3),
    SamplingParams(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.05, dry_multiplier=0.8, seed=4),
)


class Row(NamedTuple):
    prompt: int
    way: int
    count: int
    waits: int  # until so many tokens of the row before it are there
    leaves: int | None


ROWS = st.builds(
    Row,
    st.integers(0, 3),
    st.integers(0, len(WAYS) - 1),
    st.integers(1, COUNT),
    st.integers(0, 6),
    st.none() | st.none() | st.integers(0, COUNT),
)
Alone: TypeAlias = Callable[[int, int], Completion]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


@pytest.fixture(scope="module")
def prompts(family: Family) -> list[Prompt]:
    """Of other lengths, with and without pictures, two with a common beginning."""
    wide, tall = family.picture("wide"), family.picture("tall")
    return [
        family.prompt(user("Crème brûlée?")),
        family.prompt(user("What do you see?", [wide])),
        family.prompt(user("What do you see? And where?", [wide])),
        family.prompt(user("Which one?", [tall, wide])),
    ]


@pytest.fixture(scope="module")
def alone(family: Family, prompts: list[Prompt]) -> Alone:
    found: dict[tuple[int, int], Completion] = {}

    def answer(prompt: int, way: int) -> Completion:
        if (prompt, way) not in found:
            with family.engine(prefix_cache_bytes=0, feature_cache_bytes=0) as (engine, _):
                found[prompt, way] = engine.generate(question(prompts[prompt], way, COUNT))
        return found[prompt, way]

    return answer


def question(prompt: Prompt, way: int, count: int) -> Request:
    chosen = {name: getattr(WAYS[way], name) for name in SamplingParams.__dataclass_fields__}
    chosen |= {"max_tokens": count, "ignore_eos": True, "top_logprobs": 2}
    return Request(sampling=SamplingParams(**chosen), prompt=prompt)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=2, max_size=6),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9)),
    kept=st.tuples(st.sampled_from([0, 20_000, 1 << 24]), st.sampled_from([0, 10_000, 1 << 24])),
    max_rows=st.integers(1, 5),
)
def test_each_row_is_what_it_is_alone(
    family: Family,
    prompts: list[Prompt],
    alone: Alone,
    rows: list[Row],
    sizes: tuple[int, int, int],
    kept: tuple[int, int],
    max_rows: int,
) -> None:
    chunk = dict(zip(("prefill_chunk", "prefill_chunk_while_decoding", "prefix_block_tokens"), sizes, strict=True))
    caches = {"prefix_cache_bytes": kept[0], "feature_cache_bytes": kept[1]}
    with family.engine(max_rows=max_rows, **caches, **chunk) as (engine, _):
        for row, answer in zip(rows, run(engine, prompts, rows), strict=True):
            assert len(answer.token_ids) == row.count or row.leaves is not None
            if answer.token_ids:
                assert_same(answer, cut(alone(row.prompt, row.way), len(answer.token_ids)))


def run(engine: Engine, prompts: list[Prompt], rows: list[Row]) -> list[Completion]:
    """Each row comes in when the one before it has given some tokens, and may be cancelled early."""
    streams: list[Stream] = []
    read: list[list[Delta]] = []
    for row in rows:
        if streams:
            read[-1] += islice(streams[-1], row.waits)
        streams.append(engine.submit(question(prompts[row.prompt], row.way, row.count)))
        read.append([])
    for row, stream, deltas in zip(rows, streams, read, strict=True):
        if row.leaves is not None:
            deltas += islice(stream, row.leaves)
            stream.cancel()
    return [collect([*deltas, *stream]) for stream, deltas in zip(streams, read, strict=True)]


def cut(answer: Completion, length: int) -> Completion:
    return Completion("", answer.token_ids[:length], answer.logprobs[:length], "length", answer.usage)
