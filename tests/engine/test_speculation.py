"""Guesses change how many steps an answer takes, and nothing else: whoever guesses, and however wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine import admission, drafts, kv_cache, scheduler
from mlxvlm.engine.admission import Admission, Need
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.drafts import MAX_POSITIONS, FromText, Lookup, Pace
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVBatch, KVGroup
from mlxvlm.engine.params import Grammar, SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.engine.sequence import Sequence as Row
from mlxvlm.errors import InputError, InternalError, UsageError
from tests.engine import random_model
from tests.engine.random_model import RandomModel, random_engine
from tests.engine.test_admission import PLAIN, SPEC, extend, leave
from tests.engine.test_engine import ids_of
from tests.fakes import IMAGE, FakeModel, answer, ask, eventually, fake_engine, is_empty, look_at, looked
from tests.golden import GOLDENS, Case

Spoil = Callable[[int], bool]  # whether the guess of a position of an answer is wrong


class Told:
    """A drafter that knows the answers, by prompt, and spoils some of its guesses."""

    def __init__(self, answers: Mapping[tuple[int, ...], Sequence[int]], spoil: Spoil = lambda at: False) -> None:
        self.answers, self.spoil = answers, spoil
        self.guessed: list[int] = []

    kv_token = ()

    def is_ready(self, row: Row) -> bool:
        return True

    def guess(self, row: Row, count: int) -> list[int]:
        first = len(row.token_ids)
        truth = self.answers.get(row.prompt.token_ids, ())[first : first + count]
        found = [(token + 1) % 50 if self.spoil(at) else token for at, token in enumerate(truth, first)]
        self.guessed.append(len(found))
        return found

    def forget(self, row_id: int) -> None:
        pass


def told(engine: Engine, drafter: Any) -> Any:
    """Puts a drafter in the place of an engine's own."""
    engine._decoding._speculation._drafters[:] = [drafter]
    return drafter


