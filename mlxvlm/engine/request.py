"""What goes into the engine and what comes out. Plain values: no MLX, no threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from mlxvlm.engine.params import SamplingParams
from mlxvlm.messages import ImageOptions, Message
from mlxvlm.processors.base import AS_THE_CHECKPOINT, Prompt

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    sampling: None for what the checkpoint itself says. template: extra variables for its chat template.
    image_options: how its pictures are resized, for models that let a request choose.
    timeout_s: the answer ends after so many seconds with what there is, finish_reason "timeout"; None for the engine's.
    prompt: for callers that have run the processor themselves; of the messages only the system turn is then looked at.
    truncate: where the messages are too long for the context, the oldest exchanges after the system turn are dropped.
    """

    messages: Sequence[Message] = ()
    sampling: SamplingParams | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    image_options: ImageOptions = AS_THE_CHECKPOINT
    timeout_s: float | None = None
    prompt: Prompt | None = field(default=None, repr=False)
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of the model's probability of one token; `top` holds (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, and seconds from the moment the request was submitted."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    prepare_s: float  # template, tokenising, image decoding
    prompt_s: float  # vision and prefill, up to the first token
    completion_s: float  # from the first token to the last
    time_to_first_token_s: float
    total_s: float
    cached_tokens: int = 0  # of the prompt's, taken from the prefix cache
    drafted_tokens: int = 0  # guessed, to be checked several at once
    accepted_tokens: int = 0  # of the completion's, those that were guessed
    vision_s: float = 0.0  # of prompt_s: encoding pictures

    @property
    def prompt_tokens_per_s(self) -> float:
        """Of the tokens that had to be run."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def completion_tokens_per_s(self) -> float:
        """Decode speed: the first token belongs to the prompt's time."""
        steps = self.completion_tokens - 1
        return steps / self.completion_s if steps > 0 and self.completion_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. The last one has a finish_reason and the usage, and may have text too.

    stop_string: the one that ended the answer, where one did.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. token_ids includes the stop token that ended it, text does not."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage
