"""GGUF and UQFF files -> what reading them gives, as lazy zeros: names, shapes and types, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx
import numpy as np

from mlxvlm.checkpoint.conversion import Conversion, to_mlx
from mlxvlm.checkpoint.ggml import PLAIN, GGMLType, ggml_type, nbytes
from mlxvlm.checkpoint.gguf import GGUFFile
from mlxvlm.checkpoint.llama_cpp.load import GGUFModel
from mlxvlm.checkpoint.llama_cpp.names import Recipe
from mlxvlm.checkpoint.packed import OUTPUT_SCALE, QuantSpec
from mlxvlm.checkpoint.uqff_layers import BLOCK, Format, Parts, format_of, shape_of
from mlxvlm.errors import WeightsError

_BLOCK_ELEMENTS = 256  # of the largest block; all others divide it
_DTYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "U8": mx.uint8, "U32": mx.uint32}


def add_gguf(conversion: Conversion, model: GGUFModel, requantize: QuantSpec | None) -> int:
    """What model.read() would fill in, but for tensors that the files lack. The bytes of the tensors as stored."""
    stored = 0
    for path, recipes in model.recipes:
        with GGUFFile(path) as file:
            stored += sum(info.nbytes for info in file.tensors.values())
            for recipe in recipes:
                _add_recipe(conversion, file, recipe, requantize)
    if conversion.dtype is None and any(name.endswith(".scales") for name in conversion.weights):
        conversion.dtype = mx.bfloat16
    return stored


def _add_recipe(conversion: Conversion, file: GGUFFile, recipe: Recipe, requantize: QuantSpec | None) -> None:
    pieces = [(file.tensors[piece.tensor], piece.rows) for piece in recipe.pieces if piece.tensor in file.tensors]
    if len(pieces) != len(recipe.pieces):
        return
    shapes = [
        info.shape if rows is None else (*rows.shape, *(info.shape[-1:] if len(info.shape) > 1 else ()))
        for info, rows in pieces
    ]
    if not all(shapes):
        raise WeightsError(f"{recipe.name} has no dimensions")
    kinds = {info.kind for info, _ in pieces}
    kind = kinds.pop() if len(kinds) == 1 else GGMLType.F32
    if recipe.is_stacked:
        conversion.plain(recipe.name, mx.zeros((*shapes[0][:2], len(shapes), *shapes[0][2:]), _plain_dtype(kind)))
        return
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    module, _, leaf = recipe.name.rpartition(".")
    if leaf == "weight" and len(shape) in (2, 3):
        _add_ggml(conversion, module, kind, shape, requantize)
    else:
        conversion.plain(recipe.name, mx.zeros(shape, _plain_dtype(kind)))


def _add_ggml(
    conversion: Conversion, path: str, kind: GGMLType, shape: Sequence[int], requantize: QuantSpec | None
) -> None:
    if kind in PLAIN:
        conversion.plain(f"{path}.weight", mx.zeros(shape, _plain_dtype(kind)))
        return
    _add_rows(conversion, path, shape, _row(kind, shape[-1], requantize))


def _add_rows(conversion: Conversion, path: str, shape: Sequence[int], row: dict[str, mx.array]) -> None:
    """All rows of a weight from what became of one."""
    for leaf, array in row.items():
        whole = mx.zeros((*shape[:-1], array.shape[-1]), array.dtype) if array.ndim else array
        conversion.weights[f"{path}{leaf}"] = whole


@cache
def _row(kind: GGMLType, width: int, requantize: QuantSpec | None) -> dict[str, mx.array]:
    """What reading makes of one row of zeros."""
    row = Conversion(requantize)
    row.ggml("", np.zeros(nbytes(kind, (1, width)), np.uint8), kind, (1, width))
    return row.weights


@cache
def _inexact_row(width: int, requantize: QuantSpec | None) -> dict[str, mx.array]:
    row = Conversion(requantize)
    row.inexact("", np.zeros((1, width), np.float32), "")
    return row.weights


@cache
def _plain_dtype(kind: GGMLType) -> mx.Dtype:
    shape = (_BLOCK_ELEMENTS,)
    return to_mlx(np.zeros(nbytes(kind, shape), np.uint8), kind, shape).dtype


def add_uqff_layer(conversion: Conversion, path: str, parts: Parts, requantize: QuantSpec | None) -> None:
    """What uqff_layers.add() would fill in; of the parts only the small ones need to hold their values."""
    kind, shape = format_of(parts), shape_of(parts)
    *lead, width = shape
    if kind == Format.GGUF:
        _add_ggml(conversion, path, ggml_type(parts["dtype"].numbers("U32")[0]), shape, requantize)
    elif kind == Format.UNQUANT:
        conversion.plain(f"{path}.weight", mx.zeros(shape, _DTYPES[parts[""].dtype]))
    elif kind == Format.AFQ:
        for leaf, name in (("weight", ""), ("scales", "scales"), ("biases", "biases")):
            conversion.plain(f"{path}.{leaf}", mx.zeros(parts[name].shape, _DTYPES[parts[name].dtype]))
    elif kind == Format.MXFP4:
        _add_words(conversion, path, (*lead, width // 8), mx.zeros((*lead, width // BLOCK), mx.uint8))
    elif kind == Format.HQQ or width % BLOCK:
        _add_rows(conversion, path, shape, _inexact_row(width, requantize))
    else:
        is_float = kind == Format.FP8
        scales = mx.zeros((*lead, width // BLOCK), mx.uint8 if is_float else mx.float16)
        _add_words(conversion, path, (*lead, width // 4), scales)
        conversion.weights |= {} if is_float else {f"{path}.biases": scales}
        conversion.weights[f"{path}.{OUTPUT_SCALE}"] = mx.zeros((), mx.float32)
    if "bias" in parts:
        conversion.plain(f"{path}.bias", mx.zeros(parts["bias"].shape, _DTYPES.get(parts["bias"].dtype, mx.float32)))


def _add_words(conversion: Conversion, path: str, shape: Sequence[int], scales: mx.array) -> None:
    conversion.weights |= {f"{path}.weight": mx.zeros(shape, mx.uint32), f"{path}.scales": scales}
