import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.conversion import Conversion, to_mlx
from mlxvlm.checkpoint.ggml import GGMLType, dequantize, repack
from mlxvlm.checkpoint.packed import QuantSpec
from tests.checkpoint.ggml_twin import blocks_of

WEIGHT = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)


@pytest.mark.parametrize("spec", [QuantSpec(8, 32), QuantSpec(4, 64), QuantSpec(4, 32, "mxfp4")])
def test_what_has_no_exact_form_is_quantised_again_and_counted(spec):
    conversion = Conversion(spec)
    conversion.inexact("a", WEIGHT, "Q6K")
    conversion.inexact("b", WEIGHT, "Q6K")
    parts = mx.quantize(mx.array(WEIGHT), spec.group_size, spec.bits, mode=spec.mode)
    for leaf, part in zip(("weight", "scales", "biases"), parts, strict=False):
        assert mx.array_equal(conversion.weights[f"a.{leaf}"], part)
    assert ("a.biases" in conversion.weights) == (len(parts) == 3)
    assert conversion.notes() == [
        f"2 Q6K layers re-quantised to {spec.bits}-bit groups of {spec.group_size}: not bit-exact"
    ]


@pytest.mark.parametrize(("requantize", "width"), [(None, 64), (QuantSpec(8, 32), 40)])
def test_or_it_is_kept_in_16_bits(requantize, width):
    conversion = Conversion(requantize)
    conversion.inexact("a", WEIGHT[:, :width], "HQQ4")
    assert conversion.weights.keys() == {"a.weight"}
    assert conversion.weights["a.weight"].dtype == mx.float16
    assert conversion.notes() == ["1 HQQ4 layers dequantised to 16 bits: not bit-exact"]


def test_blocks_of_ggml_take_the_best_way():
    conversion = Conversion()
    exact, inexact = blocks_of(GGMLType.Q4_1, 4), blocks_of(GGMLType.Q6K, 2)
    conversion.ggml("exact", exact, GGMLType.Q4_1, (2, 64))
    conversion.ggml("inexact", inexact, GGMLType.Q6K, (2, 256))
    conversion.ggml("plain", WEIGHT.reshape(-1).view(np.uint8), GGMLType.F32, (4, 64))
    packed = repack(exact, GGMLType.Q4_1, (2, 64))
    assert packed is not None
    assert np.array_equal(conversion.weights["exact.weight"], packed.weight)
    values = mx.array(dequantize(inexact, GGMLType.Q6K, (2, 256)))
    assert mx.array_equal(conversion.weights["inexact.weight"], mx.quantize(values, 32, 8)[0])
    assert np.array_equal(conversion.weights["plain.weight"], WEIGHT)
    assert "plain.scales" not in conversion.weights
    assert conversion.notes() == ["1 Q6K layers re-quantised to 8-bit groups of 32: not bit-exact"]


def test_a_vector_of_blocks_is_not_quantised_again():
    conversion = Conversion()
    conversion.ggml("a", np.zeros(34, np.uint8), GGMLType.Q8_0, (32,))
    assert conversion.weights["a.weight"].shape == (32,)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (GGMLType.BF16, mx.bfloat16),
        (GGMLType.F16, mx.float16),
        (GGMLType.F64, mx.float32),
        (GGMLType.I64, mx.int64),
        (GGMLType.I8, mx.int8),
    ],
)
def test_plain_types_keep_their_type(kind, dtype):
    bfloat = np.array([[1.5, -2.0]], "<f4").view("<u2")[:, 1::2]
    numbers = {GGMLType.BF16: bfloat, GGMLType.F16: "<f2", GGMLType.F64: "<f8", GGMLType.I64: "<i8", GGMLType.I8: "i1"}
    stored = numbers[kind] if kind is GGMLType.BF16 else np.array([[1.5, -2.0]]).astype(numbers[kind])
    array = to_mlx(np.ascontiguousarray(stored).reshape(-1).view(np.uint8), kind, (1, 2))
    assert array.dtype == dtype
    assert array.tolist() == [[int(1.5) if dtype in (mx.int8, mx.int64) else 1.5, -2]]


def test_halves_tell_what_a_model_computes_in() -> None:
    conversion = Conversion(shrink=lambda name, array: {"a.scales": mx.ones((1, 1))})
    conversion.plain("norm.weight", mx.ones((4,), mx.float16))
    conversion.plain("odd.weight", mx.ones((4, 4)))
    assert conversion.dtype is None
    conversion.plain("a.weight", mx.ones((4, 4), mx.bfloat16))
    conversion.plain("b.weight", mx.ones((4, 4), mx.float16))
    assert conversion.dtype == mx.bfloat16
    assert conversion.num_shrunk == 4
