"""What a tick of the engine waits for: it starts step n + 1, then reads step n, and nothing else of either."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.decoding import Decoding
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.models.base import VisionLanguageModel
from tests.golden import Case

TOKENS = 12
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 1}
WAITS = ("eval", "synchronize")
READS = ("item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each decode half of a tick does with arrays, in order; added to as engines run."""
    found: list[list[str]] = []
    inside: list[str] | None = None

    def spied(name: str, call: Any, counts: Any = lambda *_: True) -> Any:
        def spy(*arguments: Any, **named: Any) -> Any:
            if inside is not None and counts(*arguments):
                inside.append(name)
            return call(*arguments, **named)

        return spy

    def advance(self: Decoding, rows: Any, call: Any = Decoding.advance) -> None:
        nonlocal inside
        inside = []
        call(self, rows)
        found.append(inside)
        inside = None

    monkeypatch.setattr(Decoding, "advance", advance)
    monkeypatch.setattr(mx, "async_eval", spied("start", mx.async_eval))
    for name in WAITS:
        monkeypatch.setattr(mx, name, spied(name, getattr(mx, name)))
    for name in READS:
        monkeypatch.setattr(mx.array, name, spied(name, getattr(mx.array, name)))
    for name in ("array", "asarray"):  # they look into an array's buffer, past its methods
        spy = spied("read", getattr(np, name), lambda value, *_: isinstance(value, mx.array))
        monkeypatch.setattr(np, name, spy)
    return found


def run(case: Case, model: VisionLanguageModel, rows: int) -> None:
    source = case.open()
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)
    config = replace(config, prefix_cache_bytes=0, speculation="off")
    with Engine(lambda progress: model, source.processor, config) as engine:
        ways: list[dict[str, Any]] = [{}, SAMPLED]
        streams = [
            engine.submit(
                Request(
                    case.messages("two_images"),
                    SamplingParams(max_tokens=TOKENS, ignore_eos=True, **ways[row % len(ways)]),
                )
            )
            for row in range(rows)
        ]
        for stream in streams:
            stream.result()


# Of a step: what was chosen, and whether it means anything.
STARTED_THEN_READ = ["start", "read", "read"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_tick_starts_a_step_and_reads_the_one_before(case: Case, ticks: list[list[str]], rows: int) -> None:
    model = case.build()
    run(case, model, rows)
    busy = [tick for tick in ticks if tick]
    assert busy.count(STARTED_THEN_READ) >= TOKENS - 2
    # The first step has none before it, and after the last none is started.
    assert all(tick in (STARTED_THEN_READ, ["start"], ["read", "read"]) for tick in busy)


def test_a_read_in_a_step_would_be_found(case: Case, ticks: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.build()
    embed = type(model).embed_tokens

    def reading(self: Any, *arguments: Any) -> Any:
        inputs = embed(self, *arguments)
        inputs.embeds.max().item()
        return inputs

    monkeypatch.setattr(type(model), "embed_tokens", reading)
    run(case, model, 1)
    assert STARTED_THEN_READ not in ticks
    assert ["item", *STARTED_THEN_READ] in ticks
