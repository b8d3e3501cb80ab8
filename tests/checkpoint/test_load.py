"""Opening a model: the checkpoint's own defaults, and what is said of folders and configs that make no sense."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.load import GenerationDefaults, LoadOptions, open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from mlxvlm.families import FAMILIES, family_of
from mlxvlm.processors.files import context_length
from tests.checkpoint.layouts import SPLIT, TIED, config_of, tensors_of, write
from tests.golden import GOLDENS

SUPPORTED = ", ".join(sorted(FAMILIES))
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


class TestGenerationDefaults:
    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            ({"eos_token_id": 7}, {"eos_token_id": 8, "text_config": {"eos_token_id": 9}}, {7}),
            ({"eos_token_id": [7, 5]}, {"eos_token_id": 8}, {7, 5}),
            ({}, {"eos_token_id": 8, "text_config": {"eos_token_id": 9}}, {8}),
            ({}, {"eos_token_id": [8, 6]}, {8, 6}),
            ({"eos_token_id": None}, {"eos_token_id": None, "text_config": {"eos_token_id": [9]}}, {9}),
            ({"eos_token_id": 0}, {"eos_token_id": 8}, {0}),
            ({}, {"text_config": None}, set()),
            ({}, {}, set()),
        ],
    )
    def test_end_of_sequence(self, generation: dict[str, Any], config: dict[str, Any], expected: set[int]) -> None:
        assert GenerationDefaults.from_configs(generation, config) == GenerationDefaults(frozenset(expected))

    @pytest.mark.parametrize("do_sample", [{}, {"do_sample": False}, {"do_sample": None}])
    def test_greedy_unless_it_says_to_sample(self, do_sample: dict[str, Any]) -> None:
        """transformers warns of a temperature without do_sample, and ignores it."""
        found = GenerationDefaults.from_configs({**SAMPLING, **do_sample}, {})
        assert found == GenerationDefaults(frozenset(), temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)

    def test_sampling(self) -> None:
        found = GenerationDefaults.from_configs({"do_sample": True, **SAMPLING}, {})
        assert found == GenerationDefaults(frozenset(), **SAMPLING)

    @pytest.mark.parametrize("absent", [{}, dict.fromkeys(SAMPLING)])
    def test_sampling_that_names_no_numbers(self, absent: dict[str, Any]) -> None:
        found = GenerationDefaults.from_configs({"do_sample": True, **absent}, {})
        assert found == GenerationDefaults(frozenset(), temperature=1.0)

    @pytest.mark.parametrize(
        ("golden", "eos", "context"),
        [("idefics3_split", {158, 160, 163}, 4096), ("smolvlm2_tied", {162}, 2048), ("smolvlm_grid27", {153}, 2048)],
    )
    def test_of_the_goldens(self, golden: str, eos: set[int], context: int) -> None:
        source = open_model(str(GOLDENS / golden))
        assert source.defaults == GenerationDefaults(frozenset(eos))
        assert source.max_context == context
        assert (source.name, source.folder) == (str(GOLDENS / golden), GOLDENS / golden)


class TestFamilies:
    @pytest.mark.parametrize("model_type", sorted(FAMILIES))
    def test_supported(self, model_type: str) -> None:
        family = family_of({"model_type": model_type})
        assert callable(family.model_module().build)
        assert callable(family.processor_module().build)

    @pytest.mark.parametrize("model_type", ["gemma", "", "Idefics3", None, 3, ["idefics3"], {"a": 1}])
    def test_unsupported(self, model_type: Any) -> None:
        with pytest.raises(UnsupportedModelError, match=f"supported: {SUPPORTED}") as caught:
            family_of({"model_type": model_type})
        assert repr(model_type) in str(caught.value)

    def test_no_model_type(self) -> None:
        with pytest.raises(UnsupportedModelError, match="model_type None is not supported"):
            family_of({"architectures": ["Idefics3ForConditionalGeneration"]})


def folder_with(tmp_path: Path, config: dict[str, Any] | str | bytes, **files: str) -> Path:
    """The golden checkpoint with another config.json, and other small files by stem."""
    folder = write(tmp_path / "model", SPLIT, tensors_of(SPLIT))
    raw = json.dumps(config) if isinstance(config, dict) else config
    (folder / "config.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(content)
    return folder


def refusal(folder: Path) -> ModelError:
    """Of a model that is opened and built."""

    def build() -> None:
        open_model(str(folder)).build(LoadOptions("float32"), lambda done, total: None)

    with pytest.raises(ModelError) as caught:
        build()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    return caught.value


class TestFolders:
    @pytest.mark.parametrize("files", [[], ["model.safetensors"], ["adapter_config.json"]])
    def test_no_model(self, files: list[str], tmp_path: Path) -> None:
        for name in files:
            (tmp_path / name).write_text("{}")
        error = refusal(tmp_path)
        assert isinstance(error, ModelNotFoundError)
        assert str(error) == f"{tmp_path} is no model: it has no config.json"

    def test_unsupported_model(self, tmp_path: Path) -> None:
        error = refusal(folder_with(tmp_path, {"model_type": "qwen9_vl"}))
        assert isinstance(error, UnsupportedModelError)
        assert str(error) == f"model_type 'qwen9_vl' is not supported; supported: {SUPPORTED}"

    @pytest.mark.parametrize(
        "config", ["", "{", "[]", "7", "null", "nonsense", b"\xff\xfe\x00", '{"model_type": "idefics3",}']
    )
    def test_broken_config(self, config: str | bytes, tmp_path: Path) -> None:
        assert "config.json" in str(refusal(folder_with(tmp_path, config)))

    def test_no_weights(self, tmp_path: Path) -> None:
        folder = folder_with(tmp_path, config_of(SPLIT))
        (folder / "model.safetensors").unlink()
        assert "has no weights" in str(refusal(folder))


NONSENSE: list[tuple[str, str, Any]] = [
    *(("text_config", "hidden_size", value) for value in ("32", -32, 0, [32])),
    *(("text_config", "num_attention_heads", value) for value in ("2", -2, 0, [2])),
    ("text_config", "intermediate_size", 32.5),
    ("text_config", "vocab_size", "many"),
    ("text_config", "vocab_size", 10**15),
    ("text_config", "num_hidden_layers", "two"),
    ("text_config", "num_hidden_layers", -1),
    ("text_config", "num_hidden_layers", True),
    ("text_config", "num_key_value_heads", -1),
    ("text_config", "num_key_value_heads", 3),
    ("text_config", "head_dim", -16),
    ("text_config", "rms_norm_eps", "1e-5"),
    ("text_config", "max_position_embeddings", "long"),
    ("text_config", "max_position_embeddings", -4096),
    ("text_config", "rope_theta", "hot"),
    ("text_config", "rope_scaling", "llama3"),
    ("text_config", "rope_scaling", {"rope_type": "llama3"}),
    ("text_config", "rope_scaling", {"type": "linear", "factor": "x"}),
    ("text_config", "rope_scaling", {"rope_type": "yarn", "factor": 4}),
    ("text_config", "rope_scaling", {"rope_type": ["llama3"]}),
    ("text_config", "hidden_act", "tanhh"),
    ("text_config", "hidden_act", 3),
    ("vision_config", "hidden_size", "32"),
    ("vision_config", "hidden_size", -32),
    ("vision_config", "num_attention_heads", 3),
    ("vision_config", "num_attention_heads", 0),
    ("vision_config", "image_size", -16),
    ("vision_config", "patch_size", 0),
    ("vision_config", "patch_size", -4),
    ("vision_config", "patch_size", "4"),
    ("vision_config", "layer_norm_eps", "small"),
    ("vision_config", "hidden_act", "tanhh"),
    ("", "text_config", "llama"),
    ("", "text_config", [1]),
    ("", "vision_config", 7),
    ("", "scale_factor", "2"),
    ("", "scale_factor", 0),
    ("", "scale_factor", -2),
    ("", "scale_factor", 3),
    ("", "image_token_id", "<image>"),
    ("", "image_token_id", -1),
    ("text_config", "num_hidden_layers", 2**62),
    ("vision_config", "num_hidden_layers", 1001),
    ("text_config", "head_dim", 2**31 - 1),
    ("", "eos_token_id", "end"),
]


@pytest.mark.parametrize(("part", "name", "value"), NONSENSE, ids=lambda value: str(value)[:40])
def test_nonsense_in_the_config(part: str, name: str, value: Any, tmp_path: Path) -> None:
    config = config_of(SPLIT)
    (config[part] if part else config)[name] = value
    files = {} if name != "eos_token_id" else {"generation_config": "{}"}
    refusal(folder_with(tmp_path, config, **files))


@pytest.mark.parametrize(
    "generation",
    [
        {"eos_token_id": "end"},
        {"eos_token_id": [[1]]},
        {"eos_token_id": {"a": 1}},
        {"do_sample": True, "temperature": "warm"},
        {"do_sample": True, "top_k": [1]},
        {"do_sample": True, "top_p": {}, "repetition_penalty": "x"},
    ],
    ids=str,
)
def test_nonsense_in_the_generation_config(generation: dict[str, Any], tmp_path: Path) -> None:
    refusal(folder_with(tmp_path, config_of(SPLIT), generation_config=json.dumps(generation)))


@pytest.mark.parametrize("stem", ["processor_config", "preprocessor_config", "tokenizer_config", "generation_config"])
@pytest.mark.parametrize("content", ["[]", "{", "7"])
def test_broken_small_files(stem: str, content: str, tmp_path: Path) -> None:
    assert f"{stem}.json" in str(refusal(folder_with(tmp_path, config_of(SPLIT), **{stem: content})))


ZERO, NEGATIVE, TEXT = 0, -8, "8"
BAD_SIDES: dict[str, list[dict[str, Any]]] = {
    "idefics3_split": [
        *({"size": {"longest_edge": side}} for side in (ZERO, NEGATIVE, TEXT, 1.5)),
        *({"size": {"height": side, "width": 8}} for side in (ZERO, NEGATIVE, TEXT)),
        *({"max_image_size": {"longest_edge": side}} for side in (ZERO, NEGATIVE, TEXT, None, 64)),
        {"size": 48},
        {"max_image_size": 16},
    ],
    "llava_clip": [
        *({"size": {"shortest_edge": side}} for side in (ZERO, NEGATIVE, TEXT)),
        *({"size": side} for side in (ZERO - 1, NEGATIVE, TEXT)),
        *({"crop_size": side} for side in (NEGATIVE, TEXT, {"height": ZERO, "width": 18})),
    ],
    "llava_siglip": [{"size": {"height": side, "width": 12}} for side in (ZERO, NEGATIVE, TEXT)],
    "llava_next_tiles": [
        *({"size": {"shortest_edge": side}} for side in (NEGATIVE, TEXT)),
        *({"crop_size": {"height": side, "width": side}} for side in (ZERO, NEGATIVE, TEXT)),
        *({"image_grid_pinpoints": [[12, side]]} for side in (ZERO, -12, "wide")),
    ],
    "mllama_tiles": [
        *({"size": {"height": side, "width": side}} for side in (ZERO, NEGATIVE, TEXT)),
        *({"max_image_tiles": count} for count in (ZERO, NEGATIVE, TEXT)),
    ],
    "llama4_dense": [
        *({"size": {"height": side, "width": side}} for side in (ZERO, NEGATIVE, TEXT)),
        *({"max_patches": count} for count in (ZERO, NEGATIVE, TEXT)),
    ],
    "qwen2_vl_tied": [
        {name: count} for name in ("patch_size", "merge_size", "max_pixels") for count in (ZERO, NEGATIVE, TEXT)
    ],
}
BAD_PIXELS: list[dict[str, Any]] = [
    *({"resample": value} for value in (99, -1, "bicubic", None, 2.5)),
    *({"image_mean": value} for value in ([0.5, 0.5], [0.5] * 4, ["a"] * 3, "grey", None)),
    *({"image_std": value} for value in ([0.5, 0.5], [0.5] * 4, [0.5, 0.5, None], 0, [0.5, 0, 0.5], float("nan"))),
    *({"rescale_factor": value} for value in ("1/255", None, [0.004])),
]
BAD_IMAGES = [(golden, bad) for golden, sides in BAD_SIDES.items() for bad in [*sides, *BAD_PIXELS]]


@pytest.mark.parametrize(("golden", "bad"), BAD_IMAGES, ids=lambda value: str(value)[:60])
def test_nonsense_in_the_image_processor(golden: str, bad: dict[str, Any], tmp_path: Path) -> None:
    """Said when the model is opened, not when the first picture comes."""
    for path in (GOLDENS / golden).iterdir():
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    open_model(str(tmp_path))
    file.write_text(json.dumps(settings | bad))
    with pytest.raises(ModelError) as caught:
        open_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_context_of_a_config_that_leaves_it_out(tmp_path: Path) -> None:
    config = config_of(TIED)
    del config["text_config"]["max_position_embeddings"]
    assert open_model(str(write(tmp_path / "m", TIED, tensors_of(TIED), config=config))).max_context == 2048


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "a", "text_config": {"max_position_embeddings": 7}}, 7),
        ({"model_type": "a", "max_position_embeddings": 8}, 8),
        ({"model_type": "a", "text_config": {"vocab_size": 1}}, 2048),  # LlamaConfig
        ({"model_type": "a", "text_config": {"model_type": "llama"}}, 2048),
        ({"model_type": "a", "text_config": {"model_type": "mistral"}}, 131072),  # MistralConfig
        ({"model_type": "a", "text_config": {"model_type": "qwen2"}}, 32768),  # Qwen2Config
        ({"model_type": "qwen2_vl"}, 32768),  # Qwen2VLTextConfig
        ({"model_type": "a"}, 131072),  # MllamaTextConfig, Llama4TextConfig
    ],
)
def test_context_of_partial_configs_is_the_references(config: dict[str, Any], expected: int) -> None:
    assert context_length(config) == expected


def test_opening_imports_no_mlx() -> None:
    """The door that shows an error message should not wait for a GPU."""
    code = "import sys; from mlxvlm.checkpoint.load import open_model; open_model(sys.argv[1])"
    code += "; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(SPLIT)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("name", "spec"), [("none", None), ("4@32", QuantSpec(4, 32)), ("Q8_0", QuantSpec(8))])
def test_what_has_no_exact_form_becomes_what_is_asked_for(name: str, spec: QuantSpec | None) -> None:
    asked = []

    def read(requantize: QuantSpec | None, progress: Any, shrink: Any) -> Conversion:
        asked.append(requantize)
        conversion = Conversion(requantize)
        conversion.weights = read_weights(SPLIT)
        return conversion

    replace(open_model(str(SPLIT)), read=read).build(LoadOptions(requantize=name), lambda done, total: None)
    assert asked == [spec]
