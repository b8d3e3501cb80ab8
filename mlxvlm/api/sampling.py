"""The fields that say how tokens are chosen and when an answer ends: the same for every endpoint of OpenAI's shape.

A field that is left out, or null, is as the checkpoint's generation_config.json has it, or switched off.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import Field, Tag

from mlxvlm.api.base import Body, text_or
from mlxvlm.api.tools import GrammarFormat
from mlxvlm.engine.params import MAX_STOP_STRINGS, RANGES

MAX_STOP_CHARS = 256  # of one stop string: each new token is compared with all of them
MAX_LOGIT_BIAS = 4096
MAX_TOKENS = 1 << 31
MAX_TOP_K = 1 << 20  # no vocabulary has more entries
MAX_AREA_PIXELS = 1 << 28
MAX_TIMEOUT_S = 86_400.0
MAX_CHOICES = 16

_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_TokenId: TypeAlias = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
_Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]


def _ranged(name: str, description: str) -> Any:
    low, high = RANGES[name]
    return Field(None, ge=low, le=high, description=description)


class SamplingFields(Body):
    """How tokens are chosen, and when an answer ends."""

    temperature: float | None = _ranged("temperature", "0 always takes the likeliest token; higher is more random.")
    top_p: float | None = _ranged("top_p", "Only the likeliest tokens that together have this probability; 1 is off.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="How many answers; the i-th has the seed `seed + i`.")
    stop: (
        Annotated[
            Annotated[_Stop, Tag("<text>")]
            | Annotated[Annotated[list[_Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)], Tag("<list>")],
            text_or("list"),
        ]
        | None
    ) = Field(None, description="The answer ends before the first of these strings.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**64, description="The same seed and request give the same answer; left out: random."
    )
    presence_penalty: float | None = _ranged("presence_penalty", "Subtracted from tokens that the answer has already.")
    frequency_penalty: float | None = _ranged(
        "frequency_penalty", "Subtracted from a token for each time that the answer has it."
    )
    logit_bias: dict[_TokenId, _Bias] | None = Field(
        None, max_length=MAX_LOGIT_BIAS, description="Added to tokens' logits: {'token id': -100 to 100}."
    )
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K, description="Extension. Only the k likeliest tokens; 0 is off.")
    min_p: float | None = _ranged(
        "min_p", "Extension. Only tokens at least this probable, as a part of the likeliest one's; 0 is off."
    )
    typical_p: float | None = _ranged("typical_p", "Extension. Locally typical sampling; 1 is off.")
    xtc_probability: float | None = _ranged(
        "xtc_probability", "Extension. How often XTC drops the likeliest tokens; 0 is off."
    )
    xtc_threshold: float | None = _ranged("xtc_threshold", "Extension. XTC drops tokens likelier than this, but one.")
    repetition_penalty: float | None = _ranged(
        "repetition_penalty", "Extension. Divides the logits of tokens of the prompt and the answer; 1 is off."
    )
    dry_multiplier: float | None = _ranged("dry_multiplier", "Extension. Strength of DRY against loops; 0 is off.")
    dry_base: float | None = _ranged("dry_base", "Extension. How DRY's penalty grows with a repetition's length.")
    dry_allowed_length: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Extension. Repetitions up to this many tokens are free."
    )
    dry_sequence_breakers: list[_Stop] | None = Field(
        None,
        max_length=MAX_STOP_STRINGS,
        fail_fast=True,
        description="Extension. Strings that no repetition reaches across.",
    )
    ignore_eos: bool | None = Field(None, description="Extension. The model's end token does not end the answer.")
    grammar: GrammarFormat | None = Field(
        None, description="Extension. What the answer must look like: a grammar instead of response_format."
    )
    min_pixels: int | None = Field(
        None, ge=1, le=MAX_AREA_PIXELS, description="Extension. Smallest area of a picture, where the model resizes."
    )
    max_pixels: int | None = Field(
        None, ge=1, le=MAX_AREA_PIXELS, description="Extension. Largest area of a picture, where the model resizes."
    )
    timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="Extension. Seconds after which the answer ends with what there is (finish_reason `length`), "
        "and where there is nothing yet with status 504.",
    )
    return_token_ids: bool | None = Field(
        None, description="Extension. Adds `prompt_token_ids` to the answer and `token_ids` to each choice."
    )
