"""A second model that guesses: what it says, sees or fails at changes no answer."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine import draft_model
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.draft_model import Draft, check_vocabulary
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import ModelError
from mlxvlm.models.base import VisionLanguageModel
from tests.engine.guessing import outcome
from tests.engine.random_model import END, IMAGE, RandomModel, ask, byte_tokenizer, random_engine
from tests.engine.test_speculation_rows import FAMILIES, WAYS
from tests.fakes import FakeModel, FakeProcessor, eventually, is_empty
from tests.golden import GOLDENS, Case

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def processor() -> FakeProcessor:
    made = FakeProcessor()
    made.tokenizer, made.image_token_id = byte_tokenizer(), IMAGE
    return made


def with_draft(draft: FakeModel, max_context: int = 4096, **settings: Any) -> Engine:
    """A RandomModel and one that guesses for it."""
    config = EngineConfig(**{"max_context": 4096, "eos_token_ids": frozenset([END]), **settings})
    extra = Draft(lambda progress: draft, processor(), max_context)
    return Engine(lambda progress: RandomModel(), processor(), config, draft=extra)


REQUESTS = [
    ask([5, 6, 7], max_tokens=60, ignore_eos=True),
    ask([1] * 700, max_tokens=50, ignore_eos=True, temperature=1.0, seed=3),
    ask([9], max_tokens=40, temperature=0.8, seed=1, top_p=0.9, repetition_penalty=1.2, top_logprobs=2),
    ask([4], max_tokens=40, grammar=Grammar("regex", "[a-c]{3,30}")),
]


@pytest.mark.parametrize(
    ("seed", "share"), [(0, 0.75), (1, 0.0)], ids=["thinks-alike", "thinks-otherwise"]
)  # of 3 rows that may have guesses
def test_answers_are_the_same(seed: int, share: float) -> None:
    """Where both models think alike, sampled tokens are guessed too: they are drawn with the same noise."""
    with random_engine(RandomModel()) as plain:
        expected = [plain.generate(request) for request in REQUESTS]
    with with_draft(RandomModel(seed)) as engine:
        alone = [engine.generate(request) for request in REQUESTS]
        streams = [engine.submit(request) for request in REQUESTS]
        together = [stream.result() for stream in streams]
        for found in (alone, together):
            assert [outcome(each) for each in found] == [outcome(each) for each in expected]
            assert [each.logprobs for each in found] == [each.logprobs for each in expected]
        for each in alone[:3]:
            assert each.usage.drafted_tokens > 0
            assert each.usage.accepted_tokens >= share * each.usage.completion_tokens
            assert (each.usage.accepted_tokens == each.usage.drafted_tokens) or seed
        assert alone[3].usage.drafted_tokens == 0
        assert eventually(lambda: is_empty(engine))
        assert engine._decoding._speculation._drafters[0]._readers == {}


def test_a_long_prompt_is_read_beside_the_steps() -> None:
    """One chunk at a time, while the answer goes on."""
    read: list[int] = []
    with with_draft(RandomModel(on_call=lambda x: read.append(x.shape[1]))) as engine:
        answer = engine.generate(ask([1] * 900, max_tokens=40, ignore_eos=True))
    assert max(read) <= draft_model._CHUNK
    assert read[:3] == [draft_model._CHUNK] * 3
    assert answer.usage.accepted_tokens > 20


@pytest.mark.parametrize("when", [0, 1, 7])
def test_a_draft_model_that_fails_is_left_alone(when: int, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def explode(x: mx.array) -> None:
        calls.append(x.shape[1])
        if len(calls) > when:
            raise RuntimeError("out of memory")

    with random_engine(RandomModel()) as plain:
        expected = plain.generate(REQUESTS[0])
    with caplog.at_level(logging.WARNING), with_draft(RandomModel(on_call=explode)) as engine:
        assert outcome(engine.generate(REQUESTS[0])) == outcome(expected)
        assert outcome(engine.generate(REQUESTS[0])) == outcome(expected)
    assert len(calls) == when + 1
    assert [record.message for record in caplog.records] == [
        "the draft model has failed and is used no more: RuntimeError: out of memory"
    ]


def test_a_shorter_context_only_ends_the_guesses() -> None:
    lengths: list[int] = []
    with random_engine(RandomModel()) as plain:
        expected = plain.generate(REQUESTS[0])
    with with_draft(RandomModel(on_call=lambda x: lengths.append(x.shape[1])), max_context=30) as engine:
        found = engine.generate(REQUESTS[0])
    assert outcome(found) == outcome(expected)
    assert 10 < found.usage.accepted_tokens < 30


def test_its_memory_is_reserved() -> None:
    with random_engine(RandomModel(), speculation="on") as plain, with_draft(RandomModel()) as engine:
        one, two = (each._admission._sizes for each in (plain, engine))
        assert two.kv_token == 2 * one.kv_token
        assert two.checked == one.checked == 16
    with random_engine(RandomModel()) as plain, with_draft(RandomModel(), speculation="off") as engine:
        assert engine._admission._sizes.kv_token == plain._admission._sizes.kv_token


def test_another_vocabulary_is_refused() -> None:
    large = FakeModel()
    large.vocab_size = 5000
    with pytest.raises(ModelError, match="the draft model's vocabulary has 5000 ids, the model's"):
        with_draft(large)
    one, other = (Case(GOLDENS / name).open() for name in ("idefics3_split", "qwen2_vl_window"))
    check_vocabulary(one.processor, one.processor, one.defaults.eos_token_ids)
    with pytest.raises(ModelError, match=r"another vocabulary than the model \('The quick.*of the same family"):
        check_vocabulary(one.processor, other.processor, one.defaults.eos_token_ids)
    ours, theirs = processor(), processor()
    theirs.tokenizer = byte_tokenizer()
    theirs.tokenizer.backend.add_special_tokens([f"<{number}>" for number in range(1100)])
    with pytest.raises(ModelError, match=r"another vocabulary.* and .* tokens"):
        check_vocabulary(ours, theirs, [END])
    with pytest.raises(ModelError, match=r"another vocabulary.*token"):
        check_vocabulary(ours, theirs, [ours.tokenizer.backend.get_vocab_size()])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_draft(name: str) -> None:
    """For itself, without the pictures."""
    case = Case(GOLDENS / name)
    source = case.open()
    scenarios = ("two_images", "text_only", "one_tall", "long_text")
    prompts = [source.processor(case.messages(scenario), case.template) for scenario in scenarios]
    requests = [
        Request(sampling=SamplingParams(**way), prompt=prompt) for way, prompt in zip(WAYS, prompts, strict=True)
    ]
    build = partial(source.build, LoadOptions("float32"))
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids, speculation="off")
    with Engine(build, source.processor, config) as plain:
        expected = [plain.generate(request) for request in requests]
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)
    draft = Draft(build, source.processor, source.max_context)
    with Engine(build, source.processor, config, draft=draft) as engine:
        alone = [engine.generate(request) for request in requests]
        streams = [engine.submit(request) for request in requests]
        assert [outcome(each) for each in alone] == [outcome(each) for each in expected]
        assert [outcome(stream.result()) for stream in streams] == [outcome(each) for each in expected]
    usage = alone[1].usage
    assert usage.accepted_tokens == usage.drafted_tokens >= 14


def test_loading_a_draft_model_can_be_interrupted() -> None:
    """And what it raises comes out of the constructor."""

    def build(progress: Any) -> VisionLanguageModel:
        raise ModelError("no such file")

    config = EngineConfig(4096, frozenset([END]))
    with pytest.raises(ModelError, match="no such file"):
        Engine(lambda progress: RandomModel(), processor(), config, draft=Draft(build, processor(), 4096))
