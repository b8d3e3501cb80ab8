import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.packed import QuantSpec

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
