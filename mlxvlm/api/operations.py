"""Bodies of what is asked of a model beside answers: tokens, loading, quantisation. Knows no HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, Tag

from mlxvlm.api.base import Body, text_or
from mlxvlm.api.messages import MAX_MESSAGES, ChatMessage
from mlxvlm.api.schema import MAX_MODEL_CHARS, MAX_TEMPLATE_VARIABLES
from mlxvlm.api.tools import MAX_TOOLS, Tool

MAX_TOKEN_IDS = 1 << 20
MAX_TYPE_CHARS = 64
MAX_TEXT_CHARS = 1 << 20

_Model: TypeAlias = Annotated[str, Field(max_length=MAX_MODEL_CHARS)]
_MODEL = "A name of /v1/models, or `default`."


class TokenizeRequest(Body):
    """A text, or a chat whose prompt is to be looked at."""

    model: _Model = Field("default", description=_MODEL)
    text: str | None = Field(None, max_length=MAX_TEXT_CHARS, description="A text as it is.")
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True, description="Or a chat, as for chat completions."
    )
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True, description="With messages.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=MAX_TEMPLATE_VARIABLES, description="With messages: more variables for the chat template."
    )
    add_special_tokens: bool | None = Field(
        None, description="With text: begin as the tokenizer does, with BOS for example; left out: true."
    )


class Tokens(BaseModel):
    """What a model reads; `count` is what a prompt's usage says, placeholders of pictures expanded."""

    model: str
    count: int
    tokens: list[int]
    texts: list[str] = Field(description="Each token's text; a piece of a character has U+FFFD.")
    max_context: int


class DetokenizeRequest(Body):
    """Token ids to be read."""

    model: _Model = Field("default", description=_MODEL)
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = Field(
        max_length=MAX_TOKEN_IDS, fail_fast=True, description="Token ids."
    )
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out; left out: true.")


class Text(BaseModel):
    """What token ids say."""

    model: str
    text: str


class ModelRequest(Body):
    """Names a model."""

    model: _Model | None = Field(None, description=_MODEL)
    model_id: _Model | None = Field(None, description="The same, as mistral.rs calls it.")


class ModelState(BaseModel):
    """What has become of a model."""

    id: str
    object: Literal["model"] = "model"
    status: str = Field(description="loaded, loading, unloaded or failed.")
    isq: str | None = Field(description="How it is quantised while it is loaded.")


class IsqRequest(Body):
    """A model to be quantised otherwise. One of the two."""

    model: _Model = Field("default", description=_MODEL)
    ggml_type: Annotated[str, Field(min_length=1, max_length=MAX_TYPE_CHARS)] | None = Field(
        None, description="As mistral.rs has it: Q4K, Q8_0, AFQ4 ...; docs/quantisation.md."
    )
    isq: (
        Annotated[
            Annotated[Annotated[str, Field(min_length=1, max_length=MAX_TYPE_CHARS)], Tag("<text>")]
            | Annotated[Annotated[int, Field(ge=1, le=32)], Tag("<number>")],
            text_or("number"),
        ]
        | None
    ) = Field(None, description="The same as --isq: 2 to 8, 4@32, Q4K ...; `none` for as it is stored.")


class Health(BaseModel):
    """Whether the first model is loaded."""

    status: Literal["ok", "loading"]
