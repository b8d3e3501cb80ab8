"""mistral.rs's enumerations, and how what is not there is refused. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from mlxvlm.errors import UsageError


class ModelDType(Enum):
    """The number format of weights."""

    Auto = "auto"
    BF16 = "bfloat16"
    F16 = "float16"
    F32 = "float32"


class IsqOrganization(Enum):
    """Which layers in-situ quantisation takes."""

    Default = "default"


class IsqType(Enum):
    """Types of in-situ quantisation; docs/quantisation.md says what each becomes."""

    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q8_1 = "Q8_1"
    Q2K = "Q2K"
    Q3K = "Q3K"
    Q4K = "Q4K"
    Q5K = "Q5K"
    Q6K = "Q6K"
    Q8K = "Q8K"
    HQQ4 = "HQQ4"
    HQQ8 = "HQQ8"
    F8E4M3 = "FP8"
    AFQ2 = "AFQ2"
    AFQ3 = "AFQ3"
    AFQ4 = "AFQ4"
    AFQ6 = "AFQ6"
    AFQ8 = "AFQ8"
    MXFP4 = "MXFP4"


class ToolChoice(Enum):
    """Whether tools may be called."""

    NoTools = "none"
    Auto = "auto"


class TextMessageRole(Enum):
    """Who speaks."""

    User = "user"
    Assistant = "assistant"
    System = "system"


class SearchContextSize(Enum):
    """How much of the web's pages the model reads."""

    Low = "low"
    Medium = "medium"
    High = "high"


def refuse(owner: str, given: Mapping[str, Any], remedies: Mapping[str, str]) -> None:
    """Raises UsageError for the first of `given` that is set and can't be honoured; None and False are not set."""
    for name, remedy in remedies.items():
        if given.get(name) not in (None, False):
            raise UsageError(f"{owner} can't take {name}: {remedy}")


def value_of(choice: Any) -> Any:
    """Of a member of an enumeration; plain values are taken as they are."""
    return choice.value if isinstance(choice, Enum) else choice
