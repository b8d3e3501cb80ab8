"""ggml's blocks against two independent decoders, and MLX's arithmetic on the re-packed ones."""

from __future__ import annotations

import tracemalloc

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.checkpoint import ggml
from mlxvlm.checkpoint.ggml import PLAIN, GGMLType, dequantize, ggml_type, nbytes, plain, repack
from mlxvlm.checkpoint.packed import Packed, QuantSpec
from mlxvlm.errors import UnsupportedModelError, WeightsError
from tests.checkpoint.ggml_twin import SIZES, blocks_of, dequantized

QUANTISED = [GGMLType[name] for name in SIZES]
# type -> MLX's form, and the narrowest type that holds its scales
EXACT = {
    "Q4_0": (QuantSpec(4, 32), np.float16),
    "Q4_1": (QuantSpec(4, 32), np.float16),
    "Q5_0": (QuantSpec(5, 32), np.float16),
    "Q5_1": (QuantSpec(5, 32), np.float16),
    "Q8_0": (QuantSpec(8, 32), np.float16),
    "Q8_1": (QuantSpec(8, 32), np.float16),
    "Q3K": (QuantSpec(8, 128), np.float16),
    "Q4K": (QuantSpec(4, 32), np.float32),
    "Q5K": (QuantSpec(5, 32), np.float32),
    "IQ4_NL": (QuantSpec(8, 32), np.float16),
    "IQ4_XS": (QuantSpec(8, 32), np.float32),
    "MXFP4": (QuantSpec(4, 32, "mxfp4"), np.uint8),
}
THEIR_NAMES = {name: name.replace("K", "_K") for name in SIZES} | {"Q8_1": "", "Q8K": ""}
# Relative root mean square error on normal weights; more means a wrong decoder.
ERRORS = {"Q4_0": 0.09, "Q4_1": 0.082, "Q5_0": 0.045, "Q5_1": 0.04, "Q8_0": 0.006, "MXFP4": 0.21}


def small(kind: GGMLType, count: int) -> np.ndarray:
    """Blocks whose scales and biases fit float16."""
    data = blocks_of(kind, count)
    if "d" in (fields := data.view(ggml._QUANTISED[kind].struct)).dtype.names:
        fields["d"] = np.random.default_rng(1).normal(size=count)
    return data


def mlx_values(packed: Packed) -> np.ndarray:
    """What MLX makes of it in float32."""
    spec = packed.spec
    parts = [mx.array(part) for part in (packed.weight, packed.scales, packed.biases) if part is not None]
    if spec.mode == "affine":
        parts[1:] = [part.astype(mx.float32) for part in parts[1:]]
    values = mx.dequantize(*parts, group_size=spec.group_size, bits=spec.bits, mode=spec.mode, dtype=mx.float32)
    return np.array(values)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(QUANTISED), seed=st.integers(0, 2**32))
def test_every_element_is_as_the_layout_says(kind, seed):
    data = blocks_of(kind, 2, seed)
    assert np.array_equal(dequantize(data, kind, (2 * SIZES[kind.name][1],)), dequantized(kind, data))


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_type_has_been_compared_with_its_twin(kind):
    data = blocks_of(kind, 3)
    assert nbytes(kind, (3, SIZES[kind.name][1])) == data.size
    assert np.array_equal(
        dequantize(data, kind, (data.size // SIZES[kind.name][0] * SIZES[kind.name][1],)), dequantized(kind, data)
    )


@pytest.mark.parametrize("name", [name for name, theirs in THEIR_NAMES.items() if theirs])
def test_values_are_those_of_the_gguf_package(name):
    data = blocks_of(GGMLType[name], 64)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[THEIR_NAMES[name]])
    assert np.array_equal(dequantize(data, GGMLType[name], (64 * SIZES[name][1],)), expected.reshape(-1))


@pytest.mark.parametrize("name", ERRORS)
def test_what_the_gguf_package_quantises_is_read_back(name):
    weight = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    data = gguf.quantize(weight, gguf.GGMLQuantizationType[name]).reshape(-1)
    values = dequantize(data, GGMLType[name], weight.shape)
    error = np.sqrt(np.mean((values - weight) ** 2))
    assert ERRORS[name] / 2 < error < ERRORS[name]


@pytest.mark.parametrize("shape", [(4, 512), (2, 3, 256)])
@pytest.mark.parametrize("name", EXACT)
def test_repacked_weights_are_equal_in_float32(name, shape):
    kind = GGMLType[name]
    data = small(kind, nbytes(kind, shape) // SIZES[name][0])
    packed = repack(data, kind, shape)
    assert packed is not None
    assert (packed.spec, packed.scales.dtype) == EXACT[name]
    assert packed.weight.shape[:-1] == packed.scales.shape[:-1] == shape[:-1]
    assert np.array_equal(mlx_values(packed), dequantize(data, kind, shape))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(EXACT)), seed=st.integers(0, 2**32))
