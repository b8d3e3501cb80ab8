"""Vision-language models on Apple Silicon through MLX. Public names are imported when first used.

>>> import mlxvlm
>>> with mlxvlm.load("demo") as engine:
...     answer = engine.generate("What is this?", images=["examples/pictures/pink-heart.png"], max_tokens=50)
>>> answer.text
' A pink heart on a gray background.'
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
    from mlxvlm.mistralrs.architectures import (
        Architecture,
        MultimodalArchitecture,
        MultimodalLoaderType,
        VisionArchitecture,
        VisionLoaderType,
    )
    from mlxvlm.mistralrs.builders import (
        MultimodalMessages,
        MultimodalModelBuilder,
        RequestBuilder,
        TextMessages,
        TextModelBuilder,
        VisionMessages,
        VisionModelBuilder,
    )
    from mlxvlm.mistralrs.choices import (
        IsqOrganization,
        IsqType,
        ModelDType,
        SearchContextSize,
        TextMessageRole,
        ToolChoice,
    )
    from mlxvlm.mistralrs.requests import (
        ApproximateUserLocation,
        ChatCompletionRequest,
        CompletionRequest,
        WebSearchOptions,
    )
    from mlxvlm.mistralrs.runner import Runner
    from mlxvlm.mistralrs.which import Which
    from mlxvlm.runner import load

__version__ = "0.1.0"

_HOMES = {
    "ApproximateUserLocation": "mistralrs.requests",
    "Architecture": "mistralrs.architectures",
    "ChatCompletionRequest": "mistralrs.requests",
    "Completion": "engine.request",
    "CompletionRequest": "mistralrs.requests",
    "Delta": "engine.request",
    "Engine": "engine.engine",
    "Grammar": "engine.params",
    "ImageOptions": "messages",
    "ImagePart": "messages",
    "IsqOrganization": "mistralrs.choices",
    "IsqType": "mistralrs.choices",
    "Message": "messages",
    "MlxvlmError": "errors",
    "ModelDType": "mistralrs.choices",
    "MultimodalArchitecture": "mistralrs.architectures",
    "MultimodalLoaderType": "mistralrs.architectures",
    "MultimodalMessages": "mistralrs.builders",
    "MultimodalModelBuilder": "mistralrs.builders",
    "Request": "engine.request",
    "RequestBuilder": "mistralrs.builders",
    "Runner": "mistralrs.runner",
    "SamplingParams": "engine.params",
    "SearchContextSize": "mistralrs.choices",
    "Stream": "engine.stream",
    "TextMessageRole": "mistralrs.choices",
    "TextMessages": "mistralrs.builders",
    "TextModelBuilder": "mistralrs.builders",
    "TextPart": "messages",
    "TokenLogprob": "engine.request",
    "ToolCall": "messages",
    "ToolChoice": "mistralrs.choices",
    "Usage": "engine.request",
    "VisionArchitecture": "mistralrs.architectures",
    "VisionLoaderType": "mistralrs.architectures",
    "VisionMessages": "mistralrs.builders",
    "VisionModelBuilder": "mistralrs.builders",
    "WebSearchOptions": "mistralrs.requests",
    "Which": "mistralrs.which",
    "assistant": "messages",
    "load": "runner",
    "system": "messages",
    "user": "messages",
}

__all__ = [
    "ApproximateUserLocation",
    "Architecture",
    "ChatCompletionRequest",
    "Completion",
    "CompletionRequest",
    "Delta",
    "Engine",
    "Grammar",
    "ImageOptions",
    "ImagePart",
    "IsqOrganization",
    "IsqType",
    "Message",
    "MlxvlmError",
    "ModelDType",
    "MultimodalArchitecture",
    "MultimodalLoaderType",
    "MultimodalMessages",
    "MultimodalModelBuilder",
    "Request",
    "RequestBuilder",
    "Runner",
    "SamplingParams",
    "SearchContextSize",
    "Stream",
    "TextMessageRole",
    "TextMessages",
    "TextModelBuilder",
    "TextPart",
    "TokenLogprob",
    "ToolCall",
    "ToolChoice",
    "Usage",
    "VisionArchitecture",
    "VisionLoaderType",
    "VisionMessages",
    "VisionModelBuilder",
    "WebSearchOptions",
    "Which",
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
