"""What a model needs in memory, from headers alone. Knows sizes, reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlxvlm.checkpoint.bind import choose_dtype, expected_bytes
from mlxvlm.checkpoint.hub import resolve
from mlxvlm.checkpoint.weights import read_weights
from mlxvlm.errors import ModelNotFoundError
from mlxvlm.families import family_of
from mlxvlm.models.base import KVSpec
from mlxvlm.processors.files import read_json

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes. `is_local` False: the weights are not on this machine yet."""

    model_type: str
    weights_bytes: int
    kv_bytes_per_token: int
    max_context: int
    is_local: bool


def memory_need(model: str, revision: str | None = None, dtype: str = "auto") -> MemoryNeed:
    """Of a folder from its files' headers, of a repository from the hub's, without fetching the weights."""
    folder = resolve(model, revision, weights=False)
    config = read_json(folder / "config.json")
    if not config:
        raise ModelNotFoundError(f"{folder} is no model: it has no config.json")
    # Building makes lazy arrays only; nothing is allocated until it is evaluated.
    specs: list[KVSpec] = family_of(config).model_module().build(config).kv_specs
    is_local = any(folder.glob("*.safetensors"))
    if is_local:
        weights = read_weights(folder)
        target = choose_dtype(dtype, weights)
        size = sum(expected_bytes(array, target) for array in weights.values())
    else:
        target = choose_dtype(dtype, {})
        size = _hub_bytes(model, revision, target if dtype != "auto" or target == mx.float32 else None)
    context = (config.get("text_config") or config).get("max_position_embeddings", 0)
    per_token = sum(spec.bytes_per_token(target) for spec in specs)
    return MemoryNeed(str(config["model_type"]), size, per_token, int(context), is_local)


def _hub_bytes(repository: str, revision: str | None, dtype: mx.Dtype | None) -> int:
    """Bytes of a repository's tensors from the headers that the hub reads; `dtype` None keeps each one's own."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        metadata = get_safetensors_metadata(repository, revision=revision)
    except (HfHubHTTPError, NotASafetensorsRepoError, OSError) as error:
        raise ModelNotFoundError(f"the hub gives no sizes for {repository}: {str(error).splitlines()[0]}") from error
    total = 0
    for kind, count in metadata.parameter_count.items():
        is_recast = dtype is not None and kind in ("F32", "F16", "BF16")
        total += int(count) * (dtype.size if is_recast and dtype else _DTYPE_BYTES.get(str(kind), 2))
    return total


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetches."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
