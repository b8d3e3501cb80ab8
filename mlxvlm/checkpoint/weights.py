"""A folder's safetensors files -> lazy tensors. Knows files and shards, not what the names mean.

`mx.load` reads the header only; a tensor is read when it is evaluated.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlxvlm.checkpoint.container import TensorFile, damage
from mlxvlm.checkpoint.hub import INDEX, shard_names
from mlxvlm.errors import ModelError, WeightsError
from mlxvlm.processors.files import read_json


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the index's shards, else those that lie in the folder.

    Raises WeightsError naming each missing or unsafe shard, ModelError if there are no weights at all.
    """
    index = read_json(folder / INDEX)
    if index:
        files = [folder / name for name in shard_names(index)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing)}")
        return files
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if files:
        return files
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise ModelError(f"{folder} has weights in PyTorch's pickle format only; safetensors are needed")
    raise ModelError(f"{folder} has no weights (*.safetensors)")


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Every tensor of the folder by name, unread. Raises WeightsError naming a damaged file."""
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        weights.update(read_file(file))
    return weights


def read_file(file: Path) -> dict[str, mx.array]:
    """Every tensor of a safetensors file by name, unread. Raises WeightsError naming a damaged file."""
    # mx.load cuts sizes to 32 bits, takes negative ones, and lets tensors share bytes.
    TensorFile(file)
    try:
        loaded = mx.load(str(file))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(damage(file, reason[0])) from error
    assert isinstance(loaded, dict)
    return loaded
