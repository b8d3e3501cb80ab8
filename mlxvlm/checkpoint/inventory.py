"""What lies on this disk, and how it gets there and goes. Knows the hub's cache and ours, not what models are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlxvlm.checkpoint.hub import is_on_disk, resolve
from mlxvlm.checkpoint.isq_cache import MANIFEST
from mlxvlm.checkpoint.load import is_packed, open_model
from mlxvlm.errors import ModelError
from mlxvlm.families import family_of
from mlxvlm.processors.files import read_json

_KEY_CHARS = 12  # of an entry's name: enough to tell thousands apart


@dataclass(frozen=True, slots=True)
class Cached:
    """A repository of the hub's cache, or a model that was quantised while loading.

    name: what a user calls it; of: for a quantised one, the model and type. used_s: seconds since 1970.
    """

    name: str
    kind: Literal["hub", "isq"]
    of: str
    nbytes: int
    used_s: float
    path: Path


def cached_models(isq_folder: Path | None) -> list[Cached]:
    """All that either cache holds, by name."""
    found = [*_repositories(), *(_quantised(isq_folder) if isq_folder else ())]
    return sorted(found, key=lambda each: (each.kind, each.name.lower()))


def remove(cached: Cached) -> None:
    """Deletes it, all revisions of a repository. Raises ModelError."""
    try:
        if cached.kind == "isq":
            shutil.rmtree(cached.path)
            return
        from huggingface_hub import scan_cache_dir

        found = scan_cache_dir()
        commits = [each.commit_hash for repo in found.repos if repo.repo_path == cached.path for each in repo.revisions]
        found.delete_revisions(*commits).execute()
        shutil.rmtree(cached.path, ignore_errors=True)  # what an interrupted download left
    except OSError as error:
        raise ModelError(f"{cached.name} can't be removed: {error.strerror or error}") from error


def pull(model: str, revision: str | None = None, from_uqff: str | None = None) -> Path:
    """Fetches what loading needs, as far as it is not there, and returns the folder.

    Raises ModelError and its kinds; for a model that is not run here before its weights are fetched.
    """
    if not is_on_disk(model) and not is_packed(Path(model)):
        config = read_json(resolve(model, revision, weights=False) / "config.json")
        if config:
            family_of(config)
    return open_model(model, revision=revision, from_uqff=from_uqff).folder


def _repositories() -> Iterator[Cached]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir()
    except (CacheNotFound, ValueError):  # nothing was ever fetched; a file in its place
        return
    except OSError as error:
        raise ModelError(f"the hub's cache can't be read: {error.strerror or error}") from error
    for repo in found.repos:
        if repo.repo_type == "model":
            yield Cached(repo.repo_id, "hub", "", repo.size_on_disk, repo.last_accessed, repo.repo_path)


def _quantised(folder: Path) -> Iterator[Cached]:
    for manifest in folder.glob(f"[!.]*/{MANIFEST}"):
        entry = manifest.parent
        try:
            of = json.loads(manifest.read_text(encoding="utf-8")).get("of", "")
        except (OSError, ValueError, AttributeError, RecursionError):
            of = ""
        try:
            nbytes = sum(path.stat().st_size for path in entry.iterdir())
            used_s = manifest.stat().st_mtime
        except OSError:  # just dropped by another process
            continue
        yield Cached(f"isq-{entry.name[:_KEY_CHARS]}", "isq", of if isinstance(of, str) else "", nbytes, used_s, entry)
