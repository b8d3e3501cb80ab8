"""Binding is strict about names, shapes and types, exact about dtypes, and frugal with memory."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.bind import DTYPES, bind, choose_dtype, quant_spec
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.errors import UsageError, WeightsError
from mlxvlm.models.base import QuantPaths
from mlxvlm.models.idefics3 import Model, build
from tests.checkpoint.layouts import SPLIT, Tensors, config_of, mlx_names, quantised, tensors_of

NORM = "model.text_model.norm.weight"
QUERY = "model.text_model.layers.0.self_attn.q_proj"


def model() -> Model:
    return build(config_of(SPLIT))


def silent(done: int, total: int) -> None:
    pass


def refusal(tensors: Tensors, target: Any = None) -> str:
    with pytest.raises(WeightsError) as caught:
        bind(target or model(), tensors, "float32", silent)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 4
    return text


def packed4() -> Tensors:
    return quantised(tensors_of(SPLIT), lambda path, weight: QuantSpec(4, 32))[0]


class TestStrictness:
    def test_every_problem_is_named_at_once(self) -> None:
        tensors = tensors_of(SPLIT)
        missing = [NORM, "lm_head.weight", "model.vision_model.post_layernorm.bias"]
        for name in missing:
            del tensors[name]
        extra = ["adapter.weight", "model.text_model.layers.2.input_layernorm.weight", "vision_model.head.bias"]
        for name in extra:
            tensors[name] = mx.zeros((2,))
        tensors[f"{QUERY}.weight"] = mx.zeros((32, 31))
        tensors["model.text_model.embed_tokens.weight"] = mx.zeros((165, 32))
        text = refusal(tensors)
        for name in (*missing, *extra[:2], "model.vision_model.head.bias"):
            assert name in text
        assert "3 missing" in text
        assert "3 unknown" in text
        assert "2 wrongly shaped" in text
        assert f"{QUERY}.weight (32, 31) instead of (32, 32)" in text
        assert "embed_tokens.weight (165, 32) instead of (164, 32)" in text

    @pytest.mark.parametrize(
        ("dtype", "word"), [(mx.uint8, "uint8"), (mx.int32, "int32"), (mx.bool_, "bool"), (mx.complex64, "complex64")]
    )
    def test_numbers_that_are_no_floats(self, dtype: mx.Dtype, word: str) -> None:
        """FP8 files arrive as uint8 of the right shape."""
        tensors = tensors_of(SPLIT)
        for name in (NORM, f"{QUERY}.weight"):
            tensors[name] = tensors[name].astype(dtype)
        text = refusal(tensors)
        assert re.search(rf"2 of a type that can't be used: .*{re.escape(NORM)} {word}", text)
        assert f"{QUERY}.weight {word}" in text

    def test_channels_first_convolution_of_another_size(self) -> None:
        tensors = tensors_of(SPLIT)
        name = "model.vision_model.embeddings.patch_embedding.weight"
        tensors[name] = mx.zeros((32, 3, 5, 4))
        assert f"{name} (32, 5, 4, 3) instead of (32, 4, 4, 3)" in refusal(tensors)

    def test_empty_checkpoint(self) -> None:
        assert f"{len(tensors_of(SPLIT))} missing" in refusal({})


class TestQuantisedStrictness:
    def test_all_bad_modules_are_named(self) -> None:
        tensors = packed4()
        del tensors[f"{QUERY}.weight"]
        tensors["model.text_model.norm.scales"] = mx.zeros((32, 1))
        tensors["model.text_model.layers.9.mlp.up_proj.scales"] = mx.zeros((32, 1))
        tensors["lm_head.scales"] = mx.zeros((164, 3))
        text = refusal(tensors)
        assert f"{QUERY} has scales, but no packed weight" in text
        assert "model.text_model.norm is quantised in the checkpoint, but is no layer that can be" in text
        assert "model.text_model.layers.9.mlp.up_proj is quantised" in text
        assert "lm_head: weight (164, 4) and scales (164, 3) fit no quantisation of width 32" in text

    @pytest.mark.parametrize("path", ["model.text_model", "model.vision_model.embeddings.patch_embedding", "nowhere"])
    def test_scales_of_what_is_no_such_layer(self, path: str) -> None:
        assert f"{path} is quantised" in refusal({**tensors_of(SPLIT), f"{path}.scales": mx.zeros((32, 1))})

    @pytest.mark.parametrize(
        "changes",
        [
            {"weight": None},
            {"weight": mx.zeros((32, 32))},  # not packed
            {"weight": mx.array(1, mx.uint32)},
            {"scales": mx.array(1.0)},
            {"scales": mx.zeros((32, 0))},
            {"scales": mx.zeros((32,))},
        ],
        ids=["absent", "float", "scalar-weight", "scalar-scales", "empty-scales", "flat-scales"],
    )
    def test_scales_without_a_packed_weight(self, changes: dict[str, mx.array | None]) -> None:
        tensors = packed4()
        for leaf, array in changes.items():
            tensors.pop(f"{QUERY}.{leaf}")
            if array is not None:
                tensors[f"{QUERY}.{leaf}"] = array
        assert f"{QUERY} has scales, but no packed weight beside them" in refusal(tensors)

    @pytest.mark.parametrize(
        ("packed", "groups"), [(7, 1), (1, 1), (4, 3), (4, 8), (9, 1), (32, 1)], ids=lambda number: str(number)
    )
    def test_impossible_bits_or_group(self, packed: int, groups: int) -> None:
        tensors = packed4()
        tensors[f"{QUERY}.weight"] = mx.zeros((32, packed), mx.uint32)
        tensors[f"{QUERY}.scales"] = tensors[f"{QUERY}.biases"] = mx.zeros((32, groups))
        assert "fit no quantisation of width 32" in refusal(tensors)

    def test_affine_without_biases_is_no_float_mode(self) -> None:
        """The shapes are mxfp4's; its scales would be bytes."""
        tensors = packed4()
        del tensors[f"{QUERY}.biases"]
        assert f"{QUERY}: weight (32, 4) and scales (32, 1) fit no quantisation" in refusal(tensors)

    def test_parts_that_do_not_belong_together(self) -> None:
        tensors = packed4()
        del tensors[f"{QUERY}.scales"]
        tensors["lm_head.biases"] = mx.zeros((163, 1))
        tensors["model.connector.modality_projection.proj.scales"] = mx.zeros((31, 4), mx.float16)
        text = refusal(tensors)
        assert f"1 unknown: {QUERY}.biases" in text
        assert f"{QUERY}.weight (32, 4) instead of (32, 32)" in text
        assert "lm_head.biases (163, 1) instead of (164, 1)" in text
        assert "proj.scales (31, 4) instead of (32, 4)" in text

    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    @pytest.mark.parametrize("group_size", [32, 64, 128])
    def test_affine_is_read_off_the_tensors(self, bits: int, group_size: int) -> None:
        parts = mx.quantize(mx.ones((2, 384)), group_size=group_size, bits=bits)
        tensors = dict(zip(("x.weight", "x.scales", "x.biases"), parts, strict=True))
        assert quant_spec("x", 384, tensors) == QuantSpec(bits, group_size)

    @pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
    def test_float_modes_are_read_off_the_tensors(self, mode: str, bits: int, group_size: int) -> None:
        parts = mx.quantize(mx.ones((2, 96)), mode=mode)
        tensors = dict(zip(("x.weight", "x.scales"), parts, strict=True))
        assert quant_spec("x", 96, tensors) == QuantSpec(bits, group_size, mode)


