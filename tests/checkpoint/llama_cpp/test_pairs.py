"""Goldens written as llama.cpp's converters do, loaded again: the same tensors, prompts, logits and answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.bind import bind
from mlxvlm.checkpoint.load import LoadOptions, ModelSource, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.base import Prompt
from tests.checkpoint.llama_cpp.pairs import MMPROJ, TEXT, Kind, write_mmproj, write_pair, write_text
from tests.golden import GOLDENS, Case

# What a golden's config has that llama.cpp's files can't say, and what they mean instead.
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
_LLAMA4 = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "use_qk_norm": True}
UNSAID: dict[str, dict[str, dict[str, Any]]] = {
    "idefics3_split": {},
    "smolvlm2_tied": {},
    "smolvlm_grid27": {},
    "qwen2_vl_tied": {},
    "qwen2_vl_window": {"": _NO_WINDOW},
    "llava_clip": {},
    "llava_siglip": {"text_config": _NO_WINDOW},
    "llava_next_tiles": {"text_config": _NO_WINDOW},
    "llama4_norms": {"text_config": _LLAMA4},
    "llama4_dense": {"text_config": {**_LLAMA4, "no_rope_layer_interval": 4}, "vision_config": {"rope_theta": 10000}},
}
SAME_ANSWERS = ["idefics3_split", "smolvlm2_tied", "qwen2_vl_tied", "llava_clip"]
# Without splitting, or with a number of tiles, that the files can't say either.
OTHER_PICTURES = ["smolvlm_grid27", "llama4_norms", "llama4_dense"]
LOGITS = 1e-5  # RoPE's factors are rounded once more than its frequencies


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pairs")
    return {name: write_pair(root / name, GOLDENS / name) for name in UNSAID}


def quiet(done: int, total: int) -> None:
    pass


def sanitized(source: ModelSource) -> dict[str, mx.array]:
    raw = source.read(QuantSpec(8, 32), quiet, None).weights if source.read else read_weights(source.folder)
    named: dict[str, mx.array] = source.family.build_model(source.config).sanitize(raw)
    return named


def reference(case: Case) -> VisionLanguageModel:
    """The safetensors model with what llama.cpp's files can't say left out."""
    source = case.open()
    config = copy.deepcopy(source.config)
    for part, changes in UNSAID[case.name].items():
        (config[part] if part else config).update(changes)
    model = source.family.build_model(config)
    bind(model, read_weights(case.folder), "float32", quiet)
    return model


def logits(model: VisionLanguageModel, prompt: Prompt) -> np.ndarray:
    features = model.encode_images(prompt.images) if prompt.images else []
    forward = KVPass([KVGroup.single(model.kv_specs, 0)], len(prompt.token_ids))
    return np.array(model.logits(model(model.embed_prompt(prompt, features), forward.layers))[0])


@pytest.mark.parametrize("name", UNSAID)
def test_every_tensor_is_the_hubs(pairs: dict[str, Path], name: str) -> None:
    found, expected = sanitized(open_model(str(pairs[name]))), sanitized(Case(GOLDENS / name).open())
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        assert mx.array_equal(found[tensor], array.astype(mx.float32)), tensor


@pytest.mark.parametrize("name", UNSAID)
def test_logits(pairs: dict[str, Path], name: str) -> None:
    case = Case(GOLDENS / name)
    model, expected = open_model(str(pairs[name])).build(LoadOptions("float32"), quiet), reference(case)
    processor = case.open().processor
    for scenario in [name for name in case.scenarios if name in ("text_only", "one_wide", "two_images")]:
        prompt = processor(case.messages(scenario), case.template)
        difference = np.abs(logits(model, prompt) - logits(expected, prompt)).max()
        assert difference <= LOGITS, scenario


@pytest.mark.parametrize("name", [name for name in UNSAID if name not in OTHER_PICTURES])
def test_prompts(pairs: dict[str, Path], name: str) -> None:
    case = Case(GOLDENS / name)
    source, hub = open_model(str(pairs[name])), case.open()
    # More tokens may end a turn than the hub's configs name.
    assert source.defaults.eos_token_ids >= hub.defaults.eos_token_ids
    assert source.max_context == int(hub.config.get("text_config", hub.config).get("max_position_embeddings", 2048))
    ours, expected = source.processor, hub.processor
    for scenario in case.scenarios:
        found, wanted = (processor(case.messages(scenario), case.template) for processor in (ours, expected))
        assert found.token_ids == wanted.token_ids, scenario
        for image, other in zip(found.images, wanted.images, strict=True):
            assert (image.span, image.layout) == (other.span, other.layout)
            assert np.allclose(image.pixels, other.pixels, atol=1e-6)  # mean and deviation are float32 in the file


@pytest.mark.parametrize("name", OTHER_PICTURES)
def test_text_prompts(pairs: dict[str, Path], name: str) -> None:
    case = Case(GOLDENS / name)
    for scenario in ("text_only", "long_text"):
        if scenario in case.scenarios:
            prompt = open_model(str(pairs[name])).processor(case.messages(scenario), case.template)
            assert list(prompt.token_ids) == case.arrays[f"{scenario}/input_ids"].reshape(-1).tolist()


@pytest.mark.parametrize("name", SAME_ANSWERS)
def test_answers_of_the_reference(pairs: dict[str, Path], name: str) -> None:
    case, source = Case(GOLDENS / name), open_model(str(pairs[name]))
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)
    with Engine(lambda progress: source.build(LoadOptions("float32"), progress), source.processor, config) as engine:
        for scenario in case.batch:
            expected = case.expected(scenario)
            sampling = SamplingParams(max_tokens=len(expected["greedy"]), ignore_eos=True)
            answer = engine.generate(Request(case.messages(scenario), sampling, case.template))
            assert list(answer.token_ids) == expected["greedy"], scenario
            assert answer.text == expected["greedy_text"], scenario


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, ModelSource]:
    """Q8_0, which goes through MLX's packed layout, and the same values as plain floats."""
    root, case = tmp_path_factory.mktemp("q8"), GOLDENS / "idefics3_split"
    packed = write_pair(root / "packed", case, Kind.Q8_0)

    def rounded(writer: gguf.GGUFWriter, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if array.ndim == 2 and array.shape[-1] % 32 == 0:
                data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), Kind.Q8_0)
                arrays[name] = gguf.quants.dequantize(data, Kind.Q8_0).reshape(array.shape)

    plain = root / "plain"
    plain.mkdir()
    write_text(plain / TEXT, case, change=rounded)
    write_mmproj(plain / MMPROJ, case, change=rounded)
    return open_model(str(packed)), open_model(str(plain))


def test_quantised_values(sources: tuple[ModelSource, ModelSource]) -> None:
    packed, plain = (sanitized(source) for source in sources)
    modules = [name.removesuffix(".scales") for name in packed if name.endswith(".scales")]
    assert any(name.endswith("q_proj") for name in modules)
    assert any(name.endswith("embed_tokens") for name in modules)
    assert any("vision_model" in name for name in modules)
    for path in modules:
        parts = (packed[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        weight, scales, biases = parts
        values = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), 32, 8)
        assert mx.array_equal(values, plain[f"{path}.weight"]), path


def test_quantised_logits_and_answers(sources: tuple[ModelSource, ModelSource]) -> None:
    case = Case(GOLDENS / "idefics3_split")
    packed, plain = (source.build(LoadOptions("float32"), quiet) for source in sources)
    for scenario in ("text_only", "two_images"):
        prompt = sources[0].processor(case.messages(scenario))
        first, second = logits(packed, prompt), logits(plain, prompt)
        assert np.abs(first - second).max() <= 1e-4  # sums in another order
        assert (first.argmax(-1) == second.argmax(-1)).all()
