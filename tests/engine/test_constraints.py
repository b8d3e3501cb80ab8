"""Answers under a grammar: from a model that says anything, against languages small enough to write down."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from mlxvlm.engine import constraints
from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.detokenizer import Detokenizer
from mlxvlm.engine.engine import Engine, EngineConfig
from mlxvlm.engine.params import MAX_GRAMMAR_CHARS, Grammar, SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.errors import InputError, InternalError, UnsupportedModelError, UsageError
from mlxvlm.processors.base import Prompt
from mlxvlm.processors.ggml_tokenizer import TokenType, Vocabulary, build
from mlxvlm.processors.tokenizer import Tokenizer
from tests.fakes import FakeModel, FakeProcessor, Gate
from tests.golden import Case

PIECES = ('{"', '":', '",', '"}', ', "', "true", "false", "null", "aa", "ab", "abc", "bc", "12", "00", "[]", "  ", "é")


def byte_tokenizer() -> Tokenizer:
    """All bytes, some longer pieces, an end and a placeholder."""
    byte_of = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(byte_of))}
    merges = []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for piece in PIECES:
        letters = level.pre_tokenize_str(piece)[0][0]
        for end in range(2, len(letters) + 1):
            if letters[:end] not in vocab:
                vocab[letters[:end]] = len(vocab)
                merges.append((letters[: end - 1], letters[end - 1]))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    tokenizer = Tokenizer(backend, {})
    for special in ("<end>", "<image>", "<stop>"):
        tokenizer.add_special(special)
    return tokenizer


TOKENIZER = byte_tokenizer()
SIZE = TOKENIZER.backend.get_vocab_size()
VOCAB = SIZE + 37  # models round their vocabularies up
END, IMAGE, STOP = (int(TOKENIZER.token_id(name) or 0) for name in ("<end>", "<image>", "<stop>"))


class RandomModel(FakeModel):
    """Logits are noise, a pure function of the sum of all ids so far."""

    def __init__(self, seed: int = 0, on_call: Callable[[mx.array], None] | None = None) -> None:
        super().__init__(on_call=on_call)
        self.vocab_size = VOCAB
        self.table = mx.array(np.random.default_rng(seed).normal(0, 3, (97, VOCAB)).astype(np.float32))

    def logits(self, hidden: mx.array) -> mx.array:
        return self.table[hidden[..., 0].astype(mx.int32) % 97]


def random_engine(model: FakeModel, eos: Sequence[int] = (END,), max_context: int = 4096) -> Engine:
    processor = FakeProcessor()
    processor.tokenizer, processor.image_token_id = TOKENIZER, IMAGE
    return Engine(lambda progress: model, processor, EngineConfig(max_context, frozenset(eos)))


def ask(ids: Sequence[int], **sampling: Any) -> Request:
    return Request(sampling=SamplingParams(**{"max_tokens": 2000, **sampling}), prompt=Prompt(tuple(ids)))


MODEL = RandomModel()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with random_engine(MODEL) as engine:
        yield engine


# A language with few sentences, and what may come next in it, by trying all tokens.

SENTENCES = st.lists(st.text('abc120 {}:",\né', min_size=1, max_size=8), min_size=1, max_size=5)


def lark(sentences: Sequence[str]) -> Grammar:
    return Grammar("lark", "start: " + " | ".join(json.dumps(s, ensure_ascii=False) for s in sentences))


def token_bytes() -> dict[int, bytes]:
    """What each token but the special ones stands for."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [chr(code) for code in range(128)] + ["é"]
    code_of = {
        letter: code
        for text in texts
        for letter, code in zip(level.pre_tokenize_str(text)[0][0], text.encode(), strict=True)
    }
    names = ((token, TOKENIZER.backend.id_to_token(token)) for token in range(SIZE) if token not in (END, IMAGE, STOP))
    return {token: bytes(code_of.get(letter, 255) for letter in name) for token, name in names}


BYTES = token_bytes()


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


def test_any_object(engine: Engine) -> None:
    for seed in range(8):
        sampling = {"temperature": 1.0, "seed": seed, "max_tokens": 200, "logit_bias": {TOKENIZER.token_id("}"): 9.0}}
        completion = engine.generate(ask([seed], grammar=Grammar("json_object"), **sampling))
        assert completion.finish_reason == "length" or isinstance(json.loads(completion.text), dict)


def test_llguidances_own_form(engine: Engine) -> None:
    own = {"grammars": [{"lark_grammar": 'start: "a" /b{2}/'}]}
    for value in (own, json.dumps(own)):
        assert engine.generate(ask([1], grammar=Grammar("llguidance", value))).text == "abb"


