"""Names of quantisations -> MLX's own. Knows what users call a type, not which layers get it.

The names are those of mistral.rs and ggml; each becomes the MLX type of the same bits and about the same size.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.errors import UsageError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
_MXFP4, _NVFP4, _MXFP8 = QuantSpec(4, 32, "mxfp4"), QuantSpec(4, 16, "nvfp4"), QuantSpec(8, 32, "mxfp8")

# Bits per weight of the name -> of the MLX type, 16-bit scales counted.
TYPES: dict[str, QuantSpec] = {
    **{str(bits): QuantSpec(bits) for bits in AFFINE_BITS},
    **{f"AFQ{bits}": QuantSpec(bits) for bits in AFFINE_BITS},
    # 2.6 -> 3.0: two bits in groups of 64 lose far more than Q2K does.
    "Q2K": QuantSpec(2, 32),
    "Q3K": QuantSpec(3),  # 3.4 -> 3.5
    "Q4K": QuantSpec(4),  # 4.5
    "Q4_0": QuantSpec(4),  # 4.5
    "Q4_1": QuantSpec(4, 32),  # 5
    "Q5K": QuantSpec(5),  # 5.5
    "Q5_0": QuantSpec(5),  # 5.5
    "Q5_1": QuantSpec(5, 32),  # 6
    "Q6K": QuantSpec(6),  # 6.6 -> 6.5
    "Q8K": QuantSpec(8, 32),  # 9.1 -> 9
    "Q8_0": QuantSpec(8),  # 8.5
    "Q8_1": QuantSpec(8, 32),  # 9
    "HQQ4": QuantSpec(4, 32),  # 5
    "HQQ8": QuantSpec(8, 32),  # 9
    "FP8": _MXFP8,  # 8 -> 8.25
    "F8Q8": _MXFP8,  # 8.25
    "MXFP4": _MXFP4,
    "MXFP8": _MXFP8,
    "NVFP4": _NVFP4,
}
_BY_KEY = {name.replace("_", "").lower(): spec for name, spec in TYPES.items()}
_EXPLICIT = re.compile(r"(?:afq)?(\d+)@(\d+)")


def parse_type(name: str | int) -> QuantSpec:
    """What `name` becomes: 4, Q4K, afq4, mxfp4, or 4@32 for bits and group size. Raises UsageError with the list."""
    key = str(name).strip().replace("_", "").lower()
    explicit = _EXPLICIT.fullmatch(key)
    if explicit:
        spec = QuantSpec(int(explicit[1]), int(explicit[2]))
        if spec.bits in AFFINE_BITS and spec.group_size in AFFINE_GROUPS:
            return spec
    elif key in _BY_KEY:
        return _BY_KEY[key]
    groups = ", ".join(map(str, AFFINE_GROUPS))
    raise UsageError(
        f"quantisation {str(name)!r} is unknown; choose one of {', '.join(TYPES)}, or bits@group like 4@32 "
        f"(groups of {groups})"
    )


def promoted(spec: QuantSpec) -> QuantSpec:
    """What embeddings and the output head get beside layers of `spec`: every token's error goes through them."""
    bits = 6 if spec.bits <= 4 else 8
    return QuantSpec(bits, spec.group_size) if spec.mode == "affine" else QuantSpec(bits)


def fitted(spec: QuantSpec, width: int) -> QuantSpec | None:
    """`spec` in the largest group up to its own that divides an input width; None where there is none."""
    if spec.mode != "affine":
        return spec if width % spec.group_size == 0 else None
    groups = [group for group in AFFINE_GROUPS if group <= spec.group_size and width % group == 0]
    return replace(spec, group_size=max(groups)) if groups else None


def label(spec: QuantSpec) -> str:
    """A type as it can be given again: 4@64, mxfp4."""
    return f"{spec.bits}@{spec.group_size}" if spec.mode == "affine" else spec.mode
