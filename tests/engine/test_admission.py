"""What is reserved is never less than what is allocated, and what does not fit waits or is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine import admission, device, kv_cache, scheduler
from mlxvlm.engine.admission import Admission, Need, Sizes
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.errors import MemoryBudgetError, ModelError, OverloadedError
from mlxvlm.messages import ImagePart, Message, TextPart
from mlxvlm.models.base import KVSpec
from mlxvlm.processors.base import PreparedImage, Prompt
from tests.engine.guessing import Told, told
from tests.engine.test_engine import ids_of
from tests.fakes import FakeModel, Gate, answer, ask, eventually, fake_engine, is_empty
from tests.golden import GOLDENS, Case

SPEC = KVSpec(1, 4)
WIDTH = 128
PER_TOKEN = SPEC.bytes_per_token(mx.float32)
PLAIN = Sizes(PER_TOKEN, 1, 4, 4, 61, 1, lambda prompt: 0, 2048, 1000)


def picture(values: int) -> PreparedImage:
    return PreparedImage(np.zeros(values, np.float32), (1,), (0, 1), b"")


def test_what_a_row_needs() -> None:
    sizes = Sizes(7, 1, 5, 2, 11, 3, lambda prompt: 1000 * len(prompt.images), 4, 100)
    of_text = Admission(10**9, 0, sizes).need(Prompt((1,) * 9), 20)
    assert of_text == Need(28, 9 * 5 * 2 + 112 * 11, (24 * 4 * 5 + 3 * 3 * 4 * 9) * 2)
    with_pictures = Prompt((1,) * 9, (picture(70), picture(60)))
    assert Admission(10**9, 0, sizes).need(with_pictures, 1) == Need(9, 2 * 90 + 4 * 130 + 2000 + 1232, 80 * 100 * 2)
    # What an answer that outgrows the context may run again, and one layer's keys and values in full.
    again = Admission(10**9, 0, replace(sizes, unpacked_token=13)).need(Prompt((1,) * 9), 20, 50)
    assert again == Need(28, 50 * 5 * 2 + 112 * 11, (24 * 4 * 5 + 3 * 3 * 4 * 50) * 2 + 13 * 50)
    large = Prompt((1,) * 9, (picture(700),))
    assert Admission(10**9, 0, sizes).need(large, 1).work == 80 * 700 * 2


def test_what_rows_need_together() -> None:
    rows = Admission(10**9, 0, PLAIN)
    alone, long = Need(300, 10, 5), Need(600, 20, 7)
    assert rows.bytes_of([]) == 0
    assert rows.bytes_of([alone]) == 2 * 512 * PER_TOKEN + 15
    # One slot and a free one each, as long as their classes are; one unit of work at a time.
    assert rows.bytes_of([alone, long]) == 2 * 2 * (512 + 1024) * PER_TOKEN + 30 + 7


def test_reserved_bytes_come_back() -> None:
    rows = Admission(30_000, 100, PLAIN)
    need = Need(100, 0, 0)
    assert rows.reserve(1, need)
    assert rows.reserved == rows.bytes_of([need])
    assert not rows.reserve(2, Need(2000, 0, 0))
    assert not rows.reserve(1, Need(2000, 0, 0))  # grown, in vain
    assert rows.reserved == rows.bytes_of([need])
    rows.release(2)
    rows.release(1)
    assert rows.reserved == 0
    with pytest.raises(
        MemoryBudgetError, match=r"needs up to 131\.1 kB for 2000 tokens, beside 100 bytes of the model"
    ):
        rows.check(Need(2000, 0, 0))


def test_what_is_left_of_two_pays_for_their_buffer_until_it_ends() -> None:
    shared, need = Admission(10**9, 100, PLAIN), Need(100, 0, 0)
    assert shared.reserve(1, need)
    alone = shared.reserved
    assert shared.reserve(2, need)
    shared.release(2)
    assert shared.reserved == shared.bytes_of([need], is_shared=True) > alone
    shared.release(1)
    assert shared.reserve(1, need)
    assert shared.reserved == alone
    shared.release(1)


EVENTS = st.lists(st.tuples(st.sampled_from("jjdddddr"), st.integers(1, 40), st.integers(1, 40)), max_size=60)


LAYOUTS = [SPEC, KVSpec(1, 32, bits=8, group_size=32), KVSpec(1, 32, bits=4, group_size=32)]


@pytest.mark.parametrize("spec", LAYOUTS, ids=["plain", "8-bits", "4-bits"])
@settings(deadline=None, max_examples=60)
@given(events=EVENTS)
def test_no_batch_outgrows_what_its_rows_pay_for(spec: KVSpec, events: list[tuple[str, int, int]]) -> None:
    """Rows join, decode to their ends and leave; the buffers stay below the sum over rows of two slots."""
    sizes = replace(PLAIN, kv_token=spec.bytes_per_token(mx.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_STEP", 4)
        patch.setattr(kv_cache, "_SHORT", 8)
        rows, batch = Admission(10**9, 0, sizes), KVBatch()
        left: dict[int, int] = {}
        for number, (event, length, more) in enumerate(events):
            if event == "j":
                rows.reserve(number, Need(length + more, 0, 0))
                group = KVGroup.single([spec], number)
                extend([group], length)
                left[number] = more
                batch.join(group)
            elif event == "r" and left:
                leave(batch, rows, left, sorted(left)[length % len(left)])
            elif left:
                forward = batch.forward()
                write(forward, len(left), 1)
                for owner in list(left):
                    left[owner] -= 1
                    if not left[owner]:
                        leave(batch, rows, left, owner)
            # Half of what is reserved is for copies, as there is one layer.
            assert 2 * batch.nbytes <= rows.reserved


def test_a_group_has_at_most_two_slots_a_row() -> None:
    batch = KVBatch()
    for number in range(9):
        group = KVGroup.single([SPEC], number)
        extend([group], 3)
        batch.join(group)
    for number in range(8):
        batch.remove(number)
        assert batch.groups[0]._slots <= 2 * len(batch.owners)


def extend(groups: list[KVGroup], new: int) -> None:
    write(KVPass(groups, new), sum(len(group.owners) for group in groups), new)


def write(forward: KVPass, rows: int, new: int) -> None:
    values = mx.zeros((rows, 1, new, forward.groups[0].specs[0].head_dim))
    forward.layers[0].attend(values, values, values, 1.0)
    forward.commit()


def leave(batch: KVBatch, rows: Admission, left: dict[int, int], owner: int) -> None:
    batch.remove(owner)
    rows.release(owner)
    del left[owner]


class Wide(FakeModel):
    """With keys and values that outweigh all else, in several layers of which the last one counts."""

    def __init__(self, layers: int, on_call: Any = None) -> None:
        super().__init__(KVSpec(1, WIDTH), on_call)
        self.kv_specs = [*self.kv_specs] * layers

    def _embed(self, ids: mx.array) -> mx.array:
        return mx.repeat(super()._embed(ids)[..., :1], WIDTH, axis=-1)

    def __call__(self, inputs: Any, cache: Any) -> mx.array:
        heads = inputs.embeds[:, None]
        for layer in cache[:-1]:
            inputs.embeds[:] += 0 * layer.attend(heads, heads, heads, 1.0)[:, 0]
        return super().__call__(inputs, cache[-1:])


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("layers", [1, 4])
def test_no_more_is_allocated_than_is_reserved(layers: int, kv_bits: int | None) -> None:
    """MLX's own counter, over rows of all lengths that come and go."""
    reserved: list[int] = []
    model = Wide(layers, lambda x: reserved.append(engine.stats().reserved_bytes))
    with fake_engine(model, max_rows=6, kv_bits=kv_bits) as engine:
        engine.generate(ask([1], 2))
        floor = mx.get_active_memory()
        mx.reset_peak_memory()
        lengths = [(600, 30), (20, 5), (500, 40), (1000, 60), (3, 12), (510, 9), (700, 30), (40, 20), (900, 20)]
        streams = [engine.submit(ask([number] * length, count)) for number, (length, count) in enumerate(lengths, 1)]
        for number, ((length, count), stream) in enumerate(zip(lengths, streams, strict=True), 1):
            assert ids_of(stream.result()) == answer([number] * length, count)
        assert mx.get_peak_memory() - floor <= max(reserved)
        assert eventually(lambda: mx.get_active_memory() <= floor)
        assert eventually(lambda: engine.stats().reserved_bytes == 0)