ROW = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 2.0]), "seed": st.integers(0, 99), "max_tokens": st.integers(1, 20)},
    optional={
        "grammar": st.sampled_from([Grammar("regex", pattern) for pattern in REGEXES]) | st.builds(lark, SENTENCES),
        "dry_multiplier": st.sampled_from([0.8, 5.0]),
        "repetition_penalty": st.just(1.3),
        "frequency_penalty": st.just(1.5),
        "top_k": st.sampled_from([1, 5]),
        "top_p": st.just(0.7),
        "typical_p": st.just(0.6),
        "xtc_probability": st.just(0.5),
        "top_logprobs": st.sampled_from([0, 2]),
        "stop": st.just(("b",)),
    },
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ROW, st.lists(st.integers(0, 200), min_size=1, max_size=5)), min_size=2, max_size=5))
def test_rows_of_all_kinds_together_answer_as_alone(
    engine: Engine, rows: list[tuple[dict[str, Any], list[int]]]
) -> None:
    def outcome(completion: Completion) -> tuple[Any, ...]:
        return completion.text, completion.token_ids, completion.logprobs, completion.finish_reason

    alone = [outcome(engine.generate(ask(ids, **sampling))) for sampling, ids in rows]
    streams = [engine.submit(ask(ids, **sampling)) for sampling, ids in rows]
    assert [outcome(stream.result()) for stream in streams] == alone


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    completion = engine.generate(ask([5], grammar=lark(["abc"]), top_logprobs=2))
    logits = np.array(MODEL.table[5], np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    first = completion.logprobs[0]
    assert first.logprob == pytest.approx(expected[first.token_id], abs=1e-4)
    assert [token for token, _ in first.top] == np.argsort(-expected)[:2].tolist()


def test_stop_strings_and_max_tokens_come_first(engine: Engine) -> None:
    grammar = Grammar("regex", "a{9}-b")
    cut = engine.generate(ask([1], grammar=grammar, max_tokens=2))
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 2)
    stopped = engine.generate(ask([1], grammar=grammar, stop=("-",)))
    assert (stopped.finish_reason, stopped.text) == ("stop", "a" * 9)


def test_every_end_token_will_do() -> None:
    with random_engine(MODEL, (END, STOP, VOCAB - 1)) as engine:
        ends = {engine.generate(ask([n], grammar=Grammar("regex", "a"))).token_ids[-1] for n in range(30)}
    assert ends == {END, STOP}


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


PERSON = {
    "type": "object",
    "properties": {
        "näme": {"type": "string", "maxLength": 9},
        "ages": {"type": "array", "items": {"enum": [1, 22, 333]}},
    },
    "required": ["näme", "ages"],
    "additionalProperties": False,
}


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


def is_person(value: Any) -> bool:
    return set(value) == {"näme", "ages"} and len(value["näme"]) <= 9 and set(value["ages"]) <= {1, 22, 333}


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


class Order:
    """What happens on the engine thread, in order: F forward pass of one token, D delivery, S sampling."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events = ""
        deliver, choose = engine._deliver, engine._runner.choose

        def delivered(step: Any) -> None:
            self.events += "D"
            deliver(step)

        def chosen(*args: Any) -> Any:
            self.events += "S"
            return choose(*args)

        monkeypatch.setattr(engine, "_deliver", delivered)
        monkeypatch.setattr(engine._runner, "choose", chosen)

    def __call__(self, x: mx.array) -> None:
        if x.shape[1] == 1:
            self.events += "F"


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [({}, "FS" + "FSD" * 4 + "D"), ({"grammar": Grammar("regex", "a{9}")}, "FS" + "FDS" * 4 + "D")],
)
def test_the_next_forward_pass_starts_before_tokens_are_read(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], expected: str
) -> None:
    """Without a constraint sampling does not wait either."""
    model = RandomModel()
    with random_engine(model) as engine:
        order = Order(engine, monkeypatch)
        model.on_call = order
        engine.generate(ask([1], max_tokens=5, logit_bias={END: -100.0}, **sampling))
    assert order.events == expected


def test_cancelling_a_constrained_row() -> None:
    gate = Gate()
    with random_engine(RandomModel(on_call=gate)) as engine:
        stream = engine.submit(ask([1, 2], grammar=Grammar("regex", "a*")))
        assert gate.entered.wait(30)
        stream.cancel()
        gate.opened.set()
        assert stream.result().finish_reason == "cancelled"
