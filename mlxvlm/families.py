"""model_type in config.json -> (module in processors/, module in models/). Nothing else names a family."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from mlxvlm.errors import ModelError, UnsupportedModelError

# What a config with wrong values raises in the code that reads it.
NONSENSE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

_LAYERS = ("num_hidden_layers", "num_global_layers", "depth")
_MAX_LAYERS = 1000  # the deepest models have some 130


class Family(NamedTuple):
    """Where a model type is implemented: `mlxvlm.processors.<processor>` and `mlxvlm.models.<model>`."""

    processor: str
    model: str

    def processor_module(self) -> ModuleType:
        return import_module(f"mlxvlm.processors.{self.processor}")

    def model_module(self) -> ModuleType:
        return import_module(f"mlxvlm.models.{self.model}")

    def build_model(self, config: dict[str, Any]) -> Any:
        """The VisionLanguageModel of a config.json, its weights not evaluated. Raises ModelError."""
        try:
            _check_depth(config)
            return self.model_module().build(config)
        except NONSENSE as error:
            raise senseless("config.json", error) from error


def _check_depth(config: dict[str, Any]) -> None:
    """Layers are made before their tensors are looked for: too many would take all memory first."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for name in _LAYERS:
            count = part.get(name) if isinstance(part, dict) else None
            if isinstance(count, int) and count > _MAX_LAYERS:
                raise ValueError(f"{name} is above {_MAX_LAYERS}")


def senseless(source: object, error: Exception) -> ModelError:
    """The error for a config whose values made `error`."""
    reason = (str(error).splitlines() or [""])[0]
    return ModelError(f"{source} makes no sense: {type(error).__name__}: {reason}")


FAMILIES: dict[str, Family] = {
    "idefics3": Family("idefics3", "idefics3"),
    "llama": Family("text_only", "text_only"),
    "llama4": Family("llama4", "llama4"),
    "llava": Family("llava", "llava"),
    "llava_next": Family("llava", "llava"),
    "mistral": Family("text_only", "text_only"),
    "mllama": Family("mllama", "mllama"),
    "qwen2": Family("text_only", "text_only"),
    "qwen2_vl": Family("qwen2_vl", "qwen2_vl"),
    "smolvlm": Family("idefics3", "idefics3"),
}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a parsed config.json; UnsupportedModelError lists what is supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; supported: {supported}")
    return FAMILIES[model_type]
