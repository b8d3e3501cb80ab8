"""UQFF layers made of random codes, each with its exact values: an independent writer, the slow twin of the reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

Stored = tuple[str, tuple[int, ...], bytes]  # safetensors' type, shape, data

SIZES = {"U8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "U32": 4, "F32": 4}
VERSION: dict[str, Stored] = {
    f"uqff.version.{part}": ("U32", (), number.to_bytes(4, "little"))
    for part, number in (("major", 1), ("minor", 2), ("patch", 0))
}


def container(tensors: Mapping[str, Stored], header: Mapping[str, object] | None = None) -> bytes:
    """A safetensors file; `header` replaces entries."""
    table: dict[str, object] = {"__metadata__": {"uqff.version": "1.2.0"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps({**table, **(header or {})}).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_container(path: Path, tensors: Mapping[str, Stored]) -> Path:
    path.write_bytes(container(tensors))
    return path


def u8(*numbers: int) -> Stored:
    return "U8", () if len(numbers) == 1 else (len(numbers),), bytes(numbers)


def u32(*numbers: int, scalar: bool = True) -> Stored:
    raw = np.array(numbers, "<u4").tobytes()
    return "U32", () if scalar and len(numbers) == 1 else (len(numbers),), raw


def stored(array: np.ndarray, dtype: str = "") -> Stored:
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "uint32": "U32"}
    return dtype or names[array.dtype.name], array.shape, array.tobytes()


def e4m3(byte: int) -> float:
    """One number, as the standard's text has it."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@dataclass(frozen=True)
class Sample:
    """The tensors of one layer by what follows `<module>.`, and its weight in float32."""

    tensors: dict[str, Stored]
    values: np.ndarray
    is_exact: bool = True

    def named(self, path: str) -> dict[str, Stored]:
        return {f"{path}.{name}": tensor for name, tensor in self.tensors.items()}

    def with_bias(self, bias: np.ndarray, dtype: str = "") -> Sample:
        return Sample({**self.tensors, "bias": stored(bias, dtype)}, self.values, self.is_exact)


