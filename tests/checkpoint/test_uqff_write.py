"""UQFF folders that we write: read back bit for bit, and loaded by mistral.rs itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint import uqff, uqff_write
from mlxvlm.checkpoint.bind import bind
from mlxvlm.checkpoint.container import TensorFile
from mlxvlm.checkpoint.load import open_model
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.uqff_files import find
from mlxvlm.checkpoint.uqff_write import checkpoint_names, write
from mlxvlm.errors import UsageError, WeightsError
from mlxvlm.families import family_of
from mlxvlm.messages import Message, TextPart
from tests.checkpoint.peer import peer_answer
from tests.checkpoint.test_uqff_vectors import answer
from tests.checkpoint.uqff_models import CONFIGS, config_of, linear_paths, tensors_of, write_folder

Tensors = dict[str, mx.array]
AFQ = [QuantSpec(bits, group) for bits in (2, 3, 4, 6, 8) for group in (32, 64)]


def quantised(config: dict[str, Any], recipe: list[QuantSpec], dtype: mx.Dtype) -> tuple[Tensors, dict[str, QuantSpec]]:
    """Every module that a spec of the recipe fits, in turn."""
    tensors = {name: mx.array(array).astype(dtype) for name, array in tensors_of(config).items()}
    specs = {}
    for number, (path, shape) in enumerate(sorted(linear_paths(config).items())):
        spec = recipe[number % len(recipe)]
        if shape[-1] % spec.group_size:
            continue
        specs[path] = spec
        parts = mx.quantize(tensors[f"{path}.weight"], spec.group_size, spec.bits, mode=spec.mode)
        tensors.update(zip((f"{path}.{leaf}" for leaf in ("weight", "scales", "biases")), parts, strict=False))
    return tensors, specs


def source_of(folder: Path, config: dict[str, Any]) -> Path:
    block = {"bits": 4, "group_size": 64}
    text = {**config["text_config"], "quantization_config": block} if "text_config" in config else None
    config = {**config, "quantization": block, **({"text_config": text} if text else {})}
    return write_folder(folder, config, {})


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, array in other.items():
        assert (one[name].dtype, one[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(one[name], array), name


RESIDUAL_ONLY = ("merger", "multi_modal_projector", "connector", "patch_embedding", "position", "tile_embedding")


def residual_only(tensors: Tensors, specs: dict[str, QuantSpec]) -> Tensors:
    """Modules that mistral.rs takes unquantised alone."""
    return {
        f"{path}.weight": mx.dequantize(
            *(tensors[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases")), spec.group_size, spec.bits
        )
        for path, spec in specs.items()
        if any(word in path for word in RESIDUAL_ONLY)
    }


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_affine_weights_come_back_bit_for_bit(family: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    config = config_of(family)
    tensors, specs = quantised(config, AFQ, dtype)
    expected = {**tensors, **residual_only(tensors, specs)}
    for path in specs:
        if f"{path}.weight" in residual_only(tensors, specs):
            del expected[f"{path}.scales"], expected[f"{path}.biases"]
    files = write(tmp_path / "out" / "uqff", "afq4", tensors, specs, source_of(tmp_path / "source", config))
    assert not tensors
    assert files == find("afq4", str(tmp_path / "out" / "uqff"))
    conversion = uqff.read(files, tmp_path / "out" / "uqff")
    same(conversion.weights, expected)
    assert conversion.dtype == dtype
    assert not conversion.notes()


def test_small_files(tmp_path: Path) -> None:
    config = config_of("idefics3")
    source = source_of(tmp_path / "source", config)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'the template' }}"}))
    tensors, specs = quantised(config, AFQ[4:5], mx.float32)
    target = tmp_path / "target"
    write(target, "afq4", tensors, specs, source)
    assert "quantization" not in (target / "config.json").read_text()
    assert json.loads((target / "config.json").read_text()) == config
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == "{{ 'the template' }}"
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert not (target / "chat_template.json").exists()


def written(tmp_path: Path, spec: QuantSpec, dtype: mx.Dtype) -> tuple[Tensors, Tensors, TensorFile]:
    """One module with this spec: what was written, what came back, and the file."""
    weight = mx.random.normal((8, 256), key=mx.random.key(0)).astype(dtype)
    parts = mx.quantize(weight, spec.group_size, spec.bits, mode=spec.mode)
    tensors = dict(zip(("fc1.weight", "fc1.scales", "fc1.biases"), parts, strict=False))
    tensors |= {"fc1.bias": mx.ones((8,), dtype), "norm.weight": mx.ones((4,), dtype)}
    before = dict(tensors)
    source = write_folder(tmp_path / "source", config_of("qwen2_vl"), {})
    (file,) = write(tmp_path / "target", "x", tensors, {"fc1": spec}, source)
    return before, uqff.read([file], tmp_path / "target").weights, TensorFile(file)


def full(tensors: Tensors, spec: QuantSpec) -> mx.array:
    scales, biases = tensors["fc1.scales"], tensors.get("fc1.biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(tensors["fc1.weight"], scales, biases, spec.group_size, spec.bits, spec.mode, dtype=mx.float32)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_five_bits_go_out_as_q5_1(group_size: int, tmp_path: Path) -> None:
    spec = QuantSpec(5, group_size)
    before, after, file = written(tmp_path, spec, mx.float16)
    assert file.read("fc1.weight.dtype").numbers("U32") == [7]
    assert mx.array_equal(full(after, QuantSpec(5, 32)), full(before, spec))
    assert after["fc1.output_scale"].item() == 1
    assert after["fc1.bias"].dtype == mx.float32
    assert mx.array_equal(after["fc1.bias"], before["fc1.bias"].astype(mx.float32))


@pytest.mark.parametrize(
    ("spec", "dtype", "stored"),
    [
        (QuantSpec(5, 64), mx.float32, mx.float32),  # scales that float16 would round
        (QuantSpec(8, 32, "mxfp8"), mx.float16, mx.bfloat16),
        (QuantSpec(4, 16, "nvfp4"), mx.float16, mx.bfloat16),
    ],
)
def test_what_uqff_has_no_type_for_goes_out_unquantised(
    spec: QuantSpec, dtype: mx.Dtype, stored: mx.Dtype, tmp_path: Path
) -> None:
    before, after, file = written(tmp_path, spec, dtype)
    assert file.read("fc1.weight.format").numbers("U8") == [1]
    assert after["fc1.weight"].dtype == stored
    assert mx.array_equal(after["fc1.weight"].astype(mx.float32), full(before, spec))


def test_mxfp4_stays(tmp_path: Path) -> None:
    before, after, file = written(tmp_path, QuantSpec(4, 32, "mxfp4"), mx.bfloat16)
    assert file.read("fc1.weight.format").numbers("U8") == [6]
    same(after, before)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uqff_write, "SHARD_BYTES", 15_000)
    config = config_of("qwen2_vl")
    tensors, specs = quantised(config, AFQ, mx.float32)
    for path in [name.removesuffix(".weight") for name in residual_only(tensors, specs)]:
        del specs[path], tensors[f"{path}.weight"], tensors[f"{path}.scales"], tensors[f"{path}.biases"]
    expected = dict(tensors)
    files = write(tmp_path / "x", "afq", tensors, specs, source_of(tmp_path / "source", config))
    assert [file.name for file in files] == [f"afq-{number}.uqff" for number in range(len(files))]
    assert len(files) > 2
    assert all(file.stat().st_size < 25_000 for file in files)
    assert find(str(files[1]), str(tmp_path)) == files
    same(uqff.read(files, tmp_path / "x").weights, expected)
    for file in files:
        assert mx.load(str(file), format="safetensors")


class TestRefusals:
    def test_a_folder_that_exists(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="exists: name a new folder"):
            write(tmp_path, "x", {}, {}, tmp_path)

    @pytest.mark.parametrize(
        ("name", "words"),
        [("fc1.scales", "fc1 lacks biases"), ("fc1.output_scale", "was re-packed"), ("b", "is of .*bool")],
    )
    def test_tensors_that_can_not_be_written(self, name: str, words: str, tmp_path: Path) -> None:
        parts = mx.quantize(mx.ones((2, 64)), 32, 4)
        tensors = dict(zip(("fc1.weight", "fc1.scales", "fc1.biases"), parts, strict=True))
        tensors |= {"fc1.output_scale": mx.array(1.0)} if "output" in name else {"b": mx.array([True])}
        if name == "fc1.scales":
            del tensors["fc1.biases"]
        source = write_folder(tmp_path / "source", config_of("qwen2_vl"), {})
        with pytest.raises(WeightsError, match=words):
            write(tmp_path / "target", "x", tensors, {"fc1": QuantSpec(4, 32)}, source)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


class TestCheckpointNames:
    def test_the_hubs_own(self) -> None:
        config = config_of("qwen2_vl")
        tensors = {name: mx.array(array) for name, array in tensors_of(config).items()}
        names = checkpoint_names(family_of(config).build_model(config), tensors)
        assert names == {name: name for name in tensors}

    def test_names_of_another_layout(self) -> None:
        config = config_of("llava")
        model = family_of(config).build_model(config)
        theirs = "model.language_model.layers.0.mlp.up_proj.weight"
        assert checkpoint_names(model, {theirs: mx.zeros((96, 64))}) == {
            "language_model.model.layers.0.mlp.up_proj.weight": theirs
        }

    def test_fused_experts(self) -> None:
        config = config_of("llama4")
        model = family_of(config).build_model(config)
        block = "language_model.model.layers.1.feed_forward.experts"
        names = checkpoint_names(model, {f"{block}.gate_up_proj": mx.zeros((3, 64, 64))})
        assert names == {f"{block}.{part}.weight": f"{block}.{part}.weight" for part in ("gate_proj", "up_proj")}

    def test_what_is_dropped(self) -> None:
        config = config_of("qwen2_vl", tie_word_embeddings=True)
        model = family_of(config).build_model(config)
        assert checkpoint_names(model, {"lm_head.weight": mx.zeros((160, 64))}) == {}


@pytest.mark.peers("mistralrs")
@pytest.mark.parametrize(
    ("recipe", "dtype", "gate"),
    [
        (AFQ[4:], mx.float32, 2e-4),
        ([QuantSpec(4, 64)], mx.bfloat16, 1e-3),
        # On a CPU mistral.rs quantises what goes into ggml layers.
        ([QuantSpec(8, 32), QuantSpec(5, 32)], mx.float16, 1e-2),
    ],
    ids=["mixed", "bf16", "q5_1"],
)
def test_mistralrs_answers_the_same(
    recipe: list[QuantSpec], dtype: mx.Dtype, gate: float, tmp_path: Path, mistralrs_python: Path
) -> None:
    config = config_of("qwen2_vl", **PEER_CONFIG)
    # mistral.rs reserves memory for the largest picture in patches of this size.
    config["vision_config"] |= {"patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2}
    config["vision_config"] |= {"temporal_patch_size": 2, "in_chans": 3}
    source = write_folder(tmp_path / "source", config, {})
    (source / "chat_template.json").write_text(json.dumps({"chat_template": PEER_TEMPLATE}))
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps({**settings, "patch_size": 14}))
    tensors, specs = quantised(config, recipe, dtype)
    for name, array in tensors.items():
        if name.endswith((".weight", ".bias")) and array.dtype == dtype:
            # mistral.rs computes in float32 on a CPU, and adds biases as they are stored.
            tensors[name] = array.astype(mx.float32)
    target = tmp_path / "target"
    files = write(target, "tiny", tensors, specs, source)
    theirs = peer_answer(mistralrs_python, target, "tiny-0.uqff", "What is that?", 12)
    opened = open_model(str(target))
    model = opened.family.build_model(opened.config)
    bind(model, uqff.read(files, target).weights, "float32", lambda done, total: None)
    prompt = opened.processor([Message("user", (TextPart("What is that?"),))])
    inputs: list[int] = []
    for text, _ in theirs:
        token_ids, _ = answer(model, prompt, [*inputs, 0])
        inputs.append(token_ids[-1])
        assert opened.processor.tokenizer.decode([token_ids[-1]]) == text
    _, logprobs = answer(model, prompt, inputs)
    assert np.abs(logprobs - [logprob for _, logprob in theirs]).max() <= gate


PEER_CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_window_layers": 2,
    "use_sliding_window": False,
    "sliding_window": 512,
    "tie_word_embeddings": False,
    "vision_start_token_id": 138,
    "vision_end_token_id": 139,
    "vision_token_id": 140,
    "video_token_id": 142,
    "bos_token_id": 135,
    "eos_token_id": 159,
    "torch_dtype": "float32",
}
PEER_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
