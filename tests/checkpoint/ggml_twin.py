"""ggml's block types one element at a time, from the table of their layouts: slow, and unlike the package."""

from __future__ import annotations

import struct

import numpy as np

from mlxvlm.checkpoint.ggml import GGMLType

# type -> bytes of a block, elements of a block
SIZES = {
    "Q4_0": (18, 32),
    "Q4_1": (20, 32),
    "Q5_0": (22, 32),
    "Q5_1": (24, 32),
    "Q8_0": (34, 32),
    "Q8_1": (36, 32),
    "Q2K": (84, 256),
    "Q3K": (110, 256),
    "Q4K": (144, 256),
    "Q5K": (176, 256),
    "Q6K": (210, 256),
    "Q8K": (292, 256),
    "IQ4_NL": (18, 32),
    "IQ4_XS": (136, 256),
    "MXFP4": (17, 32),
}
# Where the float16 numbers of a block lie.
HALVES = {
    **dict.fromkeys(["Q4_0", "Q5_0", "Q8_0", "Q8_1", "IQ4_NL", "IQ4_XS"], (0,)),
    **dict.fromkeys(["Q4_1", "Q5_1", "Q4K", "Q5K"], (0, 2)),
    "Q2K": (80, 82),
    "Q3K": (108,),
    "Q6K": (208,),
    "Q8K": (),
    "MXFP4": (),
}
IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def blocks_of(kind: GGMLType, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes [count * block] whose scales are finite numbers of any size, subnormal ones too."""
    rng = np.random.default_rng(seed)
    size = SIZES[kind.name][0]
    data = rng.integers(0, 256, (count, size), np.uint8)
    for place in HALVES[kind.name]:
        data[:, place + 1] = (
            rng.integers(0, 31, count) << 2 | rng.integers(0, 4, count) | rng.integers(0, 2, count) << 7
        )
    if kind is GGMLType.Q8K:
        data[:, :4] = rng.normal(size=(count, 1)).astype("<f4").view(np.uint8)
    if kind is GGMLType.MXFP4:
        data[:, 0] = rng.integers(0, 253, count)
    return data.reshape(-1)


def dequantized(kind: GGMLType, data: np.ndarray) -> np.ndarray:
    """float32 [elements]."""
    size, elements = SIZES[kind.name]
    raw = data.tobytes()
    blocks = [raw[start : start + size] for start in range(0, len(raw), size)]
    return np.array([element(kind.name, block, i) for block in blocks for i in range(elements)], np.float32)


def element(kind: str, block: bytes, i: int) -> np.float32:
    if kind == "MXFP4":
        code = nibble(block[1:], i)
        return np.float32(E2M1[code & 7] * (-1) ** (code >> 3) * 2.0 ** (block[0] - 127))
    if kind in K_TYPES:
        return K_TYPES[kind](block, i)
    d = half(block, 0)
    if kind == "IQ4_NL":
        return np.float32(d * IQ4[nibble(block[2:], i)])
    if kind in ("Q8_0", "Q8_1"):
        return np.float32(d * signed(block[(2 if kind == "Q8_0" else 4) + i]))
    if kind == "Q4_0":
        return np.float32(d * (nibble(block[2:], i) - 8))
    if kind == "Q4_1":
        return np.float32(d * nibble(block[4:], i)) + np.float32(half(block, 2))
    start = 2 if kind == "Q5_0" else 4
    fifth = (int.from_bytes(block[start : start + 4], "little") >> i) & 1
    code = nibble(block[start + 4 :], i) | (fifth << 4)
    if kind == "Q5_0":
        return np.float32(d * (code - 16))
    return np.float32(d * code) + np.float32(half(block, 2))


def q2k(block: bytes, i: int) -> np.float32:
    h, s, l = i // 128, i % 128 // 32, i % 32  # noqa: E741
    code = (block[16 + 32 * h + l] >> (2 * s)) & 3
    sub = block[i // 16]
    return np.float32(half(block, 80) * (sub & 15) * code) - np.float32(half(block, 82) * (sub >> 4))


def q3k(block: bytes, i: int) -> np.float32:
    h, s, l = i // 128, i % 128 // 32, i % 32  # noqa: E741
    code = ((block[32 + 32 * h + l] >> (2 * s)) & 3) - (0 if block[l] >> (4 * h + s) & 1 else 4)
    scales, j = block[96:108], i // 16
    low = scales[j] & 15 if j < 8 else scales[j - 8] >> 4
    high = (scales[8 + j % 4] >> (2 * (j // 4))) & 3
    return np.float32(half(block, 108) * ((low | high << 4) - 32) * code)


def pair(scales: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4, (scales[j + 4] >> 4) | (scales[j] >> 6) << 4


def q4k(block: bytes, i: int, start: int = 16) -> np.float32:
    byte = block[start + 32 * (i // 64) + i % 32]
    code = byte >> 4 if i % 64 >= 32 else byte & 15
    if start == 48:  # Q5K
        code |= (block[16 + i % 32] >> (i // 32) & 1) << 4
    scale, minimum = pair(block[4:16], i // 32)
    return np.float32(half(block, 0) * scale * code) - np.float32(half(block, 2) * minimum)


def q5k(block: bytes, i: int) -> np.float32:
    return q4k(block, i, 48)


def q6k(block: bytes, i: int) -> np.float32:
    h, s, l = i // 128, i % 128 // 32, i % 32  # noqa: E741
    byte = block[64 * h + 32 * (s % 2) + l]
    code = (byte >> 4 if s >= 2 else byte & 15) | ((block[128 + 32 * h + l] >> (2 * s)) & 3) << 4
    return np.float32(half(block, 208) * signed(block[192 + i // 16]) * (code - 32))


def q8k(block: bytes, i: int) -> np.float32:
    return np.float32(struct.unpack_from("<f", block)[0] * signed(block[4 + i]))


def iq4_xs(block: bytes, i: int) -> np.float32:
    j, l = i // 32, i % 32  # noqa: E741
    low = block[4 + j // 2] >> (4 * (j % 2)) & 15
    high = int.from_bytes(block[2:4], "little") >> (2 * j) & 3
    return np.float32(half(block, 0) * ((low | high << 4) - 32) * IQ4[nibble(block[8 + 16 * j :], l)])


K_TYPES = {"Q2K": q2k, "Q3K": q3k, "Q4K": q4k, "Q5K": q5k, "Q6K": q6k, "Q8K": q8k, "IQ4_XS": iq4_xs}


def nibble(qs: bytes, i: int) -> int:
    return qs[i] & 15 if i < 16 else qs[i - 16] >> 4


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def half(block: bytes, place: int) -> float:
    return float(struct.unpack_from("<e", block, place)[0])
