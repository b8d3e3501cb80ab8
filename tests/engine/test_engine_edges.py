"""Rare turns of the engine: what fails, what is cut short, and the limits of a device."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.engine import device
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.engine.sequence import Sequence
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import InputError, InternalError
from mlxvlm.messages import Message, TextPart
from mlxvlm.processors.base import PreparedImage, Prompt
from tests.fakes import IMAGE, IMAGE_TOKENS, FakeModel, FakeProcessor, answer, ask, eventually, fake_engine

PIECES = {1: "x", 2: "a", 3: "b�"}  # the last ends within a character, so it is given out by a flush only


@pytest.mark.parametrize("length", [1, 6], ids=["decode", "prefill"])
def test_a_pass_that_fails_leaves_nothing_behind(length: int) -> None:
    def explode(x: mx.array) -> None:
        if x.shape[1] == length:
            raise RuntimeError("the device failed")

    with fake_engine(FakeModel(on_call=explode)) as engine:
        with pytest.raises(InternalError, match="the device failed"):
            engine.generate(ask([1] * 7))
        assert eventually(lambda: not engine._open)
        assert eventually(lambda: not engine._runner.batch.groups)


def test_a_prompt_that_fails_leaves_nothing_behind() -> None:
    with fake_engine() as engine:
        for text in ("refuse", "crash", ""):
            with pytest.raises((InputError, InternalError)):
                engine.generate(Request([Message("user", (TextPart(text),))]))
        assert eventually(lambda: not engine._open)


def test_nan_leaves_nothing_behind() -> None:
    model = FakeModel()
    model.nan_token = 7
    with fake_engine(model) as engine:
        with pytest.raises(InternalError, match="NaN"):
            engine.generate(ask([7]))
        assert eventually(lambda: not engine._open)


def test_a_long_prompt_is_read_in_smaller_chunks_while_others_decode() -> None:
    lengths: list[int] = []
    prompt = [1, 2] * 7
    model = FakeModel(on_call=lambda x: lengths.append(x.shape[1]))
    with fake_engine(model, prefill_chunk=8, prefill_chunk_while_decoding=3) as engine:
        engine.generate(ask(prompt, 1))
        assert lengths == [8, 5, 1]
        with engine.submit(ask([1], 4000)) as running:
            next(iter(running))
            lengths.clear()
            assert list(engine.generate(ask(prompt, 3)).token_ids) == answer(prompt, 3)
            assert [length for length in lengths if length > 1] == [3, 3, 3, 3]


class PiecesTokenizer:
    def decode(self, token_ids: Seq[int]) -> str:
        return "".join(PIECES[token] for token in token_ids)


def said(token_ids: Seq[int], max_tokens: int, stop: str) -> Completion:
    """What a listener gets of a sequence that samples these tokens and, if it still runs, is cancelled."""
    processor = FakeProcessor()
    processor.tokenizer = PiecesTokenizer()
    stream = Stream(lambda: None)
    sequence = Sequence(SamplingParams(stop=(stop,)), stream)
    sequence.begin(Prompt((1,)), processor, max_tokens, frozenset())
    for token in token_ids:
        sequence.accept(token, None)
    sequence.cancel()
    return stream.result()


def test_cancelling_gives_out_the_text_that_was_held_back() -> None:
    completion = said([1, 2], 10, stop="ab")
    assert (completion.text, completion.finish_reason) == ("xa", "cancelled")


@pytest.mark.parametrize(("max_tokens", "reason"), [(3, "length"), (10, "cancelled")])
def test_a_stop_string_that_the_last_flush_completes_still_cuts(max_tokens: int, reason: str) -> None:
    completion = said([1, 2, 3], max_tokens, stop="ab")
    assert (completion.text, completion.finish_reason) == ("x", reason)


@pytest.mark.parametrize(("max_tokens", "reason"), [(3, "length"), (10, "cancelled")])
def test_the_last_flush_keeps_the_order_of_the_text(max_tokens: int, reason: str) -> None:
    completion = said([1, 2, 3], max_tokens, stop="ac")
    assert (completion.text, completion.finish_reason) == ("xab�", reason)


def picture_prompt(tail: tuple[int, ...]) -> Prompt:
    image = PreparedImage(np.full((1,), 7, np.float32), (1,), (1, 1 + IMAGE_TOKENS), b"7")
    return Prompt((5, *[IMAGE] * IMAGE_TOKENS, *tail), (image,))


def test_a_prompt_that_ends_with_an_image_is_refused() -> None:
    sampling = SamplingParams(max_tokens=2)
    with fake_engine() as engine:
        with pytest.raises(InputError, match="ends with an image"):
            engine.generate(Request(sampling=sampling, prompt=picture_prompt(())))
        completion = engine.generate(Request(sampling=sampling, prompt=picture_prompt((2,))))
        assert list(completion.token_ids) == answer([5, *[7] * IMAGE_TOKENS, 2], 2)


@pytest.mark.parametrize(
    ("is_gpu", "working_set", "expected"),
    [
        (True, 1000, {"set_wired_limit": (1000,), "set_cache_limit": (50,)}),
        (True, 0, {}),
        (False, 1000, {"disable_compile": ()}),
    ],
)
def test_the_limits_of_a_device(
    is_gpu: bool, working_set: int, expected: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, tuple[Any, ...]] = {}
    for name in ("set_wired_limit", "set_cache_limit", "disable_compile"):
        monkeypatch.setattr(mx, name, lambda *args, name=name: calls.update({name: args}))
    monkeypatch.setattr(device, "is_gpu", lambda: is_gpu)
    monkeypatch.setattr(device, "report", lambda: device.DeviceReport("fake", is_gpu, "0", 2000, working_set))
    device.configure()
    assert calls == expected


def test_an_engine_sets_its_devices_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(device, "configure", lambda: calls.append(True))
    with fake_engine():
        assert calls == [True]
