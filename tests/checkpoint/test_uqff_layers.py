"""Every format of a layer against an independent decoder, bit for bit, and layers that are not what they say."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.bind import quant_spec
from mlxvlm.checkpoint.container import Tensor
from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.uqff_layers import Parts, add
from mlxvlm.errors import UnsupportedModelError, WeightsError
from tests.checkpoint.uqff_samples import FORMATS, STACKED, Sample, Stored, fp8, mxfp4, stored, u8, u32

WIDTH = 256


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def parts_of(tensors: dict[str, Stored]) -> Parts:
    names = {name: name.removeprefix("weight").removeprefix(".") for name in tensors}
    return {
        names[name]: Tensor(kind, shape, np.frombuffer(raw, np.uint8)) for name, (kind, shape, raw) in tensors.items()
    }


def converted(sample: Sample) -> Conversion:
    conversion = Conversion()
    add(conversion, "a.b", parts_of(sample.tensors))
    return conversion


def dequantised(weights: dict[str, mx.array], width: int) -> np.ndarray:
    """What MLX makes of the tensors, in float32."""
    if "a.b.scales" not in weights:
        return np.array(weights["a.b.weight"].astype(mx.float32))
    spec = quant_spec("a.b", width, weights)
    scales, biases = weights["a.b.scales"], weights.get("a.b.biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    full = mx.dequantize(weights["a.b.weight"], scales, biases, spec.group_size, spec.bits, spec.mode, dtype=mx.float32)
    return np.array(full * weights.get("a.b.output_scale", mx.array(1.0)))


@pytest.mark.parametrize("kind", FORMATS)
def test_exact_types_are_exact(kind: str) -> None:
    sample = FORMATS[kind](rng(), (6, WIDTH))
    conversion = converted(sample)
    found = dequantised(conversion.weights, WIDTH)
    assert found.shape == sample.values.shape
    if sample.is_exact:
        assert not conversion.notes()
        assert np.array_equal(found, sample.values)
    else:
        error = np.linalg.norm(found - sample.values) / np.linalg.norm(sample.values)
        assert error < 0.01
        assert conversion.notes() == [f"1 {kind.upper()} layers re-quantised to 8-bit groups of 32: not bit-exact"]


@pytest.mark.parametrize("kind", STACKED)
def test_stacks_of_experts(kind: str) -> None:
    sample = FORMATS[kind](rng(1), (3, 4, 64))
    assert np.array_equal(dequantised(converted(sample).weights, 64), sample.values)


@pytest.mark.parametrize("kind", ["fp8", "f8q8"])
def test_rows_that_are_no_whole_groups(kind: str) -> None:
    sample = FORMATS[kind](rng(2), (4, 40))
    conversion = converted(sample)
    assert conversion.weights.keys() == {"a.b.weight"}
    assert np.allclose(dequantised(conversion.weights, 40), sample.values, rtol=1e-3)
    assert "dequantised to 16 bits" in conversion.notes()[0]


@pytest.mark.parametrize("kind", ["hqq4", "fp8", "f8q8"])
def test_stacks_that_no_writer_makes(kind: str) -> None:
    tensors = dict(FORMATS[kind](rng(), (2, 64)).tensors)
    if kind == "fp8":
        tensors["weight"] = (tensors["weight"][0], (1, 2, 64), tensors["weight"][2])
    else:
        tensors["weight.shape"] = u32(1, 2, 64)
    with pytest.raises(
        WeightsError, match=f"3 dimensions, which {kind[:3].upper() if kind == 'hqq4' else kind.upper()}"
    ):
        add(Conversion(), "a", parts_of(tensors))


BIAS = np.array([0.5, -1.25, 3.0, 448.0], np.float32)
FP8_BIAS = np.array([0x30, 0xBA, 0x44, 0x7E], np.uint8)


@pytest.mark.parametrize(
    ("bias", "dtype"),
    [
        (BIAS, "F32"),
        (BIAS.astype(np.float16), "F16"),
        (np.array((BIAS.view(np.uint32) >> 16).astype(np.uint16)), "BF16"),
        (FP8_BIAS, "F8_E4M3"),
    ],
)
def test_biases_of_every_type(bias: np.ndarray, dtype: str) -> None:
    weights = converted(FORMATS["q4_0"](rng(), (4, 32)).with_bias(bias, dtype)).weights
    assert weights["a.b.bias"].tolist() == BIAS.tolist()


CORRUPT = [
    ("q4_0", {"weight.dtype": u32(8)}, "weight of U8"),
    ("q4_0", {"weight.dtype": u32(999)}, "ggml type 999 is unknown"),
    ("q4_0", {"weight.shape": u32(4, 33)}, "does not fit Q4_0"),
    ("q4_0", {"weight.shape": u32(2**31, 2**31)}, "weight of U8"),
    ("q4_0", {"weight.shape": u32(0, 32)}, "has the shape"),
    ("q4_0", {"weight.shape": stored(np.zeros(2, np.float32))}, "is F32 instead of U32"),
    ("q4_0", {"weight.zeros": u8(1)}, "unknown parts zeros"),
    ("q4_0", {"weight.dtype": None}, "lacks dtype"),
    ("q4_0", {"weight": None}, "lacks weight"),
    ("q4_0", {"weight.format": u8(7)}, "is of format 7, which is unknown"),
    ("q4_0", {"weight.format": u8(0, 0)}, "2 numbers for format"),
    ("q4_0", {"bias": u8(1, 2)}, "a bias of U8"),
    ("unquant", {"weight": u8(1, 2, 3)}, "1 dimensions"),
    ("unquant", {"weight": ("U32", (1, 1), bytes(4))}, "unquantised weight of U32"),
    ("hqq4", {"weight.bits": u8(3)}, "is HQQ of 3 bits"),
    ("hqq4", {"weight.axis": u8(1)}, "is HQQ of 4 bits, axis 1"),
    ("hqq4", {"weight.group_size": u32(0)}, "has groups of 0"),
    ("hqq4", {"weight.shape": u32(8, 64)}, "weight of U8"),
    ("hqq4", {"weight.scales": stored(np.zeros((1, 3), np.float32))}, "scales of F32"),
    ("fp8", {"weight.dtype": u32(5)}, "another kind than E4M3"),
    ("fp8", {"weight.dequant_w_scale": stored(np.array(np.inf, np.float32))}, "no scale that is a number"),
    ("fp8", {"weight": ("F8_E4M3", (4, 64), b"\xff" * 256)}, "weights that are no numbers"),
    ("afq4", {"weight.bits": u8(5)}, "AFQ of 5 bits in groups of 32"),
    ("afq4", {"weight.group_size": u8(16)}, "AFQ of 4 bits in groups of 16"),
    ("afq4", {"weight.bits": u8(8)}, "weight of U32"),
    ("afq4", {"weight.biases": stored(np.zeros((4, 2), np.float16))}, "scales of F32 and biases of F16"),
    ("afq4", {"weight.biases": stored(np.zeros((4, 3), np.float32))}, "biases of F32"),
    ("afq4", {"weight.scales": u8(1)}, "0 dimensions|1 dimensions"),
    ("f8q8", {"weight.num_blocks": u32(7)}, "has 7 blocks"),
    ("f8q8", {"weight": u8(*bytes([0x7F, *range(32)] * 8))}, "scales that are no numbers"),
    ("f8q8", {"weight": u8(*bytes(33))}, "weight of U8"),
    ("mxfp4", {"weight.scales": ("U8", (4, 2), bytes([1, 2, 3, 4, 5, 6, 7, 255]))}, "scales that are no numbers"),
    ("mxfp4", {"weight.scales": ("U8", (4, 1), bytes(4))}, "weight of U8"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), CORRUPT)
def test_what_does_not_fit_is_refused(kind: str, changes: dict[str, Stored | None], words: str) -> None:
    tensors = {**FORMATS[kind](rng(), (4, 64)).tensors, **changes}
    with pytest.raises((WeightsError, UnsupportedModelError), match=words) as caught:
        add(Conversion(), "a", parts_of({name: tensor for name, tensor in tensors.items() if tensor is not None}))
    assert "\n" not in str(caught.value)


def test_mxfp4_of_every_exponent() -> None:
    sample = mxfp4(1, 252)(rng(), (64, WIDTH))
    assert np.array_equal(dequantised(converted(sample).weights, WIDTH), sample.values)


def test_fp8_keeps_its_scale_outside() -> None:
    """Folding it into the groups' scales would round: those are powers of two."""
    weights = converted(fp8(rng(), (4, 64))).weights
    assert set(weights["a.b.scales"].reshape(-1).tolist()) == {127}
    assert weights["a.b.output_scale"].item() != 1
