"""Guesses change how many steps an answer takes, and nothing else: whoever guesses, and however wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.engine import admission, drafts, scheduler
from mlxvlm.engine.drafts import MAX_POSITIONS, FromText, Lookup, Pace
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import InternalError, UsageError
from tests.engine.guessing import Spoil, Told, outcome, told
from tests.engine.test_engine import ids_of
from tests.fakes import IMAGE, FakeModel, answer, ask, eventually, fake_engine, is_empty, look_at, looked

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


@pytest.mark.parametrize("wrong", [{"max_draft_tokens": 0}, {"max_draft_tokens": 16}, {"speculation": "yes"}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"draft tokens must be|speculation must be"):
        fake_engine(**{"speculation": "on", **wrong})


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
    with fake_engine(speculation="off" if spoil is None else "on") as engine:
        told(engine, Told({(1, 2): truth}, spoil or bool)) if spoil else None
        completion = engine.generate(ask([1, 2], 30))
        stats = engine.stats()
    assert list(completion.token_ids) == truth
    assert (stats.steps, stats.drafted_tokens, stats.accepted_tokens) == (steps, drafted, accepted)
    usage = completion.usage
    assert (usage.completion_tokens, usage.drafted_tokens, usage.accepted_tokens) == (30, drafted, accepted)


def test_a_repetition_is_found_without_help() -> None:
    """Doubling modulo 60 goes round in 4 tokens: once that shows, passes bring nine tokens each."""
    with fake_engine(speculation="on") as engine:
        completion = engine.generate(ask([1, 2], 100))
        steps = engine.stats().steps
    assert list(completion.token_ids) == answer([1, 2], 100)
    assert completion.usage.accepted_tokens >= 80
    assert steps + completion.usage.accepted_tokens - 100 in (0, 1)


def test_placeholders_are_not_guessed() -> None:
    guesses: list[list[int]] = []
    with fake_engine(speculation="on") as engine:
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
    with fake_engine(model, speculation="on") as engine:
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
    with fake_engine(speculation="on") as engine:
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
    with fake_engine(speculation="on", prefix_cache_bytes=1 << 20, prefix_block_tokens=2) as engine:
        told(engine, Told({tuple(ids): truth}, lambda at: at % 6 == 5))
        stop = truth[count - 1]
        engine.generate(ask(ids, 40, stop_token_ids=[stop]))
        longer = [*ids, *truth[:count], 7]
        again = engine.generate(ask(longer, 5))
    assert list(again.token_ids) == answer(longer, 5)
    fed = len(ids) + truth.index(stop)
    assert again.usage.cached_tokens in (fed, fed + 1)


# Faults


def test_a_pass_that_fails_becomes_an_ordinary_step() -> None:
    def fragile(x: mx.array) -> None:
        if x.shape[1] > 1 and bool((x == 33).any()):
            raise RuntimeError("the device failed")

    prompts = [(1,), (2,)]  # of one token: nothing is prefilled
    with fake_engine(FakeModel(on_call=fragile), speculation="on") as engine:
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

    with fake_engine(FakeModel(on_call=fragile), speculation="on") as engine:
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
    with fake_engine(model, speculation="on") as engine:
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
    with fake_engine(model, speculation="on") as engine:
        drafter = told(engine, Told({}))
        drafter.guess = lambda row, count: [32] * min(count, 3)
        assert ids_of(engine.generate(ask([good], 40))) == answer([good], 40)
        assert engine.stats().drafted_tokens > 0


def test_cancel_and_timeout_while_guessing() -> None:
    with fake_engine(speculation="on") as engine:
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
    with fake_engine(speculation="on", max_context=400) as engine:
        told(engine, Told({(1,): answer([1], 500)}))
        assert ids_of(engine.generate(ask([1], None))) == answer([1], 399)


def test_waiting_in_vain_for_tokens_becomes_rare() -> None:
    with fake_engine(speculation="on") as engine:
        drafter = told(engine, Told({}))
        engine.generate(ask([1], 300))
        steps = engine.stats().steps
    assert steps == 300
    assert 5 < len(drafter.guessed) < 15
