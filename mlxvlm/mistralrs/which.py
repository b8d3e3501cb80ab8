"""`Which`: the model that a Runner loads. Knows mistral.rs's arguments and what ours are called, nothing of loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from mlxvlm.errors import UsageError
from mlxvlm.mistralrs.architectures import Architecture, VisionArchitecture
from mlxvlm.mistralrs.choices import IsqOrganization, ModelDType, refuse

# Taken and passed over, with the reason.
IGNORED_ARGUMENTS: Mapping[str, str] = {
    "auto_map_params": "there is one device, whose memory the model shares with everything",
    "tok_model_id": "a GGUF file has its tokenizer in it",
    "encoder_cache_memory_bytes": "what is kept of pictures gives way to requests by itself",
}
REFUSED_ARGUMENTS: Mapping[str, str] = {
    "tokenizer_json": "put the file into the model's folder",
    "write_uqff": "run `mlxvlm quantize -m MODEL --isq TYPE --uqff -o FOLDER`",
    "max_edge": "make the pictures smaller, or give requests max_pixels (Qwen2-VL)",
    "calibration_file": "MLX's types are made without calibration: leave it out",
    "imatrix": "MLX's types are made without an importance matrix: leave it out",
    "hf_cache_path": "set the environment variable HF_HUB_CACHE",
    "matformer_config_path": "no model here is a MatFormer",
    "matformer_slice_name": "no model here is a MatFormer",
    "adapters": "merge the adapter into the weights first",
}
_REFUSED_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("XLora", "Lora", "XLoraGGUF", "LoraGGUF", "XLoraGGML", "LoraGGML"), "merge the adapter first"),
    "GGML": "convert the file to GGUF, and give Which.GGUF",
    "Embedding": "only models that answer with text run here",
    "DiffusionPlain": "only models that answer with text run here",
    "Speech": "only models that answer with text run here",
}


@dataclass(frozen=True)
class VisionPlain:
    """A vision-language model: a repository id, a folder or "demo". arch is checked, and may be left out."""

    model_id: str
    arch: VisionArchitecture | None = None
    tokenizer_json: str | None = None
    topology: str | None = None
    write_uqff: str | None = None
    from_uqff: str | list[str] | None = None
    dtype: ModelDType | str = ModelDType.Auto
    max_edge: int | None = None
    calibration_file: str | None = None
    imatrix: str | None = None
    hf_cache_path: str | None = None
    matformer_config_path: str | None = None
    matformer_slice_name: str | None = None
    organization: IsqOrganization | None = None
    encoder_cache_memory_bytes: int | None = None
    auto_map_params: Any = None


@dataclass(frozen=True)
class Plain:
    """A text model."""

    model_id: str
    arch: Architecture | None = None
    tokenizer_json: str | None = None
    topology: str | None = None
    organization: IsqOrganization | None = None
    write_uqff: str | None = None
    from_uqff: str | list[str] | None = None
    dtype: ModelDType | str = ModelDType.Auto
    imatrix: str | None = None
    calibration_file: str | None = None
    hf_cache_path: str | None = None
    matformer_config_path: str | None = None
    matformer_slice_name: str | None = None
    auto_map_params: Any = None


@dataclass(frozen=True)
class GGUF:
    """GGUF files in a folder or a repository: the text model's, and its picture half's as mmproj_filename."""

    quantized_model_id: str
    quantized_filename: str | list[str]
    tok_model_id: str | None = None
    topology: str | None = None
    dtype: ModelDType | str = ModelDType.Auto
    tokenizer_json: str | None = field(default=None, kw_only=True)
    mmproj_filename: str | list[str] | None = field(default=None, kw_only=True)
    organization: IsqOrganization | None = field(default=None, kw_only=True)
    write_uqff: str | None = field(default=None, kw_only=True)
    imatrix: str | None = field(default=None, kw_only=True)
    calibration_file: str | None = field(default=None, kw_only=True)
    max_edge: int | None = field(default=None, kw_only=True)
    adapters: list[Any] | None = field(default=None, kw_only=True)
    hf_cache_path: str | None = field(default=None, kw_only=True)
    encoder_cache_memory_bytes: int | None = field(default=None, kw_only=True)

    @property
    def arch(self) -> Enum | None:
        """A GGUF file says itself what it is."""
        return None


AnyWhich: TypeAlias = VisionPlain | Plain | GGUF


class _Kinds(type):
    """Refuses mistral.rs's other kinds by name."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            if name not in _REFUSED_KINDS:
                raise AttributeError(f"Which has no {name}: it has VisionPlain, MultimodalPlain, Plain and GGUF")

            def refused(*_: Any, **__: Any) -> NoReturn:
                raise UsageError(f"Which.{name} is not supported: {_REFUSED_KINDS[name]}")

            return refused


class Which(metaclass=_Kinds):
    """The kinds of models: Which.VisionPlain(model_id=..., arch=VisionArchitecture.Llama4)."""

    VisionPlain = VisionPlain
    MultimodalPlain = VisionPlain  # mistral.rs's later name of it
    Plain = Plain
    GGUF = GGUF


def check_which(which: Any) -> AnyWhich:
    """Raises UsageError for what is no model, or one with arguments that can't be honoured."""
    if not isinstance(which, AnyWhich):
        raise UsageError(f"which takes a model like Which.VisionPlain(model_id='...'), not {which!r}")
    refuse(f"Which.{type(which).__name__}", asdict(which), REFUSED_ARGUMENTS)
    return which
