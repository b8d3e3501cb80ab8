"""Every path against transformers: ids, pixels, logits at all recorded positions, greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.base import Prompt
from tests.golden import Case

LOGITS = 1e-4  # absolute, float32; transformers differs from itself (cached, uncached) by 1e-5
PIXELS = 1e-5
# torchvision's weights have 15 bits and Pillow's 22, so a byte may come out one level lower or higher; where pixels
# pass through bfloat16, as in the only such reference, one level is at most 3 / 256.
PIXELS_OTHER_RESAMPLING = 3 / 256


@pytest.fixture(scope="module")
def loaded(case: Case) -> tuple[Case, VisionLanguageModel, dict[str, Prompt]]:
    processor = case.open().processor
    prompts = {scenario: processor(case.messages(scenario), case.template) for scenario in case.scenarios}
    return case, case.build(), prompts


def all_logits(model: VisionLanguageModel, prompt: Prompt, chunk: int) -> np.ndarray:
    """[L, V], the prompt fed in pieces."""
    features = model.encode_images(prompt.images) if prompt.images else []
    inputs = model.embed_prompt(prompt, features)
    group = KVGroup.single(model.kv_specs, 0)
    pieces = []
    for start in range(0, len(prompt.token_ids), chunk):
        piece = inputs[start : start + chunk]
        forward = KVPass([group], piece.embeds.shape[1])
        pieces.append(model.logits(model(piece, forward.layers)))
        forward.commit()
        mx.eval(pieces[-1])
    return np.array(mx.concatenate(pieces, axis=1)[0])


def test_token_ids(loaded: tuple[Case, VisionLanguageModel, dict[str, Prompt]]) -> None:
    case, _, prompts = loaded
    for scenario, prompt in prompts.items():
        assert list(prompt.token_ids) == case.arrays[f"{scenario}/input_ids"].reshape(-1).tolist(), scenario


def real_frames(expected: np.ndarray, counts: list[int]) -> np.ndarray:
    """All pictures' frames, [F, 3, h, w], out of any of transformers' shapes.

    [F, 3, h, w]; [1, F, 3, h, w] for a prompt; [pictures, most frames, 3, h, w] with empty frames at the end of some.
    """
    if expected.ndim == 5 and len(expected) == len(counts) > 1:
        return np.concatenate([frames[:count] for frames, count in zip(expected, counts, strict=True)])
    return expected.reshape(-1, *expected.shape[-3:])


def test_pixels(loaded: tuple[Case, VisionLanguageModel, dict[str, Prompt]]) -> None:
    case, _, prompts = loaded
    compared = 0
    for scenario, prompt in prompts.items():
        expected = case.pixels(scenario) if prompt.images else None
        if expected is None:
            continue
        ours = np.concatenate([image.pixels for image in prompt.images])
        frames = real_frames(expected, [len(image.pixels) for image in prompt.images])
        # One reference repeats a picture's frame in time.
        frames = frames.reshape(*ours.shape[:-2], -1, *ours.shape[-2:])
        gate = PIXELS if case.is_resampled_by_pillow else PIXELS_OTHER_RESAMPLING
        assert np.abs(ours[..., None, :, :] - frames).max() <= gate, scenario
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_logits(loaded: tuple[Case, VisionLanguageModel, dict[str, Prompt]], chunk: int) -> None:
    case, model, prompts = loaded
    for scenario in prompts:
        prompt = prompts[scenario]
        if not case.is_resampled_by_pillow:
            prompt = case.with_golden_pixels(scenario, prompt)
        logits = all_logits(model, prompt, chunk)
        arrays = case.arrays
        assert np.abs(logits[-1] - arrays[f"{scenario}/logits_last"].reshape(-1)).max() <= LOGITS, scenario
        peak = logits.max(axis=-1, keepdims=True)
        lse = (peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True)))[:, 0]
        assert np.abs(lse - arrays[f"{scenario}/lse"].reshape(-1)).max() <= LOGITS, scenario
        assert logits.argmax(-1).tolist() == arrays[f"{scenario}/argmax"].reshape(-1).tolist(), scenario
        if f"{scenario}/logits" in arrays:
            assert np.abs(logits - arrays[f"{scenario}/logits"].reshape(logits.shape)).max() <= LOGITS, scenario


@pytest.fixture(scope="module", params=[1, 7, 64], ids=lambda chunk: f"chunk{chunk}")
def engine(case: Case, request: pytest.FixtureRequest) -> Iterator[Engine]:
    source = case.open()
    config = EngineConfig(
        source.max_context,
        source.defaults.eos_token_ids,
        prefill_chunk=request.param,
        prefill_chunk_while_decoding=request.param,
    )
    with Engine(lambda progress: source.build(LoadOptions("float32"), progress), source.processor, config) as running:
        yield running


def greedy(case: Case, scenario: str) -> Request:
    count = len(case.expected(scenario)["greedy"])
    sampling = SamplingParams(max_tokens=count, ignore_eos=True)
    return Request(case.messages(scenario), sampling, case.template)


def is_same_text(streamed: str, whole: str) -> bool:
    """Equal but for U+FFFD in the whole text: SentencePiece's byte tokens make one of each byte of an invalid run.

    So a good "Y" becomes one when a broken byte follows, after a stream has given it out. Words and letters have tokens
    of their own, so only random weights write such runs; streamed answers keep the letter.
    """
    return len(streamed) == len(whole) and all(b in (a, "\ufffd") for a, b in zip(streamed, whole, strict=True))


def test_greedy_alone(case: Case, engine: Engine) -> None:
    for scenario in case.scenarios:
        answer = engine.generate(greedy(case, scenario))
        assert list(answer.token_ids) == case.expected(scenario)["greedy"], scenario
        assert is_same_text(answer.text, case.expected(scenario)["greedy_text"]), scenario
        assert answer.usage.prompt_tokens == case.expected(scenario)["seq_len"], scenario


def test_greedy_in_one_batch(case: Case, engine: Engine) -> None:
    streams = {scenario: engine.submit(greedy(case, scenario)) for scenario in case.scenarios}
    for scenario, stream in streams.items():
        assert list(stream.result().token_ids) == case.expected(scenario)["greedy"], scenario