def unquant(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
    values = rng.normal(size=shape).astype(np.float32)
    return Sample({"weight": stored(values), "weight.format": u8(1)}, values)


def _gguf(kind: int, raw: bytes, values: np.ndarray, is_exact: bool = True) -> Sample:
    parts = {"weight": u8(*raw), "weight.format": u8(0), "weight.dtype": u32(kind)}
    return Sample(parts | {"weight.shape": u32(*values.shape, scalar=False)}, values, is_exact)


def gguf_f32(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
    values = rng.normal(size=shape).astype(np.float32)
    return _gguf(0, values.tobytes(), values)


def q4_0(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
    raw, values = b"", []
    for _ in range(int(np.prod(shape)) // 32):
        d, codes = np.float16(rng.normal()), rng.integers(0, 16, 32, np.uint8)
        raw += d.tobytes() + bytes(int(codes[j]) | int(codes[j + 16]) << 4 for j in range(16))
        values += [np.float32(d) * (int(code) - 8) for code in codes]
    return _gguf(2, raw, np.array(values, np.float32).reshape(shape))


def q8_1(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
    raw, values = b"", []
    for _ in range(int(np.prod(shape)) // 32):
        d, codes = np.float16(rng.normal()), rng.integers(-128, 128, 32, np.int8)
        raw += d.tobytes() + np.float16(rng.normal()).tobytes() + codes.tobytes()
        values += [np.float32(d) * int(code) for code in codes]
    return _gguf(9, raw, np.array(values, np.float32).reshape(shape))


def q8k(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
    raw, values = b"", []
    for _ in range(int(np.prod(shape)) // 256):
        # Few enough bits that no order of operations rounds.
        d, codes = np.float32(np.float16(rng.normal())), rng.integers(-128, 128, 256, np.int8)
        raw += d.tobytes() + codes.tobytes() + bytes(32)
        values += [d * int(code) for code in codes]
    return _gguf(15, raw, np.array(values, np.float32).reshape(shape))


def hqq(bits: int) -> Callable[[np.random.Generator, tuple[int, ...]], Sample]:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
        columns = int(np.prod(shape)) // 64
        codes = rng.integers(0, 2**bits, (64, columns), np.uint8)
        scales, zeros = (rng.normal(size=(1, columns)).astype(np.float32) for _ in range(2))
        values = np.empty((64, columns), np.float32)
        for row in range(64):
            for column in range(columns):
                values[row, column] = (np.float32(codes[row, column]) - zeros[0, column]) * scales[0, column]
        packed = codes if bits == 8 else codes[:32] << 4 | codes[32:]
        parts = {"weight": stored(packed), "weight.format": u8(2), "weight.scales": stored(scales)}
        parts |= {"weight.zeros": stored(zeros), "weight.shape": u32(*shape), "weight.bits": u8(bits)}
        parts |= {"weight.axis": u8(0), "weight.round_zeros": u8(0), "weight.channel_wise": u8(1)}
        parts |= {"weight.group_size": u32(64), "weight.optimization_steps": u32(10)}
        return Sample(parts, values.reshape(shape), is_exact=False)

    return make


def fp8(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
    codes = rng.integers(0, 127, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    scale = np.float32(abs(rng.normal()) / 7)
    values = np.array([np.float32(e4m3(int(code))) * scale for code in codes.reshape(-1)], np.float32).reshape(shape)
    scales = {f"weight.{name}": stored(scale[None].reshape(())) for name in ("dequant_w_scale", "dequant_x_scale")}
    parts = {"weight": stored(codes, "F8_E4M3"), "weight.format": u8(3), "weight.dtype": u32(9), **scales}
    return Sample(parts | {"weight.quant_scale": stored((1 / scale)[None].reshape(()))}, values, shape[-1] % 32 == 0)


def afq(bits: int, group: int = 32, dtype: mx.Dtype = mx.float32) -> Callable[..., Sample]:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
        full = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
        words, scales, biases = mx.quantize(full, group, bits)
        values = np.array(mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group, bits))
        name = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}[dtype]
        raw = [np.array(part if name == "F32" else part.view(mx.uint16)) for part in (scales, biases)]
        parts = {"weight": stored(np.array(words)), "weight.format": u8(4)}
        parts |= {"weight.scales": stored(raw[0], name), "weight.biases": stored(raw[1], name)}
        return Sample(parts | {"weight.bits": u8(bits), "weight.group_size": u8(group)}, values)

    return make


def f8q8(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
    count = int(np.prod(shape))
    raw, values = b"", []
    for _ in range(-(-count // 32)):
        d, codes = int(rng.integers(0, 127)), rng.integers(-128, 128, 32, np.int8)
        raw += bytes([d]) + codes.tobytes()
        values += [np.float32(e4m3(d)) * int(code) * np.float32(1 / 416) for code in codes]
    parts = {"weight": u8(*raw), "weight.format": u8(5), "weight.num_blocks": u32(len(raw) // 33)}
    full = np.array(values[:count], np.float32).reshape(shape)
    return Sample(parts | {"weight.shape": u32(*shape)}, full, shape[-1] % 32 == 0)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(low: int, high: int) -> Callable[[np.random.Generator, tuple[int, ...]], Sample]:
    """Scale bytes from `low` to `high`."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> Sample:
        *lead, width = shape
        codes = rng.integers(0, 16, shape, np.uint8)
        scales = rng.integers(low, high, (*lead, width // 32), np.uint8, endpoint=True)
        numbers = np.array([(-1 if code & 8 else 1) * E2M1[code & 7] for code in range(16)], np.float64)
        values = numbers[codes] * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=-1)
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        parts = {"weight": stored(packed), "weight.format": u8(6), "weight.scales": stored(scales)}
        return Sample(parts, values.astype(np.float32))

    return make


FORMATS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Sample]] = {
    "unquant": unquant,
    "gguf_f32": gguf_f32,
    "q4_0": q4_0,
    "q8_1": q8_1,
    "q8k": q8k,
    "hqq4": hqq(4),
    "hqq8": hqq(8),
    "fp8": fp8,
    **{f"afq{bits}": afq(bits) for bits in (2, 3, 4, 6, 8)},
    "afq4_bf16": afq(4, 64, mx.bfloat16),
    "afq4_f16": afq(4, 128, mx.float16),
    "f8q8": f8q8,
    "mxfp4": mxfp4(120, 126),
}
STACKED = ("unquant", "gguf_f32", "q4_0", "afq4", "mxfp4")
