"""MLX's quantised weights -> a folder in UQFF 1.2 that mistral.rs 0.9 loads. Knows the files, not who quantised.

AFQ is MLX's own affine layout, so those layers go out bit for bit. What UQFF has no type for, and modules that
mistral.rs never takes quantised, are written unquantised.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxvlm.checkpoint.container import HEADER_BYTES, nbytes
from mlxvlm.checkpoint.ggml import GGMLType
from mlxvlm.checkpoint.packed import OUTPUT_SCALE, QuantSpec
from mlxvlm.checkpoint.uqff_files import RESIDUAL, SUFFIX
from mlxvlm.checkpoint.uqff_layers import AFQ_BITS, AFQ_GROUPS, BLOCK, Format
from mlxvlm.checkpoint.write import new_folder
from mlxvlm.errors import UsageError, WeightsError
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.files import ProcessorFiles, read_json

SHARD_BYTES = 10 * 2**30  # mistral.rs's own limit
_VERSION = {"major": 1, "minor": 2, "patch": 0}
_METADATA = {"uqff.version": "1.2.0", "uqff.producer": "mlxvlm"}
_COPIED = ("tokenizer.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_QUANTISATION = ("quantization_config", "quantization")  # the shards alone say what is quantised
_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int32: "I32",
    mx.int64: "I64",
}
# What mistral.rs looks for in the shards; projectors and positions it reads from the residual alone.
_LAYERS = re.compile(
    r"(?:^|\.)(?:lm_head|embed_tokens|router|fc[12]|(?:[qkvo]|out|gate|up|down)_proj|attn\.(?:qkv|proj))$"
)
_Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", BLOCK // 2)])


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor of a file to be; `data` makes its bytes when they are due."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes]

    @property
    def size(self) -> int:
        return nbytes(self.dtype, self.shape)


def write(
    target: Path, stem: str, tensors: dict[str, mx.array], specs: Mapping[str, QuantSpec], source: Path
) -> list[Path]:
    """Writes `target`/`stem`-0.uqff and so on, the residual, and the small files of the model folder `source`.

    tensors: all of the model's by checkpoint names (see checkpoint_names), emptied one by one. specs: how each
    quantised module's weight, scales and biases were made. The folder appears when it is complete.
    Raises UsageError if `target` exists, WeightsError for tensors that UQFF can't hold. Returns the shards.
    """
    if target.exists():
        raise UsageError(f"{target} exists: name a new folder")
    with new_folder(target) as draft:
        shards = _write_shards(draft, stem, tensors, specs)
        _write_file(draft / RESIDUAL, [_item(tensors, name) for name in sorted(tensors)])
        _write_small_files(draft, source)
    return [target / shard for shard in shards]


def checkpoint_names(model: VisionLanguageModel, weights: Mapping[str, mx.array]) -> dict[str, str]:
    """The model's own names of a checkpoint's (unread) tensors -> the checkpoint's. UQFF goes by the latter.

    Parts of a tensor that the model splits, as fused experts, keep the model's names, which are UQFF's for them.
    """
    names: dict[str, str] = {}
    for name, array in weights.items():
        ours = list(model.sanitize({name: array}))
        names |= (
            {ours[0]: name} if len(ours) == 1 and name.endswith((".weight", ".bias")) else {our: our for our in ours}
        )
    return names


def _write_shards(folder: Path, stem: str, tensors: dict[str, mx.array], specs: Mapping[str, QuantSpec]) -> list[str]:
    """Emptied of the quantised modules, `tensors` is the residual."""
    shards: list[list[_Item]] = [[]]
    for path in sorted(specs):
        _check(path, tensors, specs[path])
        if not _LAYERS.search(path):
            _dequantise(path, tensors, specs[path])
            continue
        layer = list(_layer(path, tensors, specs[path]))
        if shards[-1] and sum(item.size for item in (*shards[-1], *layer)) > SHARD_BYTES:
            shards.append([])
        shards[-1] += layer
    shards[0] += [_numbers(f"uqff.version.{part}", "U32", number) for part, number in _VERSION.items()]
    names = [f"{stem}-{number}{SUFFIX}" for number in range(len(shards))]
    for name, items in zip(names, shards, strict=True):
        _write_file(folder / name, items)
    return names


def _check(path: str, tensors: Mapping[str, mx.array], spec: QuantSpec) -> None:
    missing = [leaf for leaf in _leaves(spec) if f"{path}.{leaf}" not in tensors]
    if missing or f"{path}.{OUTPUT_SCALE}" in tensors:
        reason = f"lacks {', '.join(missing)}" if missing else "was re-packed from another format"
        raise WeightsError(f"{path} {reason}: it can't be written as UQFF")


def _layer(path: str, tensors: dict[str, mx.array], spec: QuantSpec) -> Iterator[_Item]:
    if spec.mode == "affine" and spec.bits in AFQ_BITS and spec.group_size in AFQ_GROUPS:
        yield _item(tensors, f"{path}.weight")
        yield from (_item(tensors, f"{path}.{leaf}", f"{path}.weight.{leaf}") for leaf in ("scales", "biases"))
        yield _numbers(f"{path}.weight.bits", "U8", spec.bits)
        yield _numbers(f"{path}.weight.group_size", "U8", spec.group_size)
        kind = Format.AFQ
    elif spec.mode == "mxfp4":
        *lead, words = tensors[f"{path}.weight"].shape
        yield _Item(f"{path}.weight", "U8", (*lead, 4 * words), lambda: _raw(tensors.pop(f"{path}.weight")))
        yield _item(tensors, f"{path}.scales", f"{path}.weight.scales")
        kind = Format.MXFP4
    elif _is_q5_1(path, tensors, spec):
        yield from _as_q5_1(path, tensors, spec)
        kind = Format.GGUF
    else:
        _dequantise(path, tensors, spec)
        yield _item(tensors, f"{path}.weight")
        kind = Format.UNQUANT
    yield _numbers(f"{path}.weight.format", "U8", kind)
    if f"{path}.bias" in tensors:
        if kind is Format.GGUF:
            # mistral.rs adds a bias as it is stored: here to float32, elsewhere to the model's type.
            tensors[f"{path}.bias"] = tensors[f"{path}.bias"].astype(mx.float32)
        yield _item(tensors, f"{path}.bias")


def _leaves(spec: QuantSpec) -> tuple[str, ...]:
    return ("weight", "scales", "biases") if spec.mode == "affine" else ("weight", "scales")


def _item(tensors: dict[str, mx.array], name: str, stored: str = "") -> _Item:
    array = tensors[name]
    if array.dtype not in _DTYPES:
        raise WeightsError(f"{name} is of {array.dtype}, which can't be written")
    # Popped, so that one tensor that was read for writing is in memory at a time.
    return _Item(stored or name, _DTYPES[array.dtype], array.shape, lambda: _raw(tensors.pop(name)))


def _numbers(name: str, dtype: str, *numbers: int) -> _Item:
    """A scalar, or a vector of several."""
    data = np.array(numbers, {"U8": "u1", "U32": "<u4"}[dtype]).tobytes()
    return _Item(name, dtype, () if len(numbers) == 1 else (len(numbers),), lambda: data)


def _raw(array: mx.array) -> bytes:
    array = mx.contiguous(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def _is_q5_1(path: str, tensors: Mapping[str, mx.array], spec: QuantSpec) -> bool:
    """5 bits: no AFQ, but ggml's Q5_1, if scales and biases are float16 numbers."""
    if spec.mode != "affine" or spec.bits != 5:
        return False
    return all(_is_half(tensors[f"{path}.{leaf}"]) for leaf in ("scales", "biases"))


