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


@pytest.fixture(scope="module")
def answers() -> list[mlxvlm.Completion]:
    with mlxvlm.load("demo") as engine:
        sampling = mlxvlm.SamplingParams(max_tokens=48)
        streams = [engine.submit(mlxvlm.Request(messages_of(item), sampling)) for item in ITEMS]
        return [stream.result() for stream in streams]


def test_there_are_enough_pictures() -> None:
    assert len({image for item in ITEMS for image in item["images"]}) >= 50


def test_text_equals_transformers(answers: list[mlxvlm.Completion]) -> None:
    for item, answer in zip(ITEMS, answers, strict=True):
        assert answer.text == item["text"], item["messages"]
        assert answer.usage.prompt_tokens == item["seq_len"]


def test_answers_are_right(answers: list[mlxvlm.Completion]) -> None:
    right = [answer.text.strip() == item["answer"].strip() for item, answer in zip(ITEMS, answers, strict=True)]
    assert sum(right) / len(right) >= RIGHT


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 4_000_000
    config = json.loads((DEMO / "config.json").read_text())
    assert config["text_config"]["vocab_size"] <= 512
    assert config["architectures"] == ["Idefics3ForConditionalGeneration"]
