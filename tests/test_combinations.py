"""Everything at once, in every family: guesses, shifts, files, caches, cancels, any chunks.

Not quantised keys and values, whose noise is larger: a key that differs in its last bit may round to the next step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.engine.stream import collect
from tests.checkpoint.wide import CASES
from tests.test_kv_families import LOGPROB, SCENARIOS, Wide

WAYS: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True},
    {"ignore_eos": True, "temperature": 0.9, "top_p": 0.9, "seed": 1, "repetition_penalty": 1.2},
    {"ignore_eos": True, "dry_multiplier": 0.8, "temperature": 0.7, "seed": 2},
    {"ignore_eos": True, "logit_bias": {7: 30.0}},  # says the same again and again: guesses hold
)
ROOM = 12  # tokens that the context has after the longest prompt
COUNT = 20


class Row(NamedTuple):
    prompt: int
    way: int
    waits: int  # until so many tokens of the row before it are there
    leaves: int | None


ROWS = st.builds(
    Row,
    st.integers(0, len(SCENARIOS) - 1),
    st.integers(0, len(WAYS) - 1),
    st.integers(0, 6),
    st.none() | st.integers(0, COUNT),
)
KEPT = st.fixed_dictionaries(
    {
        "speculation": st.sampled_from(["on", "off"]),
        "prefill_chunk": st.integers(1, 60),
        "prefill_chunk_while_decoding": st.integers(1, 60),
        "prefix_block_tokens": st.integers(1, 9),
        "prefix_cache_bytes": st.sampled_from([0, 20_000, 1 << 24]),
        "feature_cache_bytes": st.sampled_from([0, 10_000, 1 << 24]),
        "max_rows": st.integers(1, 4),
    }
)


class Setting(NamedTuple):
    wide: Wide
    folder: Path  # of blocks, which all examples share
    alone: dict[Any, Completion]

    def question(self, prompt: int, way: int) -> Request:
        used = len(self.wide.prompts[prompt].token_ids)
        count = min(self.wide.source.max_context - used, ROOM) + COUNT
        return Request(
            sampling=SamplingParams(**WAYS[way], max_tokens=count, top_logprobs=0), prompt=self.wide.prompts[prompt]
        )

    def expected(self, prompt: int, way: int) -> Completion:
        key = (prompt, way)
        if key not in self.alone:
            with self.wide.engine(speculation="off", context_shift=True) as engine:
                self.alone[key] = engine.generate(self.question(prompt, way))
        return self.alone[key]


@pytest.fixture(scope="module", params=CASES)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    wide = Wide(tmp_path_factory.mktemp(request.param), request.param)
    longest = max(len(prompt.token_ids) for prompt in wide.prompts)
    wide.source = replace(wide.source, max_context=longest + ROOM)
    with tempfile.TemporaryDirectory() as folder:
        yield Setting(wide, Path(folder), {})


@settings(max_examples=4, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=2, max_size=5),
    kept=KEPT,
    is_on_disk=st.booleans(),
)
def test_each_row_is_what_it_is_alone(
    setting: Setting, rows: list[Row], kept: dict[str, Any], is_on_disk: bool
) -> None:
    expected = [setting.expected(row.prompt, row.way) for row in rows]
    files = {"prefix_cache_dir": setting.folder, "prefix_cache_eager": True, "model_id": "wide"} if is_on_disk else {}
    with setting.wide.engine(context_shift=True, **kept, **files) as engine:
        streams, read = [], []
        for row in rows:
            if streams:
                read[-1] += islice(streams[-1], row.waits)
            streams.append(engine.submit(setting.question(row.prompt, row.way)))
            read.append([])
        for row, stream, deltas in zip(rows, streams, read, strict=True):
            if row.leaves is not None:
                deltas += islice(stream, row.leaves)
                stream.cancel()
        answers = [collect([*deltas, *stream]) for stream, deltas in zip(streams, read, strict=True)]
    for row, answer, truth in zip(rows, answers, expected, strict=True):
        length = len(answer.token_ids)
        assert answer.token_ids == truth.token_ids[:length]
        assert row.leaves is not None or (answer.text, answer.finish_reason) == (truth.text, truth.finish_reason)
        pairs = zip(answer.logprobs, truth.logprobs[:length], strict=True)
        assert max((abs(one.logprob - other.logprob) for one, other in pairs), default=0.0) <= LOGPROB
