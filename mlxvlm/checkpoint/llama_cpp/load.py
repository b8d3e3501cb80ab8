"""One or two GGUF files -> what a hub checkpoint is: configs, processor files, tensors by the hub's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvlm.checkpoint.bind import Progress
from mlxvlm.checkpoint.conversion import REQUANTIZED, Conversion, Shrink, to_mlx
from mlxvlm.checkpoint.ggml import GGMLType, dequantize
from mlxvlm.checkpoint.gguf import GGUFFile
from mlxvlm.checkpoint.llama_cpp.keys import Keys
from mlxvlm.checkpoint.llama_cpp.names import Piece, Recipe, layout_of, text_recipes, tower_recipes
from mlxvlm.checkpoint.llama_cpp.text import FREQUENCIES, architecture, text_config, vocabulary
from mlxvlm.checkpoint.llama_cpp.vision import Pictures, is_mmproj, pictures
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.errors import ModelError, UsageError, WeightsError
from mlxvlm.families import NONSENSE, senseless
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.ggml_tokenizer import build

SUFFIX = ".gguf"
_FIRST_PART = "-00001-of-"


@dataclass(frozen=True)
class GGUFModel:
    """A text model and its mmproj, None for a model without pictures; headers are read, tensors are not."""

    text: Path
    mmproj: Path | None
    config: dict[str, Any]
    files: ProcessorFiles
    recipes: tuple[tuple[Path, list[Recipe]], ...]

    def read(
        self,
        requantize: QuantSpec | None = REQUANTIZED,
        progress: Progress | None = None,
        shrink: Shrink | None = None,
    ) -> Conversion:
        """All tensors, in memory, see Conversion. Raises WeightsError naming file and tensor."""
        conversion = Conversion(requantize, progress, sum(path.stat().st_size for path, _ in self.recipes), shrink)
        for path, recipes in self.recipes:
            with GGUFFile(path) as file:
                for recipe in recipes:
                    _add(conversion, file, path, recipe)
        if conversion.dtype is None and any(name.endswith(".scales") for name in conversion.weights):
            # All but the norms is quantised, and those are in float32.
            conversion.dtype = mx.bfloat16
        return conversion


def find(folder: Path) -> tuple[Path, Path | None]:
    """The text model and the mmproj of a folder that holds no other. Raises ModelError naming what it holds."""
    paths = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if "-of-" not in path.name or _FIRST_PART in path.name]
    halves: tuple[list[Path], list[Path]] = [], []
    for path in paths:
        with GGUFFile(path) as file:
            halves[is_mmproj(_keys(path, file))].append(path)
    texts, projectors = halves
    if len(texts) != 1 or len(projectors) > 1:
        names = ", ".join(path.name for path in paths)
        raise ModelError(f"{folder} holds {names}: name the model's file with -m, and its mmproj with --mmproj")
    return texts[0], projectors[0] if projectors else None


def open_gguf(text: Path, mmproj: Path | None, template: str | None = None) -> GGUFModel:
    """Reads headers, the vocabulary and the RoPE's factors. `template` goes before the file's own.

    Raises ModelError and its kinds for halves that are no model, or not of the same one.
    """
    try:
        return _open(text, mmproj, template)
    except NONSENSE as error:
        raise senseless(text if mmproj is None else f"{text} or {mmproj}", error) from error


def _open(text: Path, mmproj: Path | None, template: str | None) -> GGUFModel:
    with GGUFFile(text) as file:
        keys = _keys(text, file)
        if is_mmproj(keys):
            raise UsageError(
                f"{text} is an mmproj, the picture half: give the text model with -m, and it with --mmproj"
            )
        factors = None
        if FREQUENCIES in file.tensors:
            info = file.tensors[FREQUENCIES]
            factors = dequantize(file.bytes(FREQUENCIES), info.kind, info.shape)
    kind, part = architecture(keys), text_config(keys, factors)
    tokenizer = build(vocabulary(keys))
    if tokenizer.backend.get_vocab_size() > part["vocab_size"]:
        raise WeightsError(f"{text} has more tokens than its embedding has rows: fetch it again")
    if mmproj is None:
        if kind.alone is None:
            raise UsageError(f"{text} is the text half of a vision-language model: give its mmproj with --mmproj")
        pair = Pictures({**part, "model_type": kind.alone}, {})
        layout = layout_of(kind.alone)
        recipes = [(text, text_recipes(keys, layout, part, kind.is_permuted))]
    else:
        with GGUFFile(mmproj) as file:
            tower = _keys(mmproj, file)
        if not is_mmproj(tower):
            raise UsageError(f"{mmproj} is no mmproj: its architecture is {tower.text('general.architecture', '')!r}")
        pair = pictures(tower, keys.text("general.architecture"), part, tokenizer)
        layout = layout_of(str(pair.config["model_type"]))
        recipes = [(text, text_recipes(keys, layout, part, kind.is_permuted)), (mmproj, tower_recipes(tower, layout))]
    own = template or keys.text("tokenizer.chat_template", "") or pair.default_template
    files = ProcessorFiles(pair.config, pair.processor, pair.image_processor, tokenizer, own)
    return GGUFModel(text, mmproj, pair.config, files, tuple(recipes))


def _keys(path: Path, file: GGUFFile) -> Keys:
    return Keys(str(path), file.metadata, {name: info.shape for name, info in file.tensors.items()})


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor's bytes row by row, [rows, bytes of a row]."""

    kind: GGMLType
    shape: tuple[int, ...]
    rows: np.ndarray[Any, np.dtype[np.uint8]]

    def floats(self) -> _Stored:
        values = dequantize(np.ascontiguousarray(self.rows).reshape(-1), self.kind, self.shape)
        return _Stored(GGMLType.F32, self.shape, values.reshape(len(self.rows), -1).view(np.uint8))


