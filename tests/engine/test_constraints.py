"""Answers under a grammar: from a model that says anything, against languages small enough to write down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.detokenizer import Detokenizer
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import Grammar
from mlxvlm.errors import InputError
from mlxvlm.processors.ggml_tokenizer import TokenType, Vocabulary, build
from mlxvlm.processors.tokenizer import Tokenizer
from tests.engine.random_model import (
    BYTES,
    END,
    IMAGE,
    MODEL,
    SIZE,
    STOP,
    TOKENIZER,
    RandomModel,
    ask,
    random_engine,
)
from tests.golden import Case


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with random_engine(MODEL) as engine:
        yield engine


# A language with few sentences, and what may come next in it, by trying all tokens.

SENTENCES = st.lists(st.text('abc120 {}:",\né', min_size=1, max_size=8), min_size=1, max_size=5)


def lark(sentences: Sequence[str]) -> Grammar:
    return Grammar("lark", "start: " + " | ".join(json.dumps(s, ensure_ascii=False) for s in sentences))


def check_sentence(sentences: Sequence[str], prompt: Sequence[int], found: Sequence[int]) -> None:
    """The slow obvious twin: each token is the best of those that some sentence goes on with.

    Where all sentences go on with the same byte, llguidance takes the tokens that the tokenizer would.
    """
    table, rest = np.array(MODEL.table), {sentence.encode() for sentence in sentences}
    for i, token in enumerate(found):
        allowed = {one for one, b in BYTES.items() if any(s.startswith(b) for s in rest)} | (
            {END} if b"" in rest else set()
        )
        assert token in allowed
        if len({s[:1] for s in rest}) > 1:
            logits = table[(sum(prompt) + sum(found[:i])) % 97]
            assert token == max(allowed, key=lambda one: logits[one])
        if token != END:
            rest = {s.removeprefix(BYTES[token]) for s in rest if s.startswith(BYTES[token])}
    assert found[-1] == END


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SENTENCES, st.lists(st.integers(0, 200), min_size=1, max_size=5)), min_size=1, max_size=4))
def test_tokens_are_the_best_of_those_that_a_small_language_allows(
    engine: Engine, questions: list[tuple[list[str], list[int]]]
) -> None:
    streams = [engine.submit(ask(ids, grammar=lark(sentences))) for sentences, ids in questions]
    for (sentences, ids), stream in zip(questions, streams, strict=True):
        completion = stream.result()
        check_sentence(sentences, ids, completion.token_ids)
        assert completion.text in sentences
        assert completion.finish_reason == "stop"


# JSON schemas, and a validator of what they use.

SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda values: {"enum": values}, st.lists(st.text("ab\"\\é\n", max_size=3), min_size=1, max_size=3)),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
              st.integers(-200, 200), st.integers(0, 300)),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
              st.integers(0, 3), st.integers(0, 4)),
    st.just({"type": "string", "pattern": "^[a-c]{2,4}-[0-9]?$"}),
)  # fmt: skip


NAMES = st.text('abé"{', min_size=1, max_size=3)


def an_object(properties: dict[str, Any], required: int) -> dict[str, Any]:
    names = list(properties)[:required]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda items, least, more: {"type": "array", "items": items, "minItems": least,
                  "maxItems": least + more}, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(an_object, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3)),
        st.builds(lambda either: {"anyOf": either}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)  # fmt: skip


def is_valid(value: Any, schema: Mapping[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(is_valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = {"boolean": bool, "null": type(None), "integer": int, "string": str, "array": list, "object": dict}
    if type(value) is not kinds[schema["type"]]:
        return False
    if schema["type"] == "integer":
        return schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "string":
        in_length = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
        return in_length and (re.search(schema["pattern"], value) is not None if "pattern" in schema else True)
    if schema["type"] == "array":
        in_length = schema["minItems"] <= len(value) <= schema["maxItems"]
        return in_length and all(is_valid(item, schema["items"]) for item in value)
    if schema["type"] == "object":
        known = set(schema["required"]) <= set(value) <= set(schema["properties"])
        return known and all(is_valid(item, schema["properties"][name]) for name, item in value.items())
    return True


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.lists(st.integers(0, 200), min_size=1, max_size=3), st.booleans(), st.integers(0, 9), st.booleans())
def test_any_model_answers_in_valid_json(
    engine: Engine, schema: dict[str, Any], ids: list[int], hot: bool, seed: int, as_text: bool
) -> None:
    grammar = Grammar("json_schema", json.dumps(schema) if as_text else schema)
    completion = engine.generate(ask(ids, grammar=grammar, temperature=2.0 * hot, seed=seed))
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == END
    assert is_valid(json.loads(completion.text), schema), (completion.text, schema)


REGEXES = ("a", "[a-c]{1,5}", "(12|00)+x{3}|é", "[0-9]{4}-[0-9]", '"[^"]{0,9}"', "(a|ab)(c|bcd){2}", ".{3}", "")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("pattern", REGEXES)
def test_any_model_answers_as_a_regular_expression_says(engine: Engine, pattern: str, temperature: float) -> None:
    for seed in range(5):
        sampling = {"temperature": temperature, "seed": seed, "max_tokens": 50}
        completion = engine.generate(ask([seed, 1], grammar=Grammar("regex", pattern), **sampling))
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, completion.text, re.DOTALL), completion.text
        else:
            assert "+" in pattern


PERSON = {
    "type": "object",
    "properties": {
        "näme": {"type": "string", "maxLength": 9},
        "ages": {"type": "array", "items": {"enum": [1, 22, 333]}},
    },
    "required": ["näme", "ages"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return set(value) == {"näme", "ages"} and len(value["näme"]) <= 9 and set(value["ages"]) <= {1, 22, 333}


def test_a_model_that_wants_nothing_but_spaces_comes_to_an_end(engine: Engine) -> None:
    spaces = {token: 100.0 for token, b in BYTES.items() if b and not b.strip()}
    answer = engine.generate(ask([1], grammar=Grammar("json_schema", PERSON), logit_bias=spaces, max_tokens=1000))
    assert answer.finish_reason == "stop"
    assert is_person(json.loads(answer.text))


def test_any_object(engine: Engine) -> None:
    for seed in range(8):
        sampling = {"temperature": 1.0, "seed": seed, "max_tokens": 200, "logit_bias": {TOKENIZER.token_id("}"): 9.0}}
        completion = engine.generate(ask([seed], grammar=Grammar("json_object"), **sampling))
        assert completion.finish_reason == "length" or isinstance(json.loads(completion.text), dict)


def test_llguidances_own_form(engine: Engine) -> None:
    own = {"grammars": [{"lark_grammar": 'start: "a" /b{2}/'}]}
    for value in (own, json.dumps(own)):
        assert engine.generate(ask([1], grammar=Grammar("llguidance", value))).text == "abb"


def test_placeholders_and_ids_beyond_the_tokenizer_never_come(engine: Engine) -> None:
    for seed in range(10):
        sampling = {"temperature": 100.0, "seed": seed, "max_tokens": 40}
        completion = engine.generate(ask([1], grammar=Grammar("regex", "(?s:.)*"), **sampling))
        assert all(token < SIZE and token not in (IMAGE, STOP) for token in completion.token_ids)


def test_a_tokenizer_larger_than_the_model() -> None:
    model = RandomModel()
    model.vocab_size = small = 100
    model.table = model.table[:, :small]
    a = TOKENIZER.token_id("a")
    ends = frozenset({TOKENIZER.token_id("!") or 0, END})
    rows = Constraints(TOKENIZER, ends, small)
    constraint = rows.compile(Grammar("regex", "a|aa|é"))
    mask = np.unpackbits(rows.masks([(constraint, [])]).view(np.uint8), bitorder="little")
    assert np.flatnonzero(mask).tolist() == [a]
    with pytest.raises(InputError, match="the model has no token to begin with"):
        rows.compile(Grammar("regex", "é"))
    stuck = rows.compile(Grammar("regex", "aé"))
    rows.masks([(stuck, [a])])
    assert "no token for what must come" in str(stuck.error)


def test_every_family_s_tokenizer_gives_valid_text(case: Case) -> None:
    walk(case.open().processor.tokenizer)


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece_gives_valid_text(adds_space: bool) -> None:
    walk(build(sentencepiece(adds_space)))


def sentencepiece(adds_space: bool) -> Vocabulary:
    space = "\u2581"
    pieces = [space, f"{space}a", "ab", f"{space}1", *'abnme{}[]":,123', "ä", '":', f"{space}}}", space * 2]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{code:02X}>" for code in range(256)), *pieces]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * len(pieces)
    special = {"unk_token": 0, "bos_token": 1, "eos_token": 2}
    return Vocabulary("llama", "", tokens, types, scores=[0.0] * len(tokens), special=special, adds_space=adds_space)


def walk(tokenizer: Tokenizer) -> None:
    """Any path through the masks, decoded, is what the grammar wants."""
    eos = tokenizer.token_id(tokenizer.special_tokens["eos_token"])
    assert eos is not None
    rows = Constraints(tokenizer, frozenset({eos}), tokenizer.backend.get_vocab_size() + 5)
    for seed in range(5):
        dice, tokens = np.random.default_rng(seed), []
        constraint = rows.compile(Grammar("json_schema", PERSON))
        while not tokens or tokens[-1] != eos:
            bits = np.unpackbits(rows.masks([(constraint, tokens)]).view(np.uint8), bitorder="little")
            tokens.append(int(dice.choice(np.flatnonzero(bits))))
        pieces = Detokenizer(tokenizer.decode)
        text = "".join(map(pieces.feed, tokens)) + pieces.flush()
        assert text == tokenizer.decode(tokens)
        assert is_person(json.loads(text)), text