def test_scales_of_any_size_stay_exact(name, seed):
    kind = GGMLType[name]
    shape = (2, 256)
    data = blocks_of(kind, 512 // SIZES[name][1], seed)
    packed = repack(data, kind, shape)
    assert packed is not None
    assert np.array_equal(mlx_values(packed), dequantize(data, kind, shape))


@pytest.mark.parametrize("name", EXACT)
def test_a_matrix_product_reads_the_same_values(name):
    kind = GGMLType[name]
    data = small(kind, 3 * 256 // SIZES[name][1])
    packed = repack(data, kind, (3, 256))
    assert packed is not None
    parts = [mx.array(part) for part in (packed.weight, packed.scales, packed.biases) if part is not None]
    spec = packed.spec
    product = mx.quantized_matmul(mx.eye(256), *parts, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    values = dequantize(data, kind, (3, 256))
    assert product.dtype == mx.float32
    np.testing.assert_allclose(np.array(product).T, values, rtol=0, atol=1e-6 * np.abs(values).max())


def test_q8k_keeps_codes_and_scale_but_needs_a_fused_multiply_add_to_be_equal():
    data = blocks_of(GGMLType.Q8K, 8)
    packed = repack(data, GGMLType.Q8K, (8, 256))
    assert packed is not None
    assert packed.spec == QuantSpec(8, 128)
    assert packed.scales.dtype == packed.biases.dtype == np.float32
    fields = data.view(ggml._QUANTISED[GGMLType.Q8K].struct)
    assert np.array_equal(packed.scales, np.repeat(fields["d"][:, None], 2, axis=1))
    assert np.array_equal(packed.weight.view(np.uint8), fields["qs"].view(np.int8).astype(np.int16) + 128)
    error = np.abs(mlx_values(packed) - dequantize(data, GGMLType.Q8K, (8, 256)))
    assert np.all(error <= 2.0**-15 * np.abs(fields["d"])[:, None])


def test_a_bias_beyond_float16_widens_scales_and_biases():
    data = np.zeros(34, np.uint8)
    data[:2] = np.array([-1000], "<f2").view(np.uint8)
    packed = repack(data, GGMLType.Q8_0, (1, 32))
    assert packed is not None
    assert packed.scales.dtype == packed.biases.dtype == np.float32
    assert packed.biases.item() == 128_000


@pytest.mark.parametrize(
    ("kind", "shape"), [(GGMLType.Q2K, (2, 256)), (GGMLType.Q6K, (2, 256)), (GGMLType.Q4_0, (64,))]
)
def test_the_rest_has_no_exact_form(kind, shape):
    assert repack(blocks_of(kind, nbytes(kind, shape) // SIZES[kind.name][0]), kind, shape) is None
    assert repack(np.zeros(8, np.uint8), GGMLType.F32, (1, 2)) is None


@pytest.mark.parametrize("kind", QUANTISED)
def test_slabs_do_not_show(kind, monkeypatch):
    count = 2048 // SIZES[kind.name][1]
    data, shape = blocks_of(kind, count), (4, 512)
    whole, packed = dequantize(data, kind, shape), repack(data, kind, shape)
    monkeypatch.setattr(ggml, "SLAB_ELEMENTS", 768)
    assert np.array_equal(dequantize(data, kind, shape), whole)
    again = repack(data, kind, shape)
    if packed is not None and again is not None:
        assert np.array_equal(again.weight, packed.weight)
        assert np.array_equal(again.scales, packed.scales)
        assert packed.biases is None or np.array_equal(again.biases, packed.biases)


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q5K, GGMLType.Q3K])
def test_memory_is_the_result_and_a_little(kind):
    shape = (1 << 13, 1 << 10)
    data = np.tile(small(kind, 1024 // SIZES[kind.name][1]), 1 << 13)
    tracemalloc.start()
    packed = repack(data, kind, shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed is not None
    scales = packed.scales.nbytes + packed.biases.nbytes
    assert peak < packed.weight.nbytes + scales + (6 << 20)


def test_plain_types():
    values = np.array([[1.5, -2], [3, 0]])
    for kind in set(PLAIN) - {GGMLType.BF16}:
        stored = values.astype(PLAIN[kind])
        data = stored.reshape(-1).view(np.uint8)
        assert np.array_equal(plain(data, kind, (2, 2)), stored)
        assert np.array_equal(dequantize(data, kind, (2, 2)), stored.astype(np.float32))
    bfloat = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    assert np.array_equal(dequantize(bfloat.reshape(-1).view(np.uint8), GGMLType.BF16, (2, 2)), values)
    assert dequantize(np.zeros(4, np.uint8), GGMLType.F32, ()).shape == ()


def test_sizes_are_checked_before_anything_is_made():
    assert nbytes(GGMLType.Q4K, (3, 512)) == 3 * 2 * 144
    for kind, shape in [(GGMLType.Q4K, (4, 128)), (GGMLType.Q8_0, (32, 1)), (GGMLType.Q8_0, ())]:
        with pytest.raises(WeightsError, match=f"does not fit {kind.name}: its blocks have"):
            nbytes(kind, shape)
    for shape in [(0, 32), (-1, 32), (-1, -32)]:
        with pytest.raises(WeightsError, match="holds nothing"):
            nbytes(GGMLType.Q8_0, shape)
    for read in (dequantize, repack):
        with pytest.raises(WeightsError, match=r"has 35 bytes where Q8_0 of shape \[1, 32\] needs 34"):
            read(np.zeros(35, np.uint8), GGMLType.Q8_0, (1, 32))
        with pytest.raises(WeightsError, match=r"has 33 bytes where Q8_0 of shape \[1152921504606846976, 32\] needs"):
            read(np.zeros(33, np.uint8), GGMLType.Q8_0, (1 << 60, 32))
    with pytest.raises(WeightsError, match="has 3 bytes where F32"):
        plain(np.zeros(3, np.uint8), GGMLType.F32, (1,))


def test_types_that_can_not_be_read_are_refused_by_name():
    assert ggml_type(12) is GGMLType.Q4K
    with pytest.raises(UnsupportedModelError, match="IQ2_XXS can't be read; use a file of another quantisation"):
        ggml_type(16)
    with pytest.raises(UnsupportedModelError, match="77 is unknown; use a file"):
        ggml_type(77)
    with pytest.raises(UnsupportedModelError, match="TQ1_0"):
        nbytes(GGMLType.TQ1_0, (256,))


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind is not GGMLType.MXFP4])
def test_scales_that_are_not_numbers_are_refused(kind, number):
    data = blocks_of(kind, 2)
    data.view(ggml._QUANTISED[kind].struct)["d"][1] = number
    for read in (dequantize, repack) if kind.name in EXACT else (dequantize,):
        with pytest.raises(WeightsError, match="scales that are not numbers"):
            read(data, kind, (2, SIZES[kind.name][1]))


def test_so_are_exponents_of_mxfp4_beyond_float32():
    data = blocks_of(GGMLType.MXFP4, 2)
    data[17] = 255
    with pytest.raises(WeightsError, match="scales that are not numbers"):
        repack(data, GGMLType.MXFP4, (2, 32))