@pytest.fixture
def tireless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses go on however often they fail."""
    monkeypatch.setattr(drafts, "_LONGEST_PAUSE", 0)


def outcome(completion: Completion) -> tuple[Any, ...]:
    return completion.text, completion.token_ids, completion.finish_reason


# Who guesses, and when


def twin(ids: Sequence[int], count: int, foreign: set[int]) -> list[int]:
    """Lookup on paper: the last place where the end of the text stood before, and what followed."""
    for size in (3, 2):
        for at in reversed(range(size, len(ids))):
            if len(ids) > size and tuple(ids[at - size : at]) == tuple(ids[-size:]):
                text = list(ids)
                for place in range(at, at + count):
                    if text[place] in foreign or text[place] >= 9:
                        break
                    text.append(text[place])
                return text[len(ids) :]
    return []


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 40), st.integers(1, 8), st.sets(st.integers(0, 9)))
def test_a_lookup_finds_what_followed(ids: list[int], cut: int, count: int, foreign: set[int]) -> None:
    text = Lookup(ids[:cut], foreign, 9)
    text.extend(ids[cut:])
    assert text.guess(count) == twin(ids, count, foreign)
    assert text.length == len(ids)


def test_a_lookup_goes_round_and_stops_at_placeholders() -> None:
    assert Lookup([1, 2, 3, 1, 2, 3], (), 9).guess(7) == [1, 2, 3, 1, 2, 3, 1]
    assert Lookup([1, 2, 3, 8, 5, 1, 2], {8}, 9).guess(7) == [3]
    assert Lookup([1, 2, 3], (), 9).guess(7) == []


def test_pace_backs_off_and_comes_back() -> None:
    pace, pauses, length = Pace(8), [], 0
    for _ in range(8):
        assert pace.is_open(length)
        pace.settle(length, pace.width, 0)
        pauses.append(next(wait for wait in range(100) if pace.is_open(length + wait)))
        length += pauses[-1]
    assert pauses == [2, 4, 8, 16, 32, 64, 64, 64]
    widths = []
    for _ in range(3):
        pace.settle(length, pace.width, pace.width)
        assert pace.is_open(length)
        widths.append(pace.width)
    assert widths == [4, 8, 8]
    pace.settle(length, 8, 4)
    assert (pace.width, pace.is_open(length)) == (8, True)
    pace.settle(length, 8, 3)
    assert (pace.width, pace.is_open(length + 1), pace.is_open(length + 2)) == (6, False, True)


@pytest.mark.parametrize("wrong", [{"max_draft_tokens": 0}, {"max_draft_tokens": 16}, {"speculation": "on"}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"draft tokens must be|speculation must be"):
        fake_engine(**{"speculation": "auto", **wrong})


# What comes of guesses


@pytest.mark.parametrize(
    ("spoil", "steps", "drafted", "accepted"),
    [
        # Passes of 1 + 4, then 1 + 8, the last one cut to what is left.
        (lambda at: False, 4, 4 + 8 + 8 + 6, 26),
        # Always wrong: guesses at lengths 0, then 3, 8, 17; a failed pass gives one token.
        (lambda at: True, 30, 4 + 2 + 2 + 2, 0),
        (None, 30, 0, 0),
    ],
    ids=["right", "wrong", "off"],
)
def test_steps_and_counts(spoil: Spoil | None, steps: int, drafted: int, accepted: int) -> None:
    truth = answer([1, 2], 30)
    with fake_engine(speculation="off" if spoil is None else "auto") as engine:
        told(engine, Told({(1, 2): truth}, spoil or bool)) if spoil else None
        completion = engine.generate(ask([1, 2], 30))
        stats = engine.stats()
    assert list(completion.token_ids) == truth
    assert (stats.steps, stats.drafted_tokens, stats.accepted_tokens) == (steps, drafted, accepted)
    usage = completion.usage
    assert (usage.completion_tokens, usage.drafted_tokens, usage.accepted_tokens) == (30, drafted, accepted)


def test_a_repetition_is_found_without_help() -> None:
    """Doubling modulo 60 goes round in 4 tokens: once that shows, passes bring nine tokens each."""
    with fake_engine(speculation="auto") as engine:
        completion = engine.generate(ask([1, 2], 100))
        steps = engine.stats().steps
    assert list(completion.token_ids) == answer([1, 2], 100)
    assert completion.usage.accepted_tokens >= 80
    assert steps + completion.usage.accepted_tokens - 100 in (0, 1)


def test_placeholders_are_not_guessed() -> None:
    guesses: list[list[int]] = []
    with fake_engine(speculation="auto") as engine:
        own = engine._decoding._speculation._drafters[0]
        assert isinstance(own, FromText)
        drafter = told(engine, Told({}))
        drafter.guess = lambda row, count: guesses.append(own.guess(row, count)) or []
        assert ids_of(engine.generate(look_at(7, [2], 30))) == looked(7, [2], 30)
    assert any(guesses)
    assert not any(IMAGE in guess for guess in guesses)


@pytest.mark.usefixtures("tireless")
def test_rows_of_one_pass_have_guesses_of_their_own_lengths() -> None:
    """No pass has more than its share of positions, and none while there are too many rows."""
    shapes: list[tuple[int, int]] = []
    prompts = [(n, 3, n) for n in range(1, 7)]
    model = FakeModel(on_call=lambda x: shapes.append(x.shape[:2]))
    with fake_engine(model, speculation="auto") as engine:
        told(engine, Told({prompt: answer(prompt, 50)[: 10 * prompt[0]] for prompt in prompts}, lambda at: at % 7 == 5))
        streams = [engine.submit(ask(prompt, 20 + 8 * prompt[0])) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            assert ids_of(stream.result()) == answer(prompt, 20 + 8 * prompt[0])
    steps = [shape for shape in shapes if shape != (1, 2)]  # prompts are read two tokens at once
    assert max(rows for rows, _ in steps) == 6
    assert all(rows * width <= MAX_POSITIONS for rows, width in steps)
    assert {rows for rows, width in steps if width > 1} >= {1, 2, 3, 4}
    assert not any(rows > drafts.MAX_ROWS for rows, width in steps if width > 1)


# Ends inside a run of guessed tokens


@pytest.mark.parametrize(
    "more",
    [{"stop": ("H",)}, {"stop": ("H`",)}, {"stop": ("T<H",)}, {"stop_token_ids": [48]}, {"count": 3}, {"count": 1}],
    ids=str,
)
def test_what_comes_after_the_end_is_never_seen(more: dict[str, Any]) -> None:
    """[5] goes on with 6, 12, 24, 48, 36, 12, 24 ...: 6<H`T<H"""
    request = ask([5], **{"count": 40, **more})
    with fake_engine() as plain:
        expected = plain.generate(request)
    assert expected.usage.completion_tokens < 10
    with fake_engine(speculation="auto") as engine:
        told(engine, Told({(5,): answer([5], 60)}))
        streamed = list(engine.submit(request))
        found = engine.generate(request)
        assert eventually(lambda: is_empty(engine))
    assert outcome(found) == outcome(expected)
    assert [token for delta in streamed for token in delta.token_ids] == list(expected.token_ids)
    assert engine.stats().generated_tokens == 2 * expected.usage.completion_tokens
    assert found.usage.accepted_tokens <= found.usage.completion_tokens


@pytest.mark.parametrize("count", range(1, 24))
def test_what_is_kept_of_a_row_is_what_was_fed(count: int) -> None:
    """Its blocks serve another prompt, wherever in a run of guesses the answer ended."""
    ids = [3, 1, 4]
    truth = answer(ids, 40)
    with fake_engine(speculation="auto", prefix_cache_bytes=1 << 20, prefix_block_tokens=2) as engine:
        told(engine, Told({tuple(ids): truth}, lambda at: at % 6 == 5))
        stop = truth[count - 1]
        engine.generate(ask(ids, 40, stop_token_ids=[stop]))
        longer = [*ids, *truth[:count], 7]
        again = engine.generate(ask(longer, 5))
    assert list(again.token_ids) == answer(longer, 5)
    fed = len(ids) + truth.index(stop)
    assert again.usage.cached_tokens in (fed // 2 * 2, (fed + 1) // 2 * 2)


# Faults


def test_a_pass_that_fails_becomes_an_ordinary_step() -> None:
    def fragile(x: mx.array) -> None:
        if x.shape[1] > 1 and bool((x == 33).any()):
            raise RuntimeError("the device failed")

    prompts = [(1,), (2,)]  # of one token: nothing is prefilled
    with fake_engine(FakeModel(on_call=fragile), speculation="auto") as engine:
        drafter = told(engine, Told({prompt: answer(prompt, 60) for prompt in prompts}))
        drafter.guess = lambda row, count: [33] * min(count, 2)
        streams = [engine.submit(ask(prompt, 40)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            assert ids_of(stream.result()) == answer(prompt, 40)
        assert eventually(lambda: is_empty(engine))


def test_a_pass_that_fails_on_one_rows_account_ends_that_row() -> None:
    bad = next(n for n in range(1, 50) if 32 in answer([n], 40)[2:20])
    good = next(n for n in range(1, 50) if 32 not in answer([n], 60))

    def fragile(x: mx.array) -> None:
        if bool((x == 32).any()):
            raise RuntimeError("the device failed")

    with fake_engine(FakeModel(on_call=fragile), speculation="auto") as engine:
        told(engine, Told({(n,): answer([n], 60) for n in (bad, good)}))
        streams = [engine.submit(ask([n], 40)) for n in (bad, good)]
        with pytest.raises(InternalError, match="the device failed"):
            streams[0].result()
        assert ids_of(streams[1].result()) == answer([good], 40)
        assert eventually(lambda: is_empty(engine))


def test_a_nan_inside_a_run_ends_its_row_with_what_came_before() -> None:
    bad = next(n for n in range(1, 50) if 32 in answer([n], 40)[2:6])
    at = answer([bad], 40).index(32)
    model = FakeModel()
    model.nan_token = 32
    with fake_engine(model, speculation="auto") as engine:
        told(engine, Told({(bad,): answer([bad], 60)}))
        found: list[int] = []
        stream = engine.submit(ask([bad], 40))
        with pytest.raises(InternalError, match="NaN"):
            found.extend(token for delta in stream for token in delta.token_ids)
    assert found == answer([bad], 40)[: at + 1]


def test_a_nan_behind_a_wrong_guess_is_nobodys() -> None:
    good = next(n for n in range(1, 50) if 32 not in answer([n], 60))
    model = FakeModel()
    model.nan_token = 32
    with fake_engine(model, speculation="auto") as engine:
        drafter = told(engine, Told({}))
        drafter.guess = lambda row, count: [32] * min(count, 3)
        assert ids_of(engine.generate(ask([good], 40))) == answer([good], 40)
        assert engine.stats().drafted_tokens > 0


def test_cancel_and_timeout_while_guessing() -> None:
    with fake_engine(speculation="auto") as engine:
        told(engine, Told({(1,): answer([1], 4000)}))
        stream = engine.submit(ask([1], 4000))
        found: list[int] = []
        for delta in stream:
            found += delta.token_ids
            if len(found) == 50:
                stream.cancel()
        assert 50 <= len(found) < 4000
        assert found == answer([1], len(found))
        late = engine.generate(Request(ask([1]).messages, SamplingParams(max_tokens=4000), timeout_s=0.05))
        assert list(late.token_ids) == answer([1], len(late.token_ids))
        assert eventually(lambda: is_empty(engine))
        assert engine._decoding._speculation._paces == {}


def test_an_answer_without_a_limit_grows_while_guesses_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (admission, scheduler):
        monkeypatch.setattr(module, "ANSWER_STEP", 64)
    with fake_engine(speculation="auto", max_context=400) as engine:
        told(engine, Told({(1,): answer([1], 500)}))
        assert ids_of(engine.generate(ask([1], None))) == answer([1], 399)


def test_waiting_in_vain_for_tokens_becomes_rare() -> None:
    with fake_engine(speculation="auto") as engine:
        drafter = told(engine, Told({}))
        engine.generate(ask([1], 300))
        steps = engine.stats().steps
    assert steps == 300
    assert 5 < len(drafter.guessed) < 15


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
        with fake_engine(model, speculation="auto", max_draft_tokens=width) as engine:
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
    with fake_engine(model, speculation="auto") as engine:
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
    with random_engine(model) as plain, random_engine(RandomModel()) as guessing:
        plain._decoding._speculation._drafters.clear()
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
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)
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
