"""A model's name -> a folder on disk. Knows Hugging Face repositories and their cache, not what the files mean."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mlxvlm.errors import ModelError, ModelNotFoundError

DEMO = "demo"  # the model that ships inside the package
INDEX = "model.safetensors.index.json"
_SMALL_FILES = ["*.json", "*.jinja"]
_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: `demo`, a local folder, or a repository id that is fetched into the hub's cache.

    weights=False fetches the small files only. Raises ModelNotFoundError, or ModelError when the hub can't be reached.
    """
    if model == DEMO:
        return Path(__file__).parent.parent / "demo"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelNotFoundError(f"{model} is a file: give the folder that holds config.json and the weights")
    if not _REPOSITORY.match(model):
        raise ModelNotFoundError(f"no such model: {model!r} is neither a folder nor a repository id like owner/name")
    return _download(model, revision, weights)


def _download(repository: str, revision: str | None, weights: bool) -> Path:
    """Only what is needed: the small files first, then the weight files that the index (or the lack of one) names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # Repositories keep other formats in sub-folders (original/, onnx/ ...).
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"])
        )
        if weights:
            patterns = _weight_patterns(folder)
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        return folder
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
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{repository} can't be fetched: {reason[0]}") from error


def _weight_patterns(folder: Path) -> list[str]:
    """The shards of the index; without one, every safetensors file that is not another runtime's format."""
    index = folder / INDEX
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is damaged: {error}") from error
    return ["model*.safetensors", "weights*.safetensors"]
