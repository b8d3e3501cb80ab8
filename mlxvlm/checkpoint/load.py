"""A model's name -> everything the engine needs. Knows the order of loading, not its parts.

Source of the defaults' precedence: transformers reads generation_config.json first, then config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from mlxvlm.checkpoint.hub import resolve
from mlxvlm.errors import ModelNotFoundError, UsageError
from mlxvlm.families import NONSENSE, Family, family_of, senseless
from mlxvlm.processors.base import Processor
from mlxvlm.processors.files import ProcessorFiles, context_length, read_json, template_file

if TYPE_CHECKING:
    from mlxvlm.checkpoint.conversion import Conversion, Shrink
    from mlxvlm.checkpoint.packed import QuantSpec
    from mlxvlm.models.shares import Share

Progress: TypeAlias = Callable[[int, int], None]  # bytes done, bytes in all

GGUF, UQFF = ".gguf", ".uqff"
REQUANTIZE = "8@32"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint itself says about generating; requests override it."""

    eos_token_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
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
            min_p=float(generation.get("min_p") or 0.0),
            typical_p=float(generation.get("typical_p") or 1.0),
            repetition_penalty=float(generation.get("repetition_penalty") or 1.0),
        )


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How the weights become a model. Names as users give them: they are looked up where MLX is.

    isq: a type's name (see docs/quantisation.md); isq_tower: the vision tower's layers too; topology: a YAML file of
    types by layer. isq_cache: the folder that keeps what was quantised, None for none. requantize: what tensors of GGUF
    and UQFF files become where MLX has no exact form for them, "none" for 16 bits.
    """

    dtype: str = "auto"
    isq: str | int | None = None
    isq_tower: bool = False
    topology: Path | None = None
    isq_cache: Path | None = None
    requantize: str = REQUANTIZE


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
    # Of weights that are no safetensors: what has no exact form becomes the type given; see Conversion for the others.
    read: Callable[[QuantSpec | None, Progress, Shrink | None], Conversion] | None = None
    files: tuple[Path, ...] = ()  # that `read` reads; else the folder's safetensors

    def identity(self, options: LoadOptions) -> str:
        """Tells this model, loaded like this, from all others, for what outlives the process. Raises ModelError."""
        from mlxvlm.checkpoint.build import identity

        return identity(self, options)

    def build(self, options: LoadOptions, progress: Any, share: Share | None = None) -> Any:
        """The model with its weights. Runs on the thread that will use it: lazy arrays don't cross threads.

        share: what this machine has of a model that several share; None for all of it.
        """
        from mlxvlm.checkpoint.build import build

        return build(self, options, progress, share)


def is_packed(path: Path) -> bool:
    """Whether a file, or all weights of a folder, are of llama.cpp or mistral.rs."""
    if not path.is_dir():
        return path.suffix.lower() in (GGUF, UQFF)
    is_there = any(any(path.glob(f"*{suffix}")) for suffix in (GGUF, UQFF))
    return is_there and not any(path.glob("model*.safetensors"))


def open_model(
    name: str,
    *,
    revision: str | None = None,
    chat_template: Path | None = None,
    mmproj: Path | None = None,
    from_uqff: str | None = None,
    arch: Collection[str] = (),
) -> ModelSource:
    """Finds a model and reads its small files; no MLX is imported yet, but for GGUF and UQFF files.

    mmproj: the picture half of a GGUF model. from_uqff: UQFF files to take the weights from, see uqff_files.find.
    arch: the model types that it may be of, none for any. Raises ModelError and its kinds, UsageError.
    """
    source = _open(name, revision, chat_template, mmproj, from_uqff)
    model_type = source.config["model_type"]
    if arch and model_type not in arch:
        raise UsageError(f"--arch stands for {' or '.join(arch)}, but {name} is {model_type}: leave --arch out")
    return source


def _open(
    name: str, revision: str | None, chat_template: Path | None, mmproj: Path | None, from_uqff: str | None
) -> ModelSource:
    is_gguf = name.lower().endswith(GGUF) and not Path(name).expanduser().is_dir()
    if from_uqff is not None and (is_gguf or mmproj is not None):
        raise UsageError("GGUF and UQFF files are no parts of one model: leave --from-uqff, or -m's file, out")
    if mmproj is not None or is_gguf:
        return _open_gguf(name, Path(name).expanduser(), mmproj, chat_template)
    if from_uqff is not None:
        return _open_uqff(name, from_uqff, revision, chat_template)
    folder = resolve(name, revision)
    # Repositories of GGUF files often have the original's config.json.
    if any(folder.glob(f"*{GGUF}")) and not any(folder.glob("*.safetensors")):
        return _open_gguf(name, folder, None, chat_template)
    if any(folder.glob(f"*{UQFF}")) and not any(folder.glob("model*.safetensors")):
        return _open_uqff(name, str(folder), revision, chat_template)
    return _open_folder(name, folder, chat_template)


def _open_folder(name: str, folder: Path, chat_template: Path | None) -> ModelSource:
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


def _open_uqff(name: str, from_uqff: str, revision: str | None, chat_template: Path | None) -> ModelSource:
    from mlxvlm.checkpoint.uqff import has_residual, read
    from mlxvlm.checkpoint.uqff_files import find

    files = find(from_uqff, name, revision)
    # Without a residual, what is not in the files comes from the base model.
    folder = resolve(name, revision, weights=not has_residual(files))
    base = folder if any(folder.glob("model*.safetensors")) else None
    source = _open_folder(name, folder, chat_template)
    return replace(
        source,
        read=lambda requantize, progress, shrink: read(files, folder, base, requantize, progress),
        files=(*files, *([] if base is None else sorted(base.glob("model*.safetensors")))),
    )


def _open_gguf(name: str, path: Path, mmproj: Path | None, chat_template: Path | None) -> ModelSource:
    """A text model's GGUF file, or a folder that holds one and perhaps its mmproj."""
    from mlxvlm.checkpoint.llama_cpp.load import find, open_gguf

    if path.is_dir():
        if not any(path.glob(f"*{GGUF}")):
            raise UsageError(f"{path} holds no GGUF file, and --mmproj is the picture half of one")
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
    paths = tuple(path for path, _ in model.recipes)
    return ModelSource(name, folder, model.config, family, processor, defaults, max_context, model.read, paths)
