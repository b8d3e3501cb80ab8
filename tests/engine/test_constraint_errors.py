"""What is refused, given up or ends alone under a grammar."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.engine import constraints
from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import MAX_GRAMMAR_CHARS, Grammar, SamplingParams
from mlxvlm.errors import InputError, InternalError, UnsupportedModelError, UsageError
from tests.engine.random_model import (
    END,
    MODEL,
    TOKENIZER,
    VOCAB,
    RandomModel,
    ask,
    byte_tokenizer,
    random_engine,
)
from tests.fakes import Gate


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with random_engine(MODEL) as engine:
        yield engine


@pytest.mark.parametrize("ends", [(), (VOCAB - 1,), (VOCAB + 5,)])
def test_a_model_without_an_end_is_refused(ends: tuple[int, ...]) -> None:
    with random_engine(MODEL, ends) as engine, pytest.raises(UnsupportedModelError, match="end-of-answer"):
        engine.generate(ask([1], grammar=Grammar("regex", "a")))


WRONG = [
    (Grammar("regex", "a(b"), "unclosed group, at character 2"),
    (Grammar("regex", r"a(?=b)"), "look-around.* at character 2"),
    (Grammar("regex", r"[^\s\S]"), "no text that it allows"),
    (Grammar("lark", 'start: "a" b'), r'at 1\(8\): unknown name: "b"'),
    (Grammar("lark", 'start: "a'), r"1\(10\): lexer error"),
    (Grammar("lark", 'start: start "a"'), "no text that it allows"),
    (Grammar("lark", "start: " + "(" * 40_000 + '"a"' + ")" * 40_000), "nested"),
    (Grammar("json_schema", '{"type": '), "line 1, column 10"),
    (Grammar("json_schema", "[]"), "object"),
    (Grammar("json_schema", "false"), "."),
    (Grammar("json_schema", '{"items":' * 9_000 + "{}" + "}" * 9_000), "recursion|deep"),
    (Grammar("json_schema", {"type": "strin"}), "strin"),
    (Grammar("json_schema", {"anyOf": [{"type": "null"}, {"not": {}}]}), "'not' is not supported, at #/anyOf/1"),
    (Grammar("json_schema", {"type": "array", "uniqueItems": True}), "'uniqueItems' is not supported, at #"),
    (Grammar("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    (Grammar("json_schema", {"allOf": [{"type": "null"}, {"type": "string"}]}), "Unsatisfiable"),
    (Grammar("json_schema", {"type": "integer", "minimum": 5, "maximum": 4}), "Unsatisfiable"),
    (Grammar("json_schema", {"$ref": "#"}), "no text that it allows"),
    (Grammar("json_schema", {"$ref": "http://example.com/x"}), "not present"),
    (Grammar("json_schema", {"minimum": float("nan")}), "not JSON compliant"),
    (Grammar("json_schema", {"enum": [object()]}), "not JSON"),
    (Grammar("json_schema", {"enum": ["x" * MAX_GRAMMAR_CHARS]}), "limit is 131072"),
    (Grammar("json_schema", {"enum": ["\ud800"]}), "."),
    (Grammar("llguidance", "start: x"), "line 1, column 1"),
    (Grammar("llguidance", {"grammars": []}), "empty"),
]


@pytest.mark.parametrize(("grammar", "reason"), WRONG, ids=[f"{g.kind}{i}" for i, (g, _) in enumerate(WRONG)])
def test_a_grammar_that_is_wrong_is_refused_in_one_line(engine: Engine, grammar: Grammar, reason: str) -> None:
    other = engine.submit(ask([3], max_tokens=5))
    with pytest.raises(InputError, match=reason) as error:
        engine.generate(ask([1], grammar=grammar))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert len(other.result().token_ids) == 5


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("xml", "x"), "kind"),  # type: ignore[arg-type]
        (Grammar("regex", {}), "dict"),
        (Grammar("json_schema", True), "bool"),  # type: ignore[arg-type]
        (Grammar("regex", None), "NoneType"),  # type: ignore[arg-type]
        (Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1)), "limit is 131072"),
        (Grammar("regex", "\udc00"), "surrogate"),
        ("a*", "Grammar"),
    ],
)
def test_what_is_no_grammar_is_refused_at_once(grammar: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        SamplingParams(grammar=grammar).check(VOCAB)


def test_ignore_eos_and_a_grammar_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="ignore_eos"):
        SamplingParams(grammar=Grammar("regex", "a"), ignore_eos=True).check(VOCAB)


@pytest.mark.parametrize(
    "pattern", ["(((a{1000}){1000}){1000}){1000}", r"(\w{1,1000}){1,1000}", "(.*a.*b){200}", "é" * 20000]
)
def test_huge_patterns_end_or_are_refused(engine: Engine, pattern: str) -> None:
    stream = engine.submit(ask([1], grammar=Grammar("regex", pattern), max_tokens=5))
    with suppress(InputError):
        assert len(stream.result().token_ids) <= 5
    assert len(engine.generate(ask([1], max_tokens=3)).token_ids) == 3


def test_compiling_is_given_up_after_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(constraints, "COMPILE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(constraints, "_limits", lambda: released.wait(30) and None)
    with pytest.raises(InputError, match=r"more than 0.01 s to compile"):
        engine.generate(ask([1], grammar=Grammar("regex", "a")))
    released.set()


def test_a_row_that_gets_stuck_ends_alone() -> None:
    model = RandomModel()
    a = TOKENIZER.token_id("a")
    model.table = mx.where(mx.arange(VOCAB) == a, -mx.inf, model.table)
    mx.eval(model.table)  # so that no allowed token can win
    with random_engine(model) as engine:
        other = engine.submit(ask([2], max_tokens=30, ignore_eos=True))
        with pytest.raises(InputError, match="can't go on as its regex grammar says"):
            engine.generate(ask([1], grammar=Grammar("regex", "[a]{5}")))
        assert len(other.result().token_ids) == 30
        assert not engine._runner.batch.owners or engine._runner.batch.owners == []


def test_a_failure_of_sampling_ends_its_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(rows: Any) -> Any:
        raise RuntimeError("a defect")

    with random_engine(MODEL) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._constraints, "masks", fail)
            with pytest.raises(InternalError, match="a defect"):
                engine.generate(ask([1], grammar=Grammar("regex", "a")))
        assert engine.generate(ask([1], grammar=Grammar("regex", "a"))).text == "a"


def test_the_bridge_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []

    class Backend:
        get_vocab = staticmethod(TOKENIZER.backend.get_vocab)

        def to_str(self) -> str:
            texts.append(1)
            return TOKENIZER.backend.to_str()

    tokenizer = byte_tokenizer()
    tokenizer.backend = Backend()
    rows = Constraints(tokenizer, frozenset({END}), VOCAB)
    threads = [threading.Thread(target=rows.compile, args=(Grammar("regex", "a"),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 1


def test_cancelling_a_constrained_row() -> None:
    gate = Gate()
    with random_engine(RandomModel(on_call=gate)) as engine:
        stream = engine.submit(ask([1, 2], grammar=Grammar("regex", "a*")))
        assert gate.entered.wait(30)
        stream.cancel()
        gate.opened.set()
        assert stream.result().finish_reason == "cancelled"
