"""A model's name -> a folder on disk. Knows Hugging Face repositories and their cache, not what the files mean."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxvlm.errors import ModelError, ModelNotFoundError, WeightsError
from mlxvlm.processors.files import read_json

DEMO = "demo"  # the model that ships inside the package
INDEX = "model.safetensors.index.json"
SMALL_FILES = ["*.json", "*.jinja"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# An index comes with the checkpoint: a name must not lead out of its folder, be a pattern, or be of another format.
_SHARD = re.compile(r"[^/\\*?\[\]\x00-\x1f]+\.safetensors")


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: `demo`, a local folder, or a repository id that is fetched into the hub's cache.

    weights=False fetches the small files only. Raises ModelNotFoundError, or ModelError when the hub can't be reached.
    """
    if model == DEMO:
        return Path(__file__).parent.parent / "demo"
    path = os.path.expanduser(model)
    # os.path, as Path's own questions raise on names that no file can have.
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        raise ModelNotFoundError(f"{model} is a file: give the folder that holds config.json and the weights")
    if not _REPOSITORY.fullmatch(model):
        raise ModelNotFoundError(f"no such model: {model!r} is neither a folder nor a repository id like owner/name")
    return _download(model, revision, weights)


def is_on_disk(model: str) -> bool:
    """Whether resolve() takes `model` as a folder of this machine rather than as a repository."""
    return model == DEMO or os.path.isdir(os.path.expanduser(model))


def shard_names(index: Mapping[str, Any]) -> list[str]:
    """The files that a weight index names. Raises WeightsError for an index without any, or with an unsafe name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{INDEX} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    unsafe = [name for name in names if not _SHARD.fullmatch(name)]
    if unsafe:
        raise WeightsError(f"{INDEX} names files that are no safetensors beside it: {', '.join(map(repr, unsafe))}")
    return names


def fetch(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The cached folder of a repository, with the files of its top folder that match; raises as resolve() does."""
    if not _REPOSITORY.fullmatch(repository):
        raise ModelNotFoundError(f"no such repository: {repository!r} is no id like owner/name")
    with _hub_errors(repository, revision):
        from huggingface_hub import snapshot_download

        # Repositories keep other formats in sub-folders (original/, onnx/ ...).
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    return Path(folder)


def _download(repository: str, revision: str | None, weights: bool) -> Path:
    """Only what is needed: the small files first, then the weight files that the index (or the lack of one) names."""
    folder = fetch(repository, SMALL_FILES, revision)
    if weights:
        # The small files once more: should the branch move in between, all must be of one commit.
        folder = fetch(repository, [*SMALL_FILES, *_weight_patterns(folder)], revision)
    return folder


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's errors as ours."""
    import httpx2
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repository} is gated: accept its terms on its hub page, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repository} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repository} is not on the hub, or is private: check the name, or run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repository} is not in the local cache and the hub can't be reached; check the connection"
        ) from error
    except (httpx2.HTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{repository} can't be fetched: {reason[0]}") from error


def _weight_patterns(folder: Path) -> list[str]:
    """The shards of the index; without one, every safetensors file that is not another runtime's format."""
    index = read_json(folder / INDEX)
    return shard_names(index) if index else ["model*.safetensors", "weights*.safetensors"]
