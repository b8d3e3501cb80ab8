import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.checkpoint.packed import Packed, QuantSpec, pack_codes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits):
    weight = mx.random.normal((3, 128), key=mx.random.key(bits))
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    exact = mx.dequantize(packed, scales, biases, group_size=64, bits=bits)
    groups = np.array(exact).reshape(3, 2, 64)
    codes = np.rint((groups - np.array(biases)[..., None]) / np.array(scales)[..., None]).astype(np.uint8)
    assert np.array_equal(pack_codes(codes.reshape(3, 128), bits), np.array(packed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_codes_are_one_little_endian_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 3, 64), np.uint8)
    for strided in (codes, codes[:, ::2], np.asfortranarray(codes)):
        stream = np.unpackbits(strided[..., None], axis=-1, bitorder="little", count=bits)
        slow = np.packbits(stream.reshape(*strided.shape[:-1], 64 * bits), axis=-1, bitorder="little")
        assert np.array_equal(pack_codes(strided, bits), np.ascontiguousarray(slow).view("<u4"))


def test_codes_that_fill_no_whole_word_are_refused():
    for count, bits in ((3, 4), (8, 5), (4, 8)):
        with pytest.raises(ValueError, match="no whole words"):
            pack_codes(np.zeros((1, count), np.uint8), bits)


def test_a_packed_weight_names_its_tensors():
    words = np.zeros((1, 4), np.uint32)
    scales = np.ones((1, 1), np.float16)
    tensors = Packed(words, scales, scales, QuantSpec(4, 32), 0.5).tensors("a.b")
    assert set(tensors) == {"a.b.weight", "a.b.scales", "a.b.biases", "a.b.output_scale"}
    assert tensors["a.b.output_scale"].item() == 0.5
    assert tensors["a.b.scales"].dtype == mx.float16
    floats = Packed(words, np.zeros((1, 1), np.uint8), None, QuantSpec(4, 32, "mxfp4")).tensors("a")
    assert set(floats) == {"a.weight", "a.scales", "a.output_scale"}
