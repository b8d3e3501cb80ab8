"""A model's name -> everything the engine needs. Knows the order of loading, not its parts.

Source of the defaults' precedence: transformers reads generation_config.json first, then config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mlxvlm.checkpoint.hub import resolve
from mlxvlm.errors import ModelNotFoundError
from mlxvlm.families import NONSENSE, Family, family_of, senseless
from mlxvlm.processors.base import Processor
from mlxvlm.processors.files import ProcessorFiles, context_length, read_json, template_file

_GGUF = ".gguf"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint itself says about generating; requests override it."""

    eos_token_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def from_configs(cls, generation: Mapping[str, Any], config: Mapping[str, Any]) -> GenerationDefaults:
        eos: Any = None
        for source in (generation, config, config.get("text_config") or {}):
            eos = source.get("eos_token_id")
            if eos is not None:
                break
        ids = frozenset(map(int, eos if isinstance(eos, list) else [] if eos is None else [eos]))
        if not generation.get("do_sample", False):
            return cls(ids)
        return cls(
            ids,
            temperature=float(generation.get("temperature") or 1.0),
            top_p=float(generation.get("top_p") or 1.0),
            top_k=int(generation.get("top_k") or 0),
            repetition_penalty=float(generation.get("repetition_penalty") or 1.0),
        )


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How the weights become a model. Names as users give them: they are looked up where MLX is.

    isq: a type's name (see docs/quantisation.md); isq_tower: the vision tower's layers too; topology: a YAML file of
    types by layer. isq_cache: the folder that keeps what was quantised, None for none.
    """

    dtype: str = "auto"
    isq: str | int | None = None
    isq_tower: bool = False
    topology: Path | None = None
    isq_cache: Path | None = None


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint whose small files are read and whose weights are not."""

    name: str
    folder: Path
    config: dict[str, Any]
    family: Family
    processor: Processor
    defaults: GenerationDefaults
    max_context: int
    read: Callable[[], dict[str, Any]] | None = None  # tensors that don't lie in `folder` as safetensors

    def build(self, options: LoadOptions, progress: Any) -> Any:
        """The model with its weights. Runs on the thread that will use it: lazy arrays don't cross threads."""
        from mlxvlm.checkpoint.build import build

        return build(self.folder, self.config, self.family, options, progress, self.read)


def open_model(
    name: str, *, revision: str | None = None, chat_template: Path | None = None, mmproj: Path | None = None
) -> ModelSource:
    """Finds a model and reads its small files; no MLX is imported yet, but for GGUF files.

    mmproj: the picture half of a GGUF model. Raises ModelError and its kinds.
    """
    if mmproj is not None or name.endswith(_GGUF):
        return _open_gguf(name, Path(name).expanduser(), mmproj, chat_template)
    folder = resolve(name, revision)
    # Repositories of GGUF files often have the original's config.json.
    if any(folder.glob(f"*{_GGUF}")) and not any(folder.glob("*.safetensors")):
        return _open_gguf(name, folder, None, chat_template)
    config = read_json(folder / "config.json")
    if not config:
        raise ModelNotFoundError(f"{folder} is no model: it has no config.json")
    family = family_of(config)
    try:
        files = ProcessorFiles.read(folder, config, chat_template)
        processor = cast(Processor, family.processor_module().build(files))
        max_context = context_length(config)
        defaults = GenerationDefaults.from_configs(read_json(folder / "generation_config.json"), config)
    except NONSENSE as error:
        raise senseless(f"a config in {folder}", error) from error
    return ModelSource(name, folder, config, family, processor, defaults, max_context)


def _open_gguf(name: str, path: Path, mmproj: Path | None, chat_template: Path | None) -> ModelSource:
    """A text model's GGUF file, or a folder that holds one and perhaps its mmproj."""
    from mlxvlm.checkpoint.llama_cpp.load import find, open_gguf

    if path.is_dir():
        path, found = find(path)
        mmproj = mmproj or found
    model = open_gguf(path, mmproj, None if chat_template is None else template_file(chat_template))
    family = family_of(model.config)
    try:
        processor = cast(Processor, family.processor_module().build(model.files))
        max_context = context_length(model.config)
        defaults = GenerationDefaults.from_configs({}, model.config)
    except NONSENSE as error:
        raise senseless(f"the metadata of {path}", error) from error
    folder = path.parent
    return ModelSource(name, folder, model.config, family, processor, defaults, max_context, model.weights)
