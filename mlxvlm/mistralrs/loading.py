"""A `Which` and a Runner's options -> an engine, and another engine of the same model. Knows no requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxvlm.checkpoint.build import recipe_of
from mlxvlm.checkpoint.hub import fetch, is_on_disk
from mlxvlm.checkpoint.load import LoadOptions, ModelSource, open_model
from mlxvlm.engine.config import EngineOptions
from mlxvlm.engine.engine import Engine
from mlxvlm.errors import UsageError
from mlxvlm.mistralrs.architectures import check_architecture
from mlxvlm.mistralrs.choices import value_of
from mlxvlm.mistralrs.options import RunnerOptions
from mlxvlm.mistralrs.which import GGUF, AnyWhich
from mlxvlm.runner import cache_folder, start


class LoadableModel:
    """A checkpoint whose small files are read, which can be loaded and loaded again in other types."""

    def __init__(self, which: AnyWhich, options: RunnerOptions) -> None:
        """Raises UsageError, ModelError and its kinds."""
        self.options = LoadOptions(
            value_of(which.dtype),
            options.get("in_situ_quant"),
            topology=None if which.topology is None else Path(which.topology),
            isq_cache=cache_folder(options.get("isq_cache", True)),
        )
        recipe_of(self.options)
        self._source = _opened(which, options)
        check_architecture(which.arch, self.name, self._source.config)
        self._progress = options.get("progress")
        self._max_memory_bytes = options.get("max_memory_bytes")
        draft = options.get("draft_model")
        self._draft = None if draft is None else open_model(draft)
        self._engine: EngineOptions = {"max_rows": options.get("max_seqs", 16)}
        for name in ("kv_bits", "context_shift", "max_draft_tokens"):
            if name in options:
                self._engine[name] = options[name]

    @property
    def name(self) -> str:
        return self._source.name

    def requantized(self, type: str | int) -> LoadOptions:
        """The options with another type of in-situ quantisation. Raises UsageError for one that is not known."""
        options = replace(self.options, isq=type)
        recipe_of(options)
        return options

    def load(self, options: LoadOptions | None = None) -> Engine:
        """Raises ModelError and its kinds."""
        options = options or self.options
        return start(self._source, options, self._progress, self._max_memory_bytes, self._draft, **self._engine)


def _opened(which: AnyWhich, options: RunnerOptions) -> ModelSource:
    template = options.get("jinja_explicit") or options.get("chat_template")
    chat_template = None if template is None else Path(template)
    if isinstance(which, GGUF):
        files = [which.quantized_filename, *([] if which.mmproj_filename is None else [which.mmproj_filename])]
        names = [_first(name) for name in files]
        model, *mmproj = _paths(which.quantized_model_id, names, options.get("hf_revision"))
        return open_model(str(model), chat_template=chat_template, mmproj=mmproj[0] if mmproj else None)
    uqff: Any = which.from_uqff
    return open_model(
        which.model_id,
        revision=options.get("hf_revision"),
        chat_template=chat_template,
        from_uqff=";".join(uqff) if isinstance(uqff, list) else uqff,
    )


def _first(name: str | list[str]) -> str:
    """Parts of a file are found beside the first."""
    names = [name] if isinstance(name, str) else name
    if not names:
        raise UsageError("Which.GGUF needs quantized_filename, the name of a .gguf file")
    return names[0]


def _paths(folder: str, names: list[str], revision: str | None) -> list[Path]:
    root = Path(folder).expanduser() if is_on_disk(folder) else fetch(folder, names, revision)
    return [root / name for name in names]