class TestDtypes:
    def test_auto_is_float32_on_the_cpu(self) -> None:
        if mx.default_device().type != mx.DeviceType.cpu:
            pytest.skip("a GPU keeps the checkpoint's own dtype")
        assert choose_dtype("auto", tensors_of(SPLIT)) == mx.float32

    @pytest.mark.parametrize("name", list(DTYPES))
    def test_explicit(self, name: str) -> None:
        assert choose_dtype(name, {}) == DTYPES[name]

    @pytest.mark.parametrize("name", ["float64", "int8", "", "Float32"])
    def test_unknown(self, name: str) -> None:
        with pytest.raises(UsageError, match="choose auto, bfloat16, float16, float32"):
            bind(model(), tensors_of(SPLIT), name, silent)

    @pytest.mark.parametrize("name", ["auto", *DTYPES])
    @pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
    def test_every_parameter_has_the_chosen_dtype(self, name: str, mode: str | None) -> None:
        def recipe(path: str, weight: mx.array) -> QuantSpec | None:
            return QuantSpec(4, 32, mode) if mode else None

        tensors = quantised(mlx_names(tensors_of(SPLIT)), recipe)[0]
        bound, target = model(), choose_dtype(name, tensors)
        bind(bound, tensors, name, silent)
        kinds: dict[str, set[mx.Dtype]] = {}
        for path, array in tree_flatten(bound.parameters()):
            is_packed = array.dtype == mx.uint32
            kinds.setdefault("packed" if is_packed else path.rpartition(".")[2], set()).add(array.dtype)
        expected = {"weight": {target}, "bias": {target}}
        if mode:
            expected["packed"] = {mx.uint32}
            expected["scales"] = {mx.uint8 if mode == "mxfp4" else target}
        if mode == "affine":
            expected["biases"] = {target}
        assert kinds == expected
        assert not bound.training
        assert not tree_flatten(bound.trainable_parameters())


