"""What a model needs in memory, from headers alone. Knows sizes, reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.checkpoint.bind import bound_dtype, choose_dtype, expected_bytes, fit, planned
from mlxvlm.checkpoint.build import check_shareable, dtype_of
from mlxvlm.checkpoint.conversion import Conversion
from mlxvlm.checkpoint.hub import is_on_disk, resolve
from mlxvlm.checkpoint.isq import AS_IT_IS, Recipe, make_plan
from mlxvlm.checkpoint.load import GGUF, REQUANTIZE, UQFF, is_packed
from mlxvlm.checkpoint.packed import QuantSpec
from mlxvlm.checkpoint.recipe import parse_type
from mlxvlm.checkpoint.uqff import outline
from mlxvlm.checkpoint.uqff_files import RESIDUAL
from mlxvlm.checkpoint.uqff_files import find as find_uqff
from mlxvlm.checkpoint.weights import read_weights, weight_files
from mlxvlm.errors import ModelError, ModelNotFoundError, WeightsError
from mlxvlm.families import NONSENSE, family_of, senseless
from mlxvlm.models.base import KVSpec
from mlxvlm.models.shares import Rank, Share, most_ranks
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
    disk_bytes: int  # of the checkpoint's tensors as they are stored
    weights_bytes: int  # of the bound model
    loading_bytes: int  # at the peak of loading
    kv_bytes_per_token: int
    max_context: int
    is_local: bool
    num_tensors: int
    misfit: str  # what is wrong with names or shapes, "" where the checkpoint is the model's
    left: Sequence[str]  # what in-situ quantisation can't take, see isq.Plan
    kv_specs: Sequence[KVSpec]
    dtype: mx.Dtype  # what is computed in
    most_ranks: int  # that its heads and widths can be shared by; quantised groups may allow fewer
    share: Callable[[int, int], MemoryNeed] = field(compare=False, repr=False)  # that of rank `index` of `count`


def memory_need(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    recipe: Recipe = AS_IT_IS,
    mmproj: Path | None = None,
    from_uqff: str | None = None,
    requantize: str = REQUANTIZE,
    *,
    rank: Rank | None = None,
) -> MemoryNeed:
    """Of files from their headers, of a repository from the hub's, without fetching the weights.

    mmproj, from_uqff, requantize: as for loading; GGUF and UQFF files must be here. rank: of one of several machines
    that share a model of safetensors. Raises ModelError and its kinds, UsageError.
    """
    spec = None if requantize.lower() == "none" else parse_type(requantize)
    path = Path(model).expanduser()
    if mmproj is not None or (path.suffix.lower() == GGUF and not path.is_dir()):
        check_shareable(model, rank)
        return _unshared(model, _gguf_need(path, mmproj, dtype, recipe, spec))
    folder = resolve(model, revision, weights=False)
    if from_uqff is not None or is_packed(folder):
        check_shareable(model, rank)
    if from_uqff is None and is_packed(folder):
        if any(folder.glob(f"*{GGUF}")):
            return _unshared(model, _gguf_need(folder, None, dtype, recipe, spec))
        from_uqff = str(folder)
    config = read_json(folder / "config.json")
    if not config:
        raise ModelNotFoundError(f"{folder} is no model: it has no config.json")
    name = str(folder / "config.json")
    if from_uqff is not None:
        files = _uqff_files(from_uqff, folder, model)
        conversion = outline(files, folder, spec)
        need = need_of(config, conversion.weights, dtype_of(dtype, conversion), recipe, name=name)
        stored = sum(file.stat().st_size for file in [*files, *_rest(files, folder)])
        return _unshared(model, replace(need, disk_bytes=stored))
    is_local = is_on_disk(model) or _has_weights(folder)
    weights = read_weights(folder) if is_local else _hub_weights(model, revision)
    return need_of(config, weights, dtype, recipe, is_local=is_local, name=name, rank=rank)


def _gguf_need(path: Path, mmproj: Path | None, dtype: str, recipe: Recipe, spec: QuantSpec | None) -> MemoryNeed:
    from mlxvlm.checkpoint.llama_cpp.load import find, open_gguf
    from mlxvlm.checkpoint.outline import add_gguf

    if path.is_dir():
        path, found = find(path)
        mmproj = mmproj or found
    model = open_gguf(path, mmproj)
    conversion = Conversion(spec)
    stored = add_gguf(conversion, model, spec)
    need = need_of(model.config, conversion.weights, dtype_of(dtype, conversion), recipe, name=str(path))
    return replace(need, disk_bytes=stored)


def _unshared(name: str, need: MemoryNeed) -> MemoryNeed:
    def share(index: int, count: int) -> MemoryNeed:
        check_shareable(name, None if count == 1 else count)
        return need

    return replace(need, share=share)


def _uqff_files(name: str, folder: Path, model: str) -> list[Path]:
    """As loading finds them, but nothing is fetched."""
    repository, _, file = name.rpartition("/")
    if file.endswith(UQFF) and repository.count("/") == 1 and not Path(name).expanduser().exists():
        name = str(resolve(repository, weights=False) / file)
    try:
        return find_uqff(name, str(folder))
    except ModelNotFoundError as error:
        if is_on_disk(model):
            raise
        fetch = f"mlxvlm pull {model} --from-uqff {name}"
        raise ModelNotFoundError(
            f"the headers of {name} are not on this machine: `{fetch}` fetches the files"
        ) from error


def _rest(files: Sequence[Path], folder: Path) -> list[Path]:
    """What holds the tensors that are not in UQFF files."""
    residual = [place / RESIDUAL for place in (folder, files[0].parent) if (place / RESIDUAL).is_file()]
    return residual[:1] or list(folder.glob("model*.safetensors"))


def need_of(
    config: dict[str, Any],
    weights: Mapping[str, mx.array],
    dtype: str = "auto",
    recipe: Recipe = AS_IT_IS,
    *,
    is_local: bool = True,
    name: str = "config.json",
    rank: Rank | None = None,
) -> MemoryNeed:
    """Of a config and its tensors, of which shapes and types are looked at. `name`: the config's, for errors.

    rank: counts its share, but of a checkpoint that is a misfit.
    """
    # Building makes lazy arrays only; nothing is allocated until it is evaluated.
    built = family_of(config).build_model(config)
    most, target = most_ranks(built), choose_dtype(dtype, weights)
    stored = {name: int(array.nbytes) for name, array in weights.items()}
    # A stack of experts is read one expert at a time where it is quantised.
    pieces = [array.nbytes // array.shape[0] if array.ndim == 3 else array.nbytes for array in weights.values()]
    named = built.sanitize(dict(weights))
    problem = misfit(built, named)  # makes modules what the tensors are: what is quantised stays so
    plan, specs = make_plan(built, recipe), list(built.kv_specs)
    if rank is not None and not problem:
        plan, named, _ = planned(built, named, recipe, Share(rank, lambda part: part))
        stored = {name: int(array.nbytes) for name, array in named.items()}
        pieces = [array.nbytes // array.shape[0] if array.ndim == 3 else array.nbytes for array in named.values()]
        specs = [replace(spec, num_kv_heads=max(1, len(rank.range(spec.num_kv_heads)))) for spec in specs]
    size = sum(bound_bytes(name, named, target, plan.specs) for name in named)
    try:
        context = context_length(config)
    except NONSENSE as error:
        raise senseless(name, error) from error
    return MemoryNeed(
        model_type=str(config["model_type"]),
        disk_bytes=sum(stored.values()),
        weights_bytes=size,
        loading_bytes=size + max(pieces if plan.specs else stored.values(), default=0),
        kv_bytes_per_token=sum(spec.bytes_per_token(target) for spec in specs),
        max_context=context,
        is_local=is_local,
        num_tensors=len(named),
        misfit=problem,
        left=plan.left,
        kv_specs=specs,
        dtype=target,
        most_ranks=most,
        share=lambda *rank: need_of(config, weights, dtype, recipe, is_local=is_local, name=name, rank=Rank(*rank)),
    )


def bound_bytes(name: str, weights: Mapping[str, mx.array], dtype: mx.Dtype, specs: Mapping[str, QuantSpec]) -> int:
    """Of a tensor once it is bound, its scales and biases included where it is quantised on the way."""
    array = weights[name]
    spec = specs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if spec is None:
        return expected_bytes(array, bound_dtype(name, weights, dtype))
    # The float modes have one byte for each group, affine groups a scale and a bias.
    per_group = 2 * dtype.size if spec.mode == "affine" else 1
    return int(array.size * spec.bits // 8 + array.size // spec.group_size * per_group)


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
