"""mistral.rs's names of architectures -> the model types of checkpoints. Beside families.py, what names a family."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from mlxvlm.errors import UsageError


class VisionArchitecture(Enum):
    """The architectures of vision-language models that run here, with mistral.rs's values."""

    LLaVANext = "llava-next"
    LLaVA = "llava"
    VLlama = "vllama"
    Qwen2VL = "qwen2vl"
    Idefics3 = "idefics3"
    Llama4 = "llama4"


MultimodalArchitecture = VisionLoaderType = MultimodalLoaderType = VisionArchitecture  # its other names


class Architecture(Enum):
    """The architectures of text models that run here."""

    Mistral = "mistral"
    Llama = "llama"
    Qwen2 = "qwen2"


_MODEL_TYPES: Mapping[Enum, tuple[str, ...]] = {
    VisionArchitecture.LLaVANext: ("llava_next",),
    VisionArchitecture.LLaVA: ("llava",),
    VisionArchitecture.VLlama: ("mllama",),
    VisionArchitecture.Qwen2VL: ("qwen2_vl",),
    VisionArchitecture.Idefics3: ("idefics3", "smolvlm"),
    VisionArchitecture.Llama4: ("llama4",),
    Architecture.Mistral: ("mistral",),
    Architecture.Llama: ("llama",),
    Architecture.Qwen2: ("qwen2",),
}


ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    str(arch.value).replace("-", "_"): types for arch, types in _MODEL_TYPES.items()
}  # as its command line writes them


def model_types(name: str) -> tuple[str, ...]:
    """Of an architecture as mistral.rs's command line writes it. Raises UsageError naming all of them."""
    types = ARCHITECTURES.get(name.lower().replace("-", "_"))
    if types is None:
        raise UsageError(f"there is no architecture {name[:40]!r}: there are {', '.join(ARCHITECTURES)}")
    return types


def check_architecture(arch: Enum | None, model: str, config: Mapping[str, Any]) -> None:
    """Raises UsageError unless a checkpoint's config is of that architecture; None is any."""
    if arch is None:
        return
    if arch not in _MODEL_TYPES:
        raise UsageError(f"arch takes a VisionArchitecture or an Architecture, not {arch!r}: or leave it out")
    model_type = config.get("model_type")
    if model_type in _MODEL_TYPES[arch]:
        return
    right = next((str(each) for each, types in _MODEL_TYPES.items() if model_type in types), "none")
    raise UsageError(
        f"{model} is no {arch}: its model_type is {model_type!r}; leave arch out, or give the right one: {right}"
    )
