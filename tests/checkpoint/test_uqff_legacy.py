"""Numbered records of UQFF 0.1 and 0.2: their fields, their orders in every family, and what they leave out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint import uqff
from mlxvlm.checkpoint.bind import fit
from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.uqff_layers import add
from mlxvlm.checkpoint.uqff_legacy import parts_of
from mlxvlm.errors import ModelError, UnsupportedModelError, WeightsError
from mlxvlm.families import family_of
from tests.checkpoint.test_uqff import logits, twin
from tests.checkpoint.uqff_models import config_of, linear_paths, tensors_of, write_folder
from tests.checkpoint.uqff_samples import FORMATS, Sample, Stored, u8, u32, write_container

DTYPES = {"U8": 0, "U32": 1, "F16": 4, "BF16": 5, "F32": 6, "F8_E4M3": 9}
HEAD = 0x00000103.to_bytes(4, "little")
# What follows the type, by what 1.x calls it: T a tensor, + the bytes as they are, n a count and numbers.
FIELDS = {
    0: ["LENGTH", "BIAS", "+dtype", "nshape", "+"],
    1: ["BIAS", "T"],
    2: ["BIAS", "T", "Tscales", "Tzeros", "nshape", "+bits", "+group_size", "+axis", "+optimization_steps"],
    3: ["BIAS", "T", "+dequant_w_scale", "+dequant_x_scale", "+quant_scale", "+dtype"],
    4: ["BIAS", "T", "Tscales", "Tbiases", "+bits", "+group_size"],
    5: ["BIAS", "+num_blocks", "nshape", "+"],
    6: ["BIAS", "T", "Tscales"],
}
FIELDS[2] += ["+round_zeros", "+channel_wise"]


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def tensor(stored: Stored) -> bytes:
    dtype, shape, raw = stored
    return number(len(raw)) + number(DTYPES[dtype]) + number(len(shape)) + b"".join(map(number, shape)) + raw


def record(sample: Sample, head: bytes = HEAD) -> bytes:
    """A layer as the releases of 2024 and 2025 wrote it."""
    kind = sample.tensors["weight.format"][2]
    data, bias = head + kind, sample.tensors.get("bias")
    for field in FIELDS[kind[0]]:
        if field == "LENGTH":
            data += number(len(sample.tensors["weight"][2]))
        elif field == "BIAS":
            data += bytes([bias is not None])
        else:
            part = sample.tensors["weight" if len(field) == 1 else f"weight.{field[1:]}"]
            count = number(part[1][0]) if field[0] == "n" else b""
            data += tensor(part) if field[0] == "T" else count + part[2]
    return data + (b"" if bias is None else tensor(bias))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_records_are_read_like_layers_of_today(kind: str, has_bias: bool) -> None:
    sample = FORMATS[kind](np.random.default_rng(0), (4, 256))
    if has_bias:
        sample = sample.with_bias(np.arange(4, dtype=np.uint8) + 50, "F8_E4M3")
    one, other = Conversion(), Conversion()
    add(one, "a", parts_of(np.frombuffer(record(sample), np.uint8)))
    names = {f"{name.removeprefix('weight').removeprefix('.')}": tensor for name, tensor in sample.tensors.items()}
    from mlxvlm.checkpoint.container import Tensor

    add(other, "a", {n: Tensor(d, s, np.frombuffer(raw, np.uint8)) for n, (d, s, raw) in names.items()})
    assert one.weights.keys() == other.weights.keys()
    assert ("a.bias" in one.weights) == has_bias
    assert all(mx.array_equal(one.weights[name], array) for name, array in other.weights.items())


def test_mxfp4_inside_an_afq_record() -> None:
    sample = FORMATS["mxfp4"](np.random.default_rng(0), (4, 64))
    weight, scales = sample.tensors["weight"], sample.tensors["weight.scales"]
    words = ("U32", (4, 8), weight[2])
    data = HEAD + b"\4\0" + tensor(words) + tensor(scales) + tensor(scales) + bytes([40, 32])
    conversion = Conversion()
    add(conversion, "a", parts_of(np.frombuffer(data, np.uint8)))
    full = mx.dequantize(conversion.weights["a.weight"], conversion.weights["a.scales"], mode="mxfp4", dtype=mx.float32)
    assert np.array_equal(np.array(full), sample.values)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
MLP = tuple(f"mlp.{leaf}" for leaf in GATED)
VISION = (*ATTENTION, "mlp.fc1", "mlp.fc2")


def layers_of(prefix: str, numbers: range | list[int], leaves: tuple[str, ...]) -> list[str]:
    return [f"{prefix}.{layer}.{leaf}" for layer in numbers for leaf in leaves]


def llama4(experts: list[str]) -> list[str]:
    """Layer 0 is dense, layer 1 a mixture."""
    text = "language_model.model.layers"
    block = f"{text}.1.feed_forward"
    dense = layers_of(text, [0], (*ATTENTION, *(f"feed_forward.{leaf}" for leaf in GATED)))
    mixture = [*layers_of(text, [1], ATTENTION), f"{block}.router", *(f"{block}.experts.{leaf}" for leaf in experts)]
    shared = [f"{block}.shared_expert.{leaf}" for leaf in GATED]
    vision = [*layers_of("vision_model.model.layers", range(2), VISION)]
    adapter = [f"vision_model.vision_adapter.mlp.{leaf}" for leaf in ("fc1", "fc2")]
    return ["language_model.lm_head", *dense, *mixture, *shared, *vision, *adapter]


MLLAMA_TEXT = layers_of("language_model.model.layers", [0, 2], (*ATTENTION, *MLP))
ORDERS: dict[str, tuple[str, list[str]]] = {
    "qwen2_vl": ("qwen2_vl", ["lm_head", *layers_of("model.layers", range(2), (*ATTENTION, *MLP))]),
    "idefics3": ("idefics3", ["lm_head", *layers_of("model.text_model.layers", range(2), (*ATTENTION, *MLP))]),
    "llava": (
        "llava",
        ["language_model.lm_head", *layers_of("language_model.model.layers", range(2), (*ATTENTION, *MLP))],
    ),
    "mllama": (
        "mllama",
        MLLAMA_TEXT
        + layers_of("vision_model.global_transformer.layers", range(1), VISION)
        + layers_of("vision_model.transformer.layers", range(2), VISION),
    ),
    "mllama-2024-10": ("mllama", MLLAMA_TEXT),
    "llama4-stacked": ("llama4", llama4(list(GATED))),
    "llama4-projections": ("llama4", llama4([f"{leaf}#{expert}" for leaf in GATED for expert in range(3)])),
    "llama4-experts": ("llama4", llama4([f"{leaf}#{expert}" for expert in range(3) for leaf in GATED])),
    "llama4-none": ("llama4", llama4([])),
}


def write_legacy(
    folder: Path, config: dict[str, Any], order: list[str], left_out: tuple[str, ...] = (), kind: str = "q4_0"
) -> tuple[list[Path], dict[str, Sample]]:
    """The file of an order, in two shards, and a residual of everything that the file and `left_out` do not name."""
    rng, shapes, samples, blobs = np.random.default_rng(2), linear_paths(config), {}, {}
    tied = next(shape for path, shape in shapes.items() if path.endswith("embed_tokens"))
    for index, path in enumerate(order):
        shape = shapes.get(path.partition("#")[0], tied)
        shape = shape[1:] if "#" in path else shape
        samples[path] = FORMATS[kind if len(shape) == 2 else "q4_0"](rng, shape)
        data = record(samples[path])
        blobs[str(index)] = u8(*data)
    residual = {
        name: array
        for name, array in tensors_of(config).items()
        if name.removesuffix(".weight") not in {path.partition("#")[0] for path in order}
        and not name.startswith(left_out or "-")
    }
    write_folder(folder, config, residual, "residual.safetensors")
    shards = [dict(list(blobs.items())[::2]), dict(list(blobs.items())[1::2])]
    return [write_container(folder / f"old-{n}.uqff", shard) for n, shard in enumerate(shards)], samples


def stacked(samples: dict[str, Sample]) -> dict[str, Sample]:
    """Single experts as one stack."""
    whole = {path: sample for path, sample in samples.items() if "#" not in path}
    for path in {path.partition("#")[0] for path in samples if "#" in path}:
        parts = [samples[f"{path}#{expert}"].values for expert in range(3)]
        whole[path] = Sample({}, np.stack(parts))
    return whole


@pytest.mark.parametrize("name", ORDERS)
def test_every_order(name: str, tmp_path: Path) -> None:
    family, order = ORDERS[name]
    config = config_of(family)
    files, samples = write_legacy(tmp_path, config, order)
    conversion = uqff.read(files, tmp_path)
    model = family_of(config).build_model(config)
    fit(model, model.sanitize(dict(conversion.weights)))
    assert sum(leaf.endswith(".scales") for leaf in conversion.weights) == len(stacked(samples))
    found, expected = logits(config, conversion.weights), logits(config, twin(config, stacked(samples)))
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def test_a_tied_models_head_is_passed_over(tmp_path: Path) -> None:
    config = config_of("qwen2_vl", tie_word_embeddings=True)
    files, samples = write_legacy(tmp_path, config, ORDERS["qwen2_vl"][1])
    del samples["lm_head"]
    weights = uqff.read(files, tmp_path).weights
    assert not any(name.startswith("lm_head") for name in weights)
    found, expected = logits(config, weights), logits(config, twin(config, samples))
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def test_numbers_may_have_gaps(tmp_path: Path) -> None:
    config = config_of("qwen2_vl")
    files, _ = write_legacy(tmp_path, config, ORDERS["qwen2_vl"][1])
    write_container(files[0], {"0": u8(*record(FORMATS["q4_0"](np.random.default_rng(0), (160, 64))))})
    base = write_folder(tmp_path / "base", config, tensors_of(config))
    weights = uqff.read(files, tmp_path, base).weights
    assert "model.layers.0.self_attn.q_proj.scales" in weights  # number 1, in the other file
    assert "model.layers.0.self_attn.k_proj.scales" not in weights
    assert np.isfinite(logits(config, weights)).all()


class TestGaps:
    """Qwen2-VL's residual has no vision tower, LLaVA's no embedding and no norms."""

    @pytest.mark.parametrize(
        ("family", "left_out"),
        [("qwen2_vl", ("visual.",)), ("llava", ("language_model.model.embed_tokens", "language_model.model.norm"))],
    )
    def test_the_base_model_fills_them(self, family: str, left_out: tuple[str, ...], tmp_path: Path) -> None:
        config = config_of(family)
        files, samples = write_legacy(tmp_path / "old", config, ORDERS[family][1], left_out)
        with pytest.raises(WeightsError) as caught:
            uqff.read(files, tmp_path / "old")
        missing = [name for name in tensors_of(config) if name.startswith(left_out)]
        assert all(name in str(caught.value) for name in missing)
        assert f"lack {len(missing)} tensors" in str(caught.value)
        assert str(caught.value).endswith("give the base model's folder, too")
        base = write_folder(tmp_path / "base", config, tensors_of(config))
        weights = uqff.read(files, tmp_path / "old", base).weights
        found, expected = logits(config, weights), logits(config, twin(config, samples))
        assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()

    def test_no_residual_at_all(self, tmp_path: Path) -> None:
        config = config_of("qwen2_vl")
        files, _ = write_legacy(tmp_path / "old", config, ORDERS["qwen2_vl"][1])
        (tmp_path / "old" / "residual.safetensors").unlink()
        base = write_folder(tmp_path / "base", config, tensors_of(config))
        assert np.isfinite(logits(config, uqff.read(files, base).weights)).all()


class TestOrdersThatDoNotFit:
    def test_another_models_layers(self, tmp_path: Path) -> None:
        config = config_of("qwen2_vl")
        files, _ = write_legacy(tmp_path, config, ORDERS["qwen2_vl"][1][:-1])
        blob = u8(*record(FORMATS["q4_0"](np.random.default_rng(0), (96, 32))))
        write_container(tmp_path / "old-2.uqff", {"14": blob})
        with pytest.raises(WeightsError, match=r"the shapes of its 15 layers fit no known order"):
            uqff.read([*files, tmp_path / "old-2.uqff"], tmp_path)

    def test_more_layers_than_modules(self, tmp_path: Path) -> None:
        config = config_of("qwen2_vl")
        files, _ = write_legacy(tmp_path, config, [*ORDERS["qwen2_vl"][1], "model.layers.1.mlp.down_proj"])
        with pytest.raises(WeightsError, match="fit no known order"):
            uqff.read(files, tmp_path)

    def test_several_orders(self, tmp_path: Path) -> None:
        """Square experts look the same by projection and by expert."""
        config = config_of("llama4")
        config["text_config"]["intermediate_size"] = 64
        files, _ = write_legacy(tmp_path, config, ORDERS["llama4-experts"][1])
        with pytest.raises(WeightsError, match="in several ways"):
            uqff.read(files, tmp_path)

    @pytest.mark.parametrize(
        ("kind", "words"), [("fp8", "different scales"), ("unquant", "of different types|not all there")]
    )
    def test_experts_that_make_no_stack(self, kind: str, words: str, tmp_path: Path) -> None:
        config = config_of("llama4")
        order = ORDERS["llama4-projections"][1]
        files, _ = write_legacy(tmp_path, config, order, kind="fp8" if kind == "fp8" else "q4_0")
        if kind == "unquant":
            index = next(index for index, path in enumerate(order) if path.endswith("gate_proj#1"))
            odd = {str(index): u8(*record(FORMATS[kind](np.random.default_rng(0), (32, 64))))}
            shard = {name: raw for name, raw in read_shard(files[index % 2]) if name != str(index)}
            write_container(files[index % 2], shard | odd)
        with pytest.raises(WeightsError, match=words):
            uqff.read(files, tmp_path)

    def test_an_expert_that_is_missing(self, tmp_path: Path) -> None:
        config = config_of("llama4")
        order = ORDERS["llama4-projections"][1]
        files, _ = write_legacy(tmp_path, config, order)
        index = next(index for index, path in enumerate(order) if path.endswith("gate_proj#1"))
        shard = {name: raw for name, raw in read_shard(files[index % 2]) if name != str(index)}
        write_container(files[index % 2], shard)
        with pytest.raises(WeightsError, match="the experts are not all there"):
            uqff.read(files, tmp_path)


def read_shard(path: Path) -> Iterator[tuple[str, Stored]]:
    from mlxvlm.checkpoint.container import TensorFile

    file = TensorFile(path)
    for name in file.names:
        tensor = file.read(name)
        yield name, (tensor.dtype, tensor.shape, tensor.data.tobytes())


class TestRecords:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "ends too early"),
            (bytes.fromhex("00030000") + b"\0", r"is of UQFF 0\.3"),
            (bytes.fromhex("00000100") + b"\0", r"is of UQFF 1\.0"),
            (HEAD + b"\7", "is of type 7"),
            (HEAD + b"\0" + number(2**32 - 1) + b"\0" + number(2) + number(1) + number(32), "ends too early"),
            (HEAD + b"\0" + number(0) + b"\0" + number(2) + number(2**31), "has 2147483648 dimensions"),
            (HEAD + b"\1\0" + number(4) + number(11) + number(0), "a tensor of type 11"),
            (HEAD + b"\1\0" + number(4) + number(6) + number(1) + number(3) + bytes(4), "has 4 bytes for F32"),
            (HEAD + b"\1\0" + number(4) + number(6) + number(0) + bytes(5), "has 1 bytes too many"),
        ],
    )
    def test_damaged(self, data: bytes, words: str) -> None:
        with pytest.raises((WeightsError, UnsupportedModelError), match=words):
            parts_of(np.frombuffer(data, np.uint8))

    def test_errors_name_file_and_layer(self, tmp_path: Path) -> None:
        write_folder(tmp_path, config_of("qwen2_vl"), {})
        file = write_container(tmp_path / "old.uqff", {"3": u8(1, 2)})
        with pytest.raises(WeightsError, match=r"old\.uqff: layer 3 ends too early"):
            uqff.read([file], tmp_path)
        write_container(file, {"3": u32(1)})
        with pytest.raises(WeightsError, match=r"old\.uqff: layer 3 is U32 \[\], no record"):
            uqff.read([file], tmp_path)
        write_container(file, {"3": u8(1, 2), "03": u8(1, 2)})
        with pytest.raises(WeightsError, match=r"old\.uqff has a layer's number twice"):
            uqff.read([file], tmp_path)


RECORDS = [
    record(FORMATS[kind](np.random.default_rng(0), (2, 64)).with_bias(np.ones(2, np.float32)))
    for kind in ("q4_0", "unquant", "hqq4", "fp8", "afq4", "f8q8", "mxfp4")
]


@settings(max_examples=700, deadline=None)
@given(data=st.data())
def test_damaged_records_are_refused_or_read(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(RECORDS)))
    for _ in range(data.draw(st.integers(0, 4))):
        # Fields lie at the front.
        place = data.draw(st.integers(0, min(60, len(raw) - 1)) | st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    try:
        add(Conversion(), "a", parts_of(np.frombuffer(bytes(raw[:cut]), np.uint8)))
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