class Stack(nn.Module):
    """24 matrices of 1 to 2 MB in float16."""

    quant_paths = QuantPaths(decoder="", head="", tower="")

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(1024, 512 + 21 * number, bias=False) for number in range(24)]

    def sanitize(self, weights: Tensors) -> Tensors:
        return dict(weights)


def stack_file(folder: Path) -> tuple[int, int]:
    """Bytes in all, bytes of the largest."""
    tensors = {f"layers.{n}.weight": mx.full((512 + 21 * n, 1024), n, mx.float16) for n in range(24)}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    sizes = [int(array.nbytes) for array in tensors.values()]
    return sum(sizes), max(sizes)


@pytest.mark.parametrize(("dtype", "growth"), [("float16", 1), ("float32", 2), ("bfloat16", 1)])
def test_peak_memory_is_the_model_and_one_tensor(dtype: str, growth: int, tmp_path: Path) -> None:
    total, largest = stack_file(tmp_path)
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    stack, weights = Stack(), read_weights(tmp_path)
    bind(stack, weights, dtype, silent)  # type: ignore[arg-type]
    assert not weights
    assert mx.get_active_memory() - before <= growth * total + 2**18
    assert mx.get_peak_memory() - before <= growth * total + largest + 2**18
    for number, layer in enumerate(stack.layers):
        assert layer.weight.dtype == DTYPES[dtype]
        assert layer.weight[0, 0].item() == number


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_progress_is_monotone_and_ends_at_the_total(dtype: str) -> None:
    bound, steps = model(), []
    tensors = quantised(tensors_of(SPLIT), lambda path, weight: QuantSpec(4, 32) if "mlp" in path else None)[0]
    bind(bound, tensors, dtype, lambda done, total: steps.append((done, total)))
    done = [step[0] for step in steps]
    assert done == sorted(set(done))
    assert {step[1] for step in steps} == {done[-1]}
    assert done[-1] == sum(array.nbytes for _, array in tree_flatten(bound.parameters()))
    assert not tensors


def test_file_that_shrinks_after_loading(tmp_path: Path) -> None:
    """Lazy tensors are read late: the error is ours all the same."""
    stack_file(tmp_path)
    weights = read_weights(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(8_000_000)
    assert re.search(r"tensor layers\.\d+\.weight can't be read", refusal(weights, Stack()))
