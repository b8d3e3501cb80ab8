"""Calls through the engine: a model that says anything, held to a call by its grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlxvlm.agent.formats import Tool
from mlxvlm.engine.engine import Engine, EngineConfig
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import UsageError
from mlxvlm.processors.base import Prompt
from tests.agent.templates import ALL, END, TOKENIZER, format_of
from tests.agent.test_parser import whole
from tests.engine.random_model import RandomModel
from tests.fakes import FakeProcessor

COLOUR = {"enum": ["red", "blue"]}
PAINT = Tool("paint", "", {"properties": {"colour": COLOUR}, "required": ["colour"], "additionalProperties": False})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    processor = FakeProcessor()
    processor.tokenizer, processor.image_token_id = TOKENIZER, 258
    model = RandomModel()
    with Engine(lambda progress: model, processor, EngineConfig(4096, frozenset([END]))) as engine:
        yield engine


def ask(engine: Engine, **sampling: Any) -> Any:
    return engine.submit(Request(sampling=SamplingParams(**{"max_tokens": 200, **sampling}), prompt=Prompt((1, 2, 3))))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(4))
def test_a_required_call(engine: Engine, name: str, seed: int) -> None:
    format = format_of(ALL[name], TOKENIZER)
    grammar = format.grammar((PAINT,), "required", parallel=False)
    parser = format.parser((PAINT,), constrained=True)
    visible = format.visible_token_ids
    pieces: list[Any] = []
    for delta in ask(engine, grammar=grammar, visible_token_ids=visible, temperature=1.0, seed=seed):
        pieces += parser.feed(delta)
    [(called, arguments)] = whole([*pieces, *parser.finish()])
    assert called == "paint"
    assert json.loads(arguments)["colour"] in ("red", "blue")


def test_only_visible_special_tokens_are_shown(engine: Engine) -> None:
    marker, other = (TOKENIZER.token_id(name) or 0 for name in ("[TOOL_CALLS]", "<|python_tag|>"))
    bias = {marker: 100.0, other: 100.0}
    plain = ask(engine, logit_bias=bias, max_tokens=50).result()
    shown = ask(engine, logit_bias=bias, max_tokens=50, visible_token_ids=[marker]).result()
    assert set(plain.token_ids) == {marker, other}
    assert plain.token_ids == shown.token_ids
    assert plain.text == ""
    assert shown.text == "[TOOL_CALLS]" * shown.token_ids.count(marker)


def test_stop_strings_see_visible_tokens(engine: Engine) -> None:
    marker = TOKENIZER.token_id("[TOOL_CALLS]") or 0
    bias = {marker: 100.0}
    stopped = ask(engine, logit_bias=bias, visible_token_ids=[marker], stop=["CALLS][TOOL"]).result()
    assert stopped.text == "[TOOL_"
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("wrong", [[-1], ["a"], [1.5], 7])
def test_ids_that_are_none(engine: Engine, wrong: Any) -> None:
    with pytest.raises(UsageError, match="visible_token_ids"):
        ask(engine, visible_token_ids=wrong)


def test_ids_that_the_tokenizer_does_not_have(engine: Engine) -> None:
    assert ask(engine, visible_token_ids=[10**6], max_tokens=3).result().token_ids
