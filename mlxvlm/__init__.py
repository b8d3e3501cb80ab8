"""Vision-language models on Apple Silicon through MLX. Public names are imported when first used.

import mlxvlm
with mlxvlm.load("demo") as engine:
    answer = engine.generate(mlxvlm.Request([mlxvlm.user("What is this?", ["picture.png"])]))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxvlm.engine.engine import Engine
    from mlxvlm.engine.params import Grammar, SamplingParams
    from mlxvlm.engine.request import Completion, Delta, Request, TokenLogprob, Usage
    from mlxvlm.engine.stream import Stream
    from mlxvlm.errors import MlxvlmError
    from mlxvlm.messages import ImageOptions, ImagePart, Message, TextPart, ToolCall, assistant, system, user
    from mlxvlm.runner import load

__version__ = "0.1.0"

_HOMES = {
    "Completion": "engine.request",
    "Delta": "engine.request",
    "Engine": "engine.engine",
    "Grammar": "engine.params",
    "ImageOptions": "messages",
    "ImagePart": "messages",
    "Message": "messages",
    "MlxvlmError": "errors",
    "Request": "engine.request",
    "SamplingParams": "engine.params",
    "Stream": "engine.stream",
    "TextPart": "messages",
    "TokenLogprob": "engine.request",
    "ToolCall": "messages",
    "Usage": "engine.request",
    "assistant": "messages",
    "load": "runner",
    "system": "messages",
    "user": "messages",
}

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "Grammar",
    "ImageOptions",
    "ImagePart",
    "Message",
    "MlxvlmError",
    "Request",
    "SamplingParams",
    "Stream",
    "TextPart",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "__version__",
    "assistant",
    "load",
    "system",
    "user",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxvlm' has no attribute {name!r}")
    return getattr(import_module(f"mlxvlm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
