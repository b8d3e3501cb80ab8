"""Any schedule, any way to sample, every family: with guesses, right and wrong, the tokens are the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine import drafts, kv_cache
from mlxvlm.engine.admission import Admission, Need
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.drafts import MAX_POSITIONS
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVBatch, KVGroup
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import InputError
from tests.engine import random_model
from tests.engine.guessing import Told, outcome, told
from tests.engine.random_model import RandomModel, random_engine
from tests.engine.test_admission import PLAIN, SPEC, extend, leave
from tests.engine.test_engine import ids_of
from tests.fakes import FakeModel, answer, ask, eventually, fake_engine, is_empty
from tests.golden import GOLDENS, Case

# Any schedule


class Plan(NamedTuple):
    prompt: tuple[int, ...]
    count: int
    cancel: int | None  # after so many tokens


PLANS = st.builds(
    Plan,
    st.lists(st.integers(1, 50), min_size=1, max_size=30).map(tuple),
    st.integers(1, 40),
    st.none() | st.none() | st.integers(1, 30),
)


@settings(max_examples=60, deadline=None)
@given(
    plans=st.lists(PLANS, min_size=1, max_size=5),
    spoil=st.lists(st.booleans(), min_size=1, max_size=7),
    width=st.integers(1, 15),
)
def test_any_schedule(plans: list[Plan], spoil: list[bool], width: int) -> None:
    """Rows come and go while some guesses hold; the buffers stay below what is reserved for two slots a row."""
    held: list[bool] = []
    model = FakeModel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_STEP", 4)
        patch.setattr(kv_cache, "_SHORT", 8)
        patch.setattr(drafts, "_LONGEST_PAUSE", 0)
        with fake_engine(model, speculation="on", max_draft_tokens=width) as engine:
            rows = engine._scheduler._admission

            def watch(x: mx.array) -> None:
                pays = sum(2 << kv_cache.length_class(need.length) for need in rows._rows.values())
                groups = engine._runner.batch.groups
                held.append(engine._runner.batch.nbytes <= pays * rows._sizes.kv_token)
                held.append(all(group._capacity <= 1 << group.kind for group in groups))

            model.on_call = watch
            told(
                engine,
                Told({plan.prompt: answer(plan.prompt, 60) for plan in plans}, lambda at: spoil[at % len(spoil)]),
            )
            streams = [engine.submit(ask(plan.prompt, plan.count)) for plan in plans]
            for plan, stream in zip(plans, streams, strict=True):
                found: list[int] = []
                for delta in stream:
                    found += delta.token_ids
                    if plan.cancel is not None and len(found) >= plan.cancel:
                        stream.cancel()
                assert found == answer(plan.prompt, len(found))
                assert len(found) == plan.count or plan.cancel is not None
            assert eventually(lambda: is_empty(engine))
    assert all(held)


EVENTS = st.lists(st.tuples(st.sampled_from("jjvvvdr"), st.integers(1, 40), st.integers(1, 40)), max_size=60)


@settings(deadline=None, max_examples=100)
@given(EVENTS)
def test_no_batch_outgrows_what_its_rows_pay_for(events: list[tuple[str, int, int]]) -> None:
    """Passes of any width that stays within what rows may hold, of which any part counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_STEP", 4)
        patch.setattr(kv_cache, "_SHORT", 8)
        rows, batch = Admission(10**9, 0, PLAIN), KVBatch()
        left: dict[int, int] = {}
        for number, (event, length, more) in enumerate(events):
            if event == "j":
                rows.reserve(number, Need(length + more, 0, 0))
                group = KVGroup.single([SPEC], number)
                extend([group], length)
                left[number] = more
                batch.join(group)
            elif event == "r" and left:
                leave(batch, rows, left, sorted(left)[length % len(left)])
            elif left:
                held = [length for group in batch.groups for length in group.lengths]
                width = min([more if event == "v" else 1, *left.values(), *map(kv_cache.room_in_class, held)])
                forward = batch.forward(width)
                values = mx.zeros((len(left), 1, width, 4))
                forward.layers[0].attend(values, values, values, 1.0)
                counts = [1 + (length + owner) % width for owner in batch.owners]
                forward.commit(counts)
                for owner, count in zip(batch.owners, counts, strict=True):
                    left[owner] -= count
                for owner in [owner for owner, tokens in left.items() if not tokens]:
                    leave(batch, rows, left, owner)
            for group in batch.groups:
                assert group._capacity <= max(1 << group.kind, kv_cache.capacity_for(max(group.lengths)))
            if len(left) > 1:
                assert 2 * batch.nbytes <= rows.reserved  # half of it is for copies, as there is one layer


def test_no_more_is_allocated_than_is_reserved() -> None:
    """A row at the end of its buffer, where a longer pass would need a larger one."""
    held: list[int] = []
    model = FakeModel(on_call=lambda x: held.append(engine._runner.batch.nbytes))
    with fake_engine(model, speculation="on") as engine:
        told(engine, Told({(1,) * 250: answer([1] * 250, 20)}))
        assert ids_of(engine.generate(ask([1] * 250, 7))) == answer([1] * 250, 7)
        sizes = engine._admission._sizes
        assert engine.stats().accepted_tokens > 2
        assert sizes.checked == MAX_POSITIONS
        assert max(held) == 256 * sizes.kv_token


