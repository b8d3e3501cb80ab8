"""What the engine refuses, bounds and cleans up."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlxvlm.engine import runner
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import InputError, InternalError
from mlxvlm.messages import ImageOptions, ImagePart, Message, TextPart, user
from mlxvlm.processors.base import AS_THE_CHECKPOINT, PreparedImage, Prompt
from tests.engine.test_engine import ids_of
from tests.fakes import IMAGE, IMAGE_TOKENS, FakeModel, FakeProcessor, answer, ask, eventually, fake_engine


def test_a_failed_sequence_is_forgotten() -> None:
    def explode(x: mx.array) -> None:
        raise RuntimeError("the device failed")

    with fake_engine(FakeModel(on_call=explode)) as engine:
        with pytest.raises(InternalError):
            engine.generate(ask([1, 2, 3]))
        assert eventually(lambda: not engine._open)


def test_prompts_go_in_smaller_pieces_beside_running_rows() -> None:
    lengths: list[tuple[int, int]] = []
    model = FakeModel(on_call=lambda x: lengths.append((x.shape[0], x.shape[1])))
    with fake_engine(model, prefill_chunk=50, prefill_chunk_while_decoding=3) as engine:
        running = engine.submit(ask([1], 200))
        next(iter(running))
        engine.generate(ask([2] * 31, 2))
        running.cancel()
    pieces = [length for _, length in lengths if length > 1]
    assert pieces == [3] * 10


def test_a_prompt_that_ends_with_a_picture_is_refused() -> None:
    image = PreparedImage(mx.ones((1,)), (1,), (1, 1 + IMAGE_TOKENS), b"x")  # type: ignore[arg-type]
    prompt = Prompt((5, *[IMAGE] * IMAGE_TOKENS), (image,))
    with fake_engine() as engine, pytest.raises(InputError, match="ends with an image"):
        engine.generate(Request(prompt=prompt))


def test_a_stop_string_completed_by_the_flushed_tail_cuts() -> None:
    class Shouting(FakeProcessor):
        """Its text always ends unfinished, so that all of it comes with the flush."""

        def __init__(self) -> None:
            super().__init__()
            decode = self.tokenizer.decode
            self.tokenizer.decode = lambda ids: decode(ids) + ("\ufffd" if ids else "")

    whole = FakeProcessor().tokenizer.decode(answer([3, 1], 5))
    with fake_engine() as engine:
        engine.processor = Shouting()
        completion = engine.generate(ask([3, 1], 5, stop=(whole[2:4],)))
    assert completion.text == whole[:2]


def test_cancelling_gives_out_what_was_held_back() -> None:
    whole = FakeProcessor().tokenizer.decode(answer([3, 1], 400))
    with fake_engine() as engine:
        stream = engine.submit(ask([3, 1], 4000, stop=(whole[0] + "\0",)))
        deltas = iter(stream)
        given = next(deltas).text
        stream.cancel()
        rest = list(deltas)
    assert rest[-1].finish_reason == "cancelled"
    text = given + "".join(delta.text for delta in rest)
    count = 1 + sum(len(delta.token_ids) for delta in rest)
    assert text == FakeProcessor().tokenizer.decode(answer([3, 1], count))


def test_the_checkpoints_own_sampling_reaches_a_request() -> None:
    with fake_engine(sampling=SamplingParams(max_tokens=4, seed=1, temperature=5.0)) as engine:
        own = ids_of(engine.generate(Request(ask([1]).messages)))
        assert own == ids_of(engine.generate(ask([1], 4, seed=1, temperature=5.0)))


def test_the_number_of_pictures_is_limited_before_any_is_read() -> None:
    message = Message("user", tuple(ImagePart("/no/such/file") for _ in range(3)))
    with fake_engine(max_images=2) as engine:
        with pytest.raises(InputError, match="the request has 3 images, but the limit is 2: send fewer"):
            engine.generate(Request([message, user("more")]))
        assert engine.generate(Request([user("1")], SamplingParams(max_tokens=1))).token_ids


def test_a_request_passes_its_image_options_on() -> None:
    seen: list[ImageOptions] = []

    class Recorder(FakeProcessor):
        def __call__(self, messages: Any, template: Any = None, options: ImageOptions = AS_THE_CHECKPOINT) -> Prompt:
            seen.append(options)
            return super().__call__(messages, template, options)

    with fake_engine() as engine:
        engine.processor = Recorder()
        options = ImageOptions(max_pixels=7)
        engine.generate(Request([user("1")], SamplingParams(max_tokens=1), image_options=options))
    assert seen == [options]


@pytest.mark.parametrize(("room", "batches"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (100, [5])])
def test_pictures_go_through_the_tower_in_few_batches(
    room: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at once as the limit of pixels takes, at least one."""
    found: list[int] = []

    class Counting(FakeModel):
        def encode_images(self, images: Any) -> list[mx.array]:
            found.append(len(images))
            return super().encode_images(images)

    messages = [Message("user", (*(ImagePart(value) for value in range(1, 6)), TextPart("1")))]
    size = FakeProcessor()(messages).images[0].pixels.size
    monkeypatch.setattr(runner, "_VISION_BATCH", room * size)
    with fake_engine(Counting()) as engine:
        engine.generate(Request(messages, SamplingParams(max_tokens=2)))
    assert found == batches
