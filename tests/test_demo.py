"""The embedded model: the same text as transformers gave on the same files, and right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mlxvlm
from mlxvlm.messages import ImagePart, Message, TextPart
from tests.golden import GOLDENS

DEMO = Path(mlxvlm.__file__).parent / "demo"
ITEMS: list[dict[str, Any]] = json.loads((GOLDENS / "demo" / "golden.json").read_text())["items"]
RIGHT = 0.95


def messages_of(item: dict[str, Any]) -> list[Message]:
    images = iter(item["images"])
    return [
        Message(
            turn["role"],
            tuple(
                ImagePart(GOLDENS / "demo" / next(images)) if part["type"] == "image" else TextPart(part["text"])
                for part in turn["content"]
            ),
        )
        for turn in item["messages"]
    ]


def answered(isq: str | None = None) -> list[mlxvlm.Completion]:
    with mlxvlm.load("demo", isq=isq, isq_cache=False) as engine:
        sampling = mlxvlm.SamplingParams(max_tokens=48)
        streams = [engine.submit(mlxvlm.Request(messages_of(item), sampling)) for item in ITEMS]
        return [stream.result() for stream in streams]


@pytest.fixture(scope="module")
def answers() -> list[mlxvlm.Completion]:
    return answered()


def test_there_are_enough_pictures() -> None:
    assert len({image for item in ITEMS for image in item["images"]}) >= 50


def test_text_equals_transformers(answers: list[mlxvlm.Completion]) -> None:
    for item, answer in zip(ITEMS, answers, strict=True):
        assert answer.text == item["text"], item["messages"]
        assert answer.usage.prompt_tokens == item["seq_len"]


def test_answers_are_right(answers: list[mlxvlm.Completion]) -> None:
    right = [answer.text.strip() == item["answer"].strip() for item, answer in zip(ITEMS, answers, strict=True)]
    assert sum(right) / len(right) >= RIGHT


def test_eight_bits_keep_the_tokens(answers: list[mlxvlm.Completion]) -> None:
    same = [a.token_ids == b.token_ids for a, b in zip(answered("8@32"), answers, strict=True)]
    assert sum(same) / len(same) >= 0.95


def test_four_bits_keep_the_right_answers(answers: list[mlxvlm.Completion]) -> None:
    right = [answer.text.strip() == item["answer"].strip() for item, answer in zip(ITEMS, answers, strict=True)]
    quantised = zip(answered("4"), ITEMS, right, strict=True)
    kept = [answer.text.strip() == item["answer"].strip() for answer, item, was_right in quantised if was_right]
    assert sum(kept) / len(kept) >= 0.90


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 4_000_000
    config = json.loads((DEMO / "config.json").read_text())
    assert config["text_config"]["vocab_size"] <= 512
    assert config["architectures"] == ["Idefics3ForConditionalGeneration"]