SETTINGS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 2.0]), "seed": st.integers(0, 99), "max_tokens": st.integers(1, 30)},
    optional={
        "repetition_penalty": st.just(1.3),
        "frequency_penalty": st.just(1.5),
        "presence_penalty": st.just(0.5),
        "logit_bias": st.just({4: 3.0, 9: -100.0}),
        "top_k": st.sampled_from([1, 5]),
        "top_p": st.just(0.7),
        "min_p": st.just(0.05),
        "typical_p": st.just(0.6),
        "xtc_probability": st.just(0.5),
        "top_logprobs": st.sampled_from([0, 2]),
        "stop": st.just(("b",)),
        "dry_multiplier": st.just(0.8),
        "grammar": st.sampled_from([Grammar("regex", "(ab|c){5,9}"), Grammar("regex", "[0-9]{3}-[a-z]*")]),
    },
)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Engine, Engine]]:
    model = RandomModel()
    with random_engine(model) as plain, random_engine(RandomModel(), speculation="on") as guessing:
        yield plain, guessing


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(SETTINGS, st.lists(st.integers(0, 200), min_size=1, max_size=5)), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=1, max_size=7),
)
def test_every_way_to_sample(
    pair: tuple[Engine, Engine], rows: list[tuple[dict[str, Any], list[int]]], spoil: list[bool]
) -> None:
    """Rows that read their history ride along; all tokens and logprobs are those of an engine that never guesses."""
    plain, guessing = pair
    requests = [random_model.ask(ids, **sampling) for sampling, ids in rows]
    expected = [plain.generate(request) for request in requests]
    answers = {tuple(ids): each.token_ids for (_, ids), each in zip(rows, expected, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "_LONGEST_PAUSE", 0)
        told(guessing, Told(answers, lambda at: spoil[at % len(spoil)]))
        streams = [guessing.submit(request) for request in requests]
        found = [stream.result() for stream in streams]
    assert [outcome(each) for each in found] == [outcome(each) for each in expected]
    assert [each.logprobs for each in found] == [each.logprobs for each in expected]


def test_a_row_that_gets_stuck_beside_guesses_ends_alone(pair: tuple[Engine, Engine]) -> None:
    """Its grammar's error shows while a pass is under way, which still counts for the other, in the later slot."""
    plain, guessing = pair
    free = random_model.ask([5], max_tokens=400, ignore_eos=True)
    truth = plain.generate(free)
    told(guessing, Told({(5,): truth.token_ids}))
    constraints, steps = guessing._constraints, 0

    def stuck(rows: Any) -> Any:
        nonlocal steps
        masks = type(constraints).masks(constraints, rows)
        steps += len(rows) == 2
        for row in rows:
            if row is not None:
                row[0].is_stuck = steps == 3
        return masks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "masks", stuck)
        bound = guessing.submit(random_model.ask([6], grammar=Grammar("regex", "[a-z]{1000}")))
        next(iter(bound))
        stream = guessing.submit(free)
        with pytest.raises(InputError, match="has no token for what must come"):
            bound.result()
        assert stream.result().token_ids == truth.token_ids
    assert steps == 3


# Every family

FAMILIES = (
    *("idefics3_split", "llama4_norms", "llava_next_tiles", "llava_siglip"),
    *("mllama_tiles", "qwen2_vl_window", "smolvlm2_tied"),
)
WAYS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 24, "ignore_eos": True, "top_logprobs": 1},
    {"max_tokens": 20, "ignore_eos": True, "temperature": 0.8, "seed": 7, "top_p": 0.9, "top_logprobs": 0},
    {"max_tokens": 22, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "temperature": 0.5, "seed": 1},
    {"max_tokens": 18, "logit_bias": {5: 4.0}, "stop": ("e",)},
)


@pytest.mark.usefixtures("tireless")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("short", [512, 32], ids=["one-group", "groups"])
def test_every_family_says_the_same(name: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, windows, chunks, M-RoPE and cross-attention, with guesses of which every fourth is wrong."""
    monkeypatch.setattr(kv_cache, "_SHORT", short)
    case = Case(GOLDENS / name)
    source = case.open()
    scenarios = ("two_images", "text_only", "one_tall", "long_text")
    prompts = [source.processor(case.messages(scenario), case.template) for scenario in scenarios]
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids, speculation="on")
    with Engine(partial(source.build, LoadOptions("float32")), source.processor, config) as engine:
        speculation = engine._decoding._speculation
        own, speculation._drafters = speculation._drafters, []
        requests = [
            Request(sampling=SamplingParams(**way), prompt=prompt) for way, prompt in zip(WAYS, prompts, strict=True)
        ]
        expected = [engine.generate(request) for request in requests]
        answers = {prompt.token_ids: each.token_ids for prompt, each in zip(prompts, expected, strict=True)}
        for drafter in (Told(answers, lambda at: at % 4 == 3), *own):
            speculation._drafters = [drafter]
            alone = [engine.generate(request) for request in requests]
            streams = [engine.submit(request) for request in requests]
            together = [stream.result() for stream in streams]
            for found in (alone, together):
                assert [outcome(each) for each in found] == [outcome(each) for each in expected]
                logprobs = [[each.logprob for each in one.logprobs] for one in found]
                assert logprobs[0] == pytest.approx([each.logprob for each in expected[0].logprobs], abs=1e-4)
                assert logprobs[1] == pytest.approx([each.logprob for each in expected[1].logprobs], abs=1e-4)
        assert list(together[0].token_ids) == case.expected("two_images")["greedy"]
        assert engine.stats().accepted_tokens > 30
