"""What a model needs in memory, from headers alone. Knows sizes, reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.checkpoint.bind import choose_dtype, expected_bytes, fit
from mlxvlm.checkpoint.hub import is_on_disk, resolve
from mlxvlm.checkpoint.weights import read_weights, weight_files
from mlxvlm.errors import ModelError, ModelNotFoundError, WeightsError
from mlxvlm.families import NONSENSE, family_of, senseless
from mlxvlm.models.base import KVSpec
from mlxvlm.processors.files import context_length, read_json

# As mx.load reads them; FP8 arrives as bytes.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
    "U64": mx.uint64,
    "U32": mx.uint32,
    "U16": mx.uint16,
    "U8": mx.uint8,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "BOOL": mx.bool_,
}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes. `is_local` False: the weights are not on this machine yet."""

    model_type: str
    weights_bytes: int
    kv_bytes_per_token: int
    max_context: int
    is_local: bool
    num_tensors: int
    misfit: str  # what is wrong with names or shapes, "" where the checkpoint is the model's


def memory_need(model: str, revision: str | None = None, dtype: str = "auto") -> MemoryNeed:
    """Of a folder from its files' headers, of a repository from the hub's, without fetching the weights."""
    folder = resolve(model, revision, weights=False)
    config = read_json(folder / "config.json")
    if not config:
        raise ModelNotFoundError(f"{folder} is no model: it has no config.json")
    # Building makes lazy arrays only; nothing is allocated until it is evaluated.
    built = family_of(config).build_model(config)
    is_local = is_on_disk(model) or _has_weights(folder)
    weights = read_weights(folder) if is_local else _hub_weights(model, revision)
    target = choose_dtype(dtype, weights)
    named = built.sanitize(weights)
    size = sum(expected_bytes(array, target) for array in named.values())
    specs: list[KVSpec] = built.kv_specs
    per_token = sum(spec.bytes_per_token(target) for spec in specs)
    try:
        context = context_length(config)
    except NONSENSE as error:
        raise senseless(folder / "config.json", error) from error
    return MemoryNeed(str(config["model_type"]), size, per_token, context, is_local, len(named), misfit(built, named))


def misfit(model: nn.Module, weights: dict[str, mx.array]) -> str:
    """Why sanitised weights can't be bound, "" if they can; only their shapes and types are looked at."""
    try:
        fit(model, weights)
    except WeightsError as error:
        return str(error)
    return ""


def _has_weights(folder: Path) -> bool:
    """Whether all of a repository's weight files are in the cache; a broken-off fetch leaves some."""
    try:
        return bool(weight_files(folder))
    except ModelError:
        return False


def _hub_weights(repository: str, revision: str | None) -> dict[str, mx.array]:
    """A repository's tensors as lazy zeros of their shapes and types, from the headers that the hub reads."""
    import httpx2
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = get_safetensors_metadata(repository, revision=revision)
    except (httpx2.HTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelNotFoundError(f"the hub gives no sizes for {repository}: {reason[0]}") from error
    return {
        name: mx.zeros(tensor.shape, DTYPES.get(str(tensor.dtype), mx.float16))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetches."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
