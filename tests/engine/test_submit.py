"""What a request may bring, and what ends it before it runs."""

from __future__ import annotations

from typing import Any

import pytest

from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.engine.sequence import Sequence
from mlxvlm.errors import InputError, InternalError, UsageError
from mlxvlm.processors.base import Prompt
from tests.engine.test_engine import ids_of
from tests.fakes import VOCAB, answer, ask, fake_engine


@pytest.mark.parametrize("ids", [[5], (5,), {5}])
def test_stop_token_ids_may_be_any_collection(ids: Any) -> None:
    with fake_engine() as engine:
        assert ids_of(engine.generate(ask([3, 1], stop_token_ids=ids))) == [5]
        with pytest.raises(UsageError, match="stop_token_ids"):
            engine.submit(ask([3, 1], stop_token_ids=["5"]))


def test_a_request_that_fails_on_its_way_in_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Sequence.begin

    def fail_for_nines(sequence: Sequence, prompt: Prompt, *rest: Any) -> None:
        if 9 in prompt.token_ids:
            raise TypeError("a defect")
        begin(sequence, prompt, *rest)

    monkeypatch.setattr(Sequence, "begin", fail_for_nines)
    with fake_engine() as engine:
        other = engine.submit(ask([1, 2], 30))
        with pytest.raises(InternalError, match="a defect"):
            engine.generate(ask([9]))
        assert ids_of(other.result()) == answer([1, 2], 30)


@pytest.mark.parametrize("foreign", [VOCAB, 10**9, -1])
def test_ids_beyond_the_vocabulary_are_refused(foreign: int) -> None:
    with fake_engine() as engine, pytest.raises(InputError, match=str(foreign)):
        engine.generate(Request(prompt=Prompt((1, foreign, 2))))


def test_a_request_without_sampling_takes_the_engines() -> None:
    with fake_engine(sampling=SamplingParams(max_tokens=3)) as engine:
        assert len(engine.generate(Request(ask([1]).messages)).token_ids) == 3


def test_leaving_a_stream_cancels_it() -> None:
    with fake_engine() as engine:
        with engine.submit(ask([1], 4000)) as stream:
            next(iter(stream))
        assert [delta.finish_reason for delta in stream][-1] == "cancelled"