@pytest.mark.parametrize(
    "name", ["idefics3_split", "llama4_norms", "llava_next_tiles", "mllama_tiles", "qwen2_vl_window"]
)
@pytest.mark.parametrize("scenario", ["two_images", "long_text"])
def test_every_family_stays_below_what_is_reserved(name: str, scenario: str) -> None:
    case = Case(GOLDENS / name)
    source = case.open()
    prompt = source.processor(case.messages(scenario), case.template)
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)
    with Engine(partial(source.build, LoadOptions("float32")), source.processor, config) as engine:
        floor = mx.get_active_memory()
        mx.reset_peak_memory()
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        engine.generate(Request(sampling=sampling, prompt=prompt))
        peak = mx.get_peak_memory() - floor
        rows = engine._admission
        assert peak <= rows.bytes_of([rows.need(prompt, 20)])


def budget_for(*needs: tuple[int, int]) -> int:
    """Bytes for rows of (prompt, max_tokens), beside what other tests have left behind."""
    rows = Admission(1 << 60, 0, Sizes(PER_TOKEN, 1, 4, 4, 61, 1, lambda prompt: 0, 2048, 10**9))
    return rows.bytes_of([rows.need(Prompt((1,) * length), count) for length, count in needs])


class Wordy(FakeModel):
    """So many words that logits outweigh all else."""

    vocab_size = 30_000

    def logits(self, hidden: mx.array) -> mx.array:
        few = super().logits(hidden)
        rest = mx.full((*few.shape[:-1], self.vocab_size - few.shape[-1]), -5.0)
        return mx.concatenate([few, rest], axis=-1)


EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 50,
    "min_p": 0.01,
    "typical_p": 0.99,
    "xtc_probability": 0.5,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "logit_bias": {1: 1.0},
    "top_logprobs": 20,
    "seed": 1,
}


@pytest.mark.parametrize(("rows", "guesses"), [(1, 0), (6, 0), (1, 15), (4, 3)])
def test_sampling_stays_below_what_is_reserved(rows: int, guesses: int) -> None:
    """In every way at once, with a step under way, and with guesses to check."""
    limits = {"speculation": "on", "max_draft_tokens": guesses} if guesses else {}
    with fake_engine(Wordy(), **limits) as engine:
        if guesses:
            told(engine, Told({})).guess = lambda row, count: [1] * count
        engine.generate(ask([1], 2))
        assert eventually(lambda: is_empty(engine))
        mx.clear_cache()
        mx.reset_peak_memory()
        floor, reserved = mx.get_active_memory(), 0
        streams = [engine.submit(ask([number, 2], 20, **EVERYTHING)) for number in range(1, rows + 1)]
        for stream in streams:
            for _ in stream:
                reserved = max(reserved, engine.stats().reserved_bytes)
        assert bool(engine.stats().drafted_tokens) == bool(guesses)
        assert mx.get_peak_memory() - floor <= reserved


def test_what_does_not_fit_beside_others_waits() -> None:
    sizes: list[int] = []
    model = FakeModel(on_call=lambda x: sizes.append(x.shape[0]))
    budget = mx.get_active_memory() + budget_for((600, 50), (600, 50)) + 1000
    with fake_engine(model, max_memory_bytes=budget) as engine:
        streams = [engine.submit(ask([number] * 600, 50)) for number in range(1, 6)]
        for number, stream in enumerate(streams, 1):
            assert ids_of(stream.result()) == answer([number] * 600, 50)
    assert max(sizes) == 2


def test_what_never_fits_is_refused_at_once() -> None:
    budget = mx.get_active_memory() + budget_for((600, 50)) + 1000
    with fake_engine(max_memory_bytes=budget) as engine:
        other = engine.submit(ask([1] * 600, 50))
        with pytest.raises(MemoryBudgetError, match=r"for 2599 tokens.*budget is.*lower max_tokens"):
            engine.generate(ask([1] * 600, 2000))
        assert ids_of(other.result()) == answer([1] * 600, 50)
        assert eventually(lambda: engine.stats().reserved_bytes == 0)