def _is_half(array: mx.array) -> bool:
    return bool(mx.array_equal(array.astype(mx.float16).astype(mx.float32), array.astype(mx.float32)).item())


def _as_q5_1(path: str, tensors: dict[str, mx.array], spec: QuantSpec) -> Iterator[_Item]:
    *lead, groups = tensors[f"{path}.scales"].shape
    shape = (*lead, groups * spec.group_size)
    count = tensors[f"{path}.scales"].size * spec.group_size // BLOCK

    def data() -> bytes:
        words, scales, biases = (tensors.pop(f"{path}.{leaf}") for leaf in ("weight", "scales", "biases"))
        blocks = np.zeros(count, _Q5_1)
        repeats = spec.group_size // BLOCK
        for field, array in (("d", scales), ("m", biases)):
            blocks[field] = np.repeat(np.array(array.astype(mx.float16)).reshape(-1), repeats)
        codes = _codes(np.array(words), spec.bits).reshape(count, BLOCK)
        low, high = codes[:, : BLOCK // 2] & 15, codes[:, BLOCK // 2 :] & 15
        blocks["qs"] = low | high << 4
        blocks["qh"] = np.packbits(codes >> 4, axis=1, bitorder="little").view("<u4")[:, 0]
        return blocks.tobytes()

    # The scales and biases leave with the weight; nothing else is written of them.
    yield _Item(f"{path}.weight", "U8", (count * _Q5_1.itemsize,), data)
    yield _numbers(f"{path}.weight.dtype", "U32", GGMLType.Q5_1)
    yield _numbers(f"{path}.weight.shape", "U32", *shape)


def _codes(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """packed.pack_codes, backwards: uint32 words -> uint8 codes, flat."""
    stream = np.unpackbits(words.reshape(-1).view(np.uint8), bitorder="little")
    return np.packbits(stream.reshape(-1, bits), axis=1, bitorder="little")[:, 0]


def _dequantise(path: str, tensors: dict[str, mx.array], spec: QuantSpec) -> None:
    """One weight in place of its parts, not evaluated: in the scales' type, of the float modes exactly in bfloat16."""
    parts = {leaf: tensors.pop(f"{path}.{leaf}") for leaf in _leaves(spec)}
    tensors[f"{path}.weight"] = mx.dequantize(
        parts["weight"], parts["scales"], parts.get("biases"), spec.group_size, spec.bits, spec.mode
    )


def _write_file(path: Path, items: Iterable[_Item]) -> None:
    """A safetensors file, largest types first, so that all are aligned."""
    ordered = sorted(items, key=lambda item: (-nbytes(item.dtype, ()), item.name))
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for item in ordered:
        offsets = [end, end := end + item.size]
        header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_BYTES)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(HEADER_BYTES, "little") + text)
        for item in ordered:
            data = item.data()
            assert len(data) == item.size, item.name
            stream.write(data)


def _write_small_files(folder: Path, source: Path) -> None:
    config = read_json(source / "config.json")
    tokenizer = read_json(source / "tokenizer_config.json")
    template = ProcessorFiles.read(source, config).template_source
    if template is not None:
        tokenizer["chat_template"] = template
    for name, value in (("config.json", _without(config)), ("tokenizer_config.json", tokenizer)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _without(config: Any) -> Any:
    """The config without its quantisation blocks, at any depth."""
    if isinstance(config, dict):
        return {key: _without(value) for key, value in config.items() if key not in _QUANTISATION}
    return [_without(value) for value in config] if isinstance(config, list) else config