def _piece(file: GGUFFile, piece: Piece) -> _Stored:
    info = file.tensors[piece.tensor]
    shape = info.shape
    if not shape:
        raise WeightsError("has no dimensions")
    # A vector's elements are its rows; a matrix's, those of its last dimension.
    count = int(np.prod(shape[:-1])) if len(shape) > 1 else info.shape[0]
    rows = file.bytes(piece.tensor).reshape(count, -1)
    if piece.rows is None:
        return _Stored(info.kind, shape, rows)
    picked = rows[piece.rows.reshape(-1)]
    lead = piece.rows.shape
    return _Stored(info.kind, (*lead, *shape[-1:]) if len(shape) > 1 else lead, picked)


def _joined(parts: list[_Stored]) -> _Stored:
    """Row after row; of one type if they are, else in float32."""
    if len({part.kind for part in parts}) > 1:
        parts = [part.floats() for part in parts]
    if len({part.shape[1:] for part in parts}) > 1:
        raise WeightsError("has parts of different widths")
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return _Stored(parts[0].kind, shape, np.concatenate([part.rows for part in parts]))


def _add(conversion: Conversion, file: GGUFFile, path: Path, recipe: Recipe) -> None:
    try:
        missing = [piece.tensor for piece in recipe.pieces if piece.tensor not in file.tensors]
        if missing:
            raise WeightsError(f"needs {', '.join(missing)}, which the file lacks")
        parts = [_piece(file, piece) for piece in recipe.pieces]
        if recipe.is_stacked:
            arrays = [to_mlx(part.rows.reshape(-1), part.kind, part.shape) for part in parts]
            conversion.plain(recipe.name, _stacked(arrays))
            return
        whole = _joined(parts)
        data = np.ascontiguousarray(whole.rows).reshape(-1)
        module, _, leaf = recipe.name.rpartition(".")
        if leaf == "weight" and len(whole.shape) in (2, 3):
            conversion.ggml(module, data, whole.kind, whole.shape)
        else:
            conversion.plain(recipe.name, to_mlx(data, whole.kind, whole.shape))
    except WeightsError as error:
        raise WeightsError(f"{path}: {recipe.name} {error}") from error


def _stacked(arrays: list[mx.array]) -> mx.array:
    """Kernels [O, C, y, x] of the frames of a film -> [O, C, T, y, x]."""
    if len({(array.shape, array.ndim) for array in arrays}) > 1 or arrays[0].ndim != 4:
        raise WeightsError("has frames of different shapes")
    return mx.stack(arrays, axis=2)