@pytest.mark.parametrize(("tokens", "expected"), [(250, 192), (400, 448), (10**4, 700 - 5)])
def test_an_answer_without_a_limit_ends_where_the_budget_does(
    tokens: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps end within buffers of 256 and 512 tokens, the context at 700."""
    for module in (admission, scheduler):
        monkeypatch.setattr(module, "ANSWER_STEP", 64)
    budget = mx.get_active_memory() + budget_for((5, tokens)) + 1000
    with fake_engine(max_memory_bytes=budget, max_context=700) as engine:
        completion = engine.generate(ask([1] * 5, None))
    assert completion.finish_reason == "length"
    assert ids_of(completion) == answer([1] * 5, expected)


def test_a_model_larger_than_the_budget_is_refused() -> None:
    weights = mx.ones(100)
    mx.eval(weights)
    with pytest.raises(ModelError, match="the memory budget is 300 bytes: quantise the model"):
        fake_engine(max_memory_bytes=300)
    assert not any(thread.name.startswith("mlxvlm") for thread in threading.enumerate())


def test_a_full_queue_refuses() -> None:
    gate = Gate()
    with fake_engine(FakeModel(on_call=gate), max_rows=1, max_queue=2) as engine:
        running = engine.submit(ask([1, 2], 5))
        assert gate.entered.wait(30)
        waiting = [engine.submit(ask([number, 3], 5)) for number in (4, 5)]
        assert (engine.stats().running, engine.stats().waiting) == (1, 2)
        with pytest.raises(OverloadedError, match="2 requests are waiting, which is the limit"):
            engine.submit(ask([6]))
        waiting.pop().cancel()
        gate.opened.set()
        assert ids_of(running.result()) == answer([1, 2], 5)
        assert ids_of(waiting[0].result()) == answer([4, 3], 5)
        assert ids_of(engine.generate(ask([6], 5))) == answer([6], 5)
    assert OverloadedError.http_status == 429
    assert OverloadedError.retry_after_s > 0


def test_waiting_pictures_are_bounded_in_bytes() -> None:
    gate = Gate()
    text, shown = TextPart("5"), Message("user", (ImagePart(7), TextPart("2")))
    with fake_engine(FakeModel(on_call=gate), max_rows=1, max_queue_bytes=7) as engine:
        running = engine.submit(ask([1, 2], 5))
        assert gate.entered.wait(30)
        streams = [engine.submit(Request([shown], SamplingParams(max_tokens=2))) for _ in range(3)]
        worded = engine.submit(Request([Message("user", (text,))], SamplingParams(max_tokens=2)))
        assert eventually(lambda: engine._commands.qsize() == 4)
        gate.opened.set()
        with pytest.raises(OverloadedError, match="pictures"):
            streams[1].result()
        with pytest.raises(OverloadedError, match="pictures"):
            streams[2].result()
        assert ids_of(streams[0].result()) == answer([7, 7, 7, 0, 2], 2)
        assert ids_of(worded.result()) == answer([5], 2)
        running.result()


def test_stats_count() -> None:
    with fake_engine(max_memory_bytes=10**10) as engine:
        engine.generate(ask([1, 2], 5))
        engine.generate(ask([3], 2))
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.reserved_bytes, stats.budget_bytes) == (0, 0, 0, 10**10)
    assert (stats.generated_tokens, stats.steps) == (7, 7)


@pytest.mark.parametrize("working_set", [0, 1000])
def test_the_default_budget(working_set: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "report", lambda: device.DeviceReport("fake", True, "0", 2000, working_set))
    assert device.default_budget() == (working_set or 1600)


def test_a_machine_that_does_not_tell_its_memory() -> None:
    assert 10**8 < device.default_budget() < 10**14


def test_cross_attention_states_are_counted() -> None:
    case = Case(GOLDENS / "mllama_tiles")
    source = case.open()
    model: Any = source.build(LoadOptions("float32"), lambda done, total: None)
    prompt = source.processor(case.messages("two_images"), case.template)
    features = model.encode_images(prompt.images)
    vision = model.embed_prompt(prompt, features).rows[0].vision
    held = sum(array.nbytes for array in (*vision.keys, *vision.values, *features))
    assert model.state_bytes(prompt) == held > 0
    assert model.state_bytes(Prompt((1, 2))) == 0
