"""Tensors of a foreign file on their way to MLX: exact where they can be, else re-quantised and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.checkpoint.ggml import PLAIN, GGMLType, dequantize, plain, repack
from mlxvlm.checkpoint.packed import Packed, QuantSpec, quantized

# Adds a relative error of 0.005, which shows in nothing below 8 bits.
REQUANTIZED = QuantSpec(8, 32)

Shrink: TypeAlias = Callable[[str, mx.array], "dict[str, mx.array] | None"]


class Conversion:
    """What a reader of UQFF or GGUF files fills: `weights` by name, as if they came from safetensors.

    requantize: what quantised weights without an exact MLX form become; None keeps them in 16 bits. progress: told the
    bytes that are there and `total` after each tensor; it may raise to interrupt the reading. shrink: makes less of a
    plain tensor as it comes, None where it stays.
    """

    def __init__(
        self,
        requantize: QuantSpec | None = REQUANTIZED,
        progress: Callable[[int, int], None] | None = None,
        total: int = 0,
        shrink: Shrink | None = None,
    ) -> None:
        self.weights: dict[str, mx.array] = {}
        self.dtype: mx.Dtype | None = None  # of what the source did not quantise, where that is known
        self._requantize = requantize
        self._progress, self._total, self._done = progress, total, 0
        self._inexact: Counter[str] = Counter()
        self._shrink = shrink
        self.num_shrunk = 0

    def plain(self, name: str, array: mx.array) -> None:
        """A tensor that is not quantised; `name` is whole, with `.weight` or `.bias`."""
        if self.dtype is None and array.ndim > 1 and array.dtype in (mx.float16, mx.bfloat16):
            self.dtype = array.dtype  # norms may be in float32 whatever the model computes in
        smaller = None if self._shrink is None else self._shrink(name, array)
        self.weights |= {name: array} if smaller is None else smaller
        self.num_shrunk += smaller is not None
        self._step(array.nbytes)

    def exact(self, path: str, packed: Packed) -> None:
        """The weight of the module at `path`, without loss."""
        self.weights |= packed.tensors(path)
        self._step(packed.weight.nbytes)

    def inexact(self, path: str, values: NDArray[Any], source: str) -> None:
        """The weight of the module at `path`, dequantised to float32 from `source`, a type that MLX can't hold."""
        spec = self._requantize
        array = mx.array(values)
        if spec is None or values.ndim < 2 or values.shape[-1] % spec.group_size:
            self._inexact[f"{source} layers dequantised to 16 bits"] += 1
            half = array.astype(mx.float16)
            mx.eval(half)
            self.weights[f"{path}.weight"] = half
        else:
            self._inexact[f"{source} layers re-quantised to {spec.bits}-bit groups of {spec.group_size}"] += 1
            self.weights |= quantized(path, array, spec)
        self._step(self.weights[f"{path}.weight"].nbytes)

    def ggml(self, path: str, data: NDArray[np.uint8], kind: GGMLType, shape: Sequence[int]) -> None:
        """The weight [..., out, in] of the module at `path` from uint8 [nbytes]: exact, else inexact; floats as is.

        Raises WeightsError as dequantize does, without naming the tensor.
        """
        if kind in PLAIN:
            self.plain(f"{path}.weight", to_mlx(data, kind, shape))
        elif packed := repack(data, kind, shape):
            self.exact(path, packed)
        else:
            self.inexact(path, dequantize(data, kind, shape), kind.name)

    def _step(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def notes(self) -> list[str]:
        """A line for each kind of loss."""
        return [f"{count} {kind}: not bit-exact" for kind, count in sorted(self._inexact.items())]


def to_mlx(data: NDArray[np.uint8], kind: GGMLType, shape: Sequence[int]) -> mx.array:
    """uint8 [nbytes] -> the tensor: plain types in their own type, F64 and quantised ones in float32."""
    if kind is GGMLType.BF16:
        return mx.array(plain(data, kind, shape)).view(mx.bfloat16)
    return mx.array(plain(data, kind, shape) if kind in PLAIN else dequantize(data, kind, shape))
