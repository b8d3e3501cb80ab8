"""Tools, and the forms that an answer can be bound to. Knows their shape, not what models make of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, Tag

from mlxvlm.api.base import Body, by, one_of, text_or
from mlxvlm.engine.params import MAX_GRAMMAR_CHARS

MAX_TOOLS = 128  # OpenAI's limit
NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"  # OpenAI's rule for functions and schemas
MAX_DESCRIPTION_CHARS = 16_384

_Name: TypeAlias = Annotated[str, Field(pattern=NAME_PATTERN)]
_FUNCTIONS_ONLY = {"custom": "give a function tool whose parameters are a JSON schema"}


class Function(Body):
    """A function that the model may ask for."""

    name: _Name
    description: str | None = Field(None, max_length=MAX_DESCRIPTION_CHARS)
    parameters: dict[str, Any] = Field(default_factory=dict, description="JSON schema of the arguments.")
    strict: bool | None = Field(None, description="Arguments are bound to the schema exactly.")


class _FunctionTool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of one of the request's functions."""

    name: _Name


class _NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


Tool: TypeAlias = Annotated[_FunctionTool, one_of("type", "function", remedies=_FUNCTIONS_ONLY)]
NamedTool: TypeAlias = Annotated[_NamedTool, one_of("type", "function", remedies=_FUNCTIONS_ONLY)]


class AllowedTools(Body):
    """Some of the request's tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)


class _AllowedChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_ToolObject: TypeAlias = Annotated[
    Annotated[_NamedTool, Tag("<function>")] | Annotated[_AllowedChoice, Tag("<allowed_tools>")],
    by("type"),
    one_of("type", "function", "allowed_tools", remedies=_FUNCTIONS_ONLY),
]
ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[_ToolObject, Tag("<object>")],
    text_or("object"),
]


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """What the answer's JSON must be."""

    name: _Name = Field(description="Ignored: the schema alone binds the answer.")
    description: str | None = Field(None, max_length=MAX_DESCRIPTION_CHARS)
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="The schema; left out: any JSON object.")
    strict: bool | None = Field(
        None, description="true: keywords that can't be enforced are errors; else they are passed over."
    )


class JsonSchemaFormat(Body):
    """JSON after a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by("type"),
    one_of("type", "text", "json_object", "json_schema"),
]


class GrammarFormat(Body):
    """What the whole answer must look like."""

    type: Literal["regex", "lark", "json_schema", "llguidance"]
    value: Annotated[
        Annotated[Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)], Tag("<text>")]
        | Annotated[dict[str, Any], Tag("<object>")],
        text_or("object"),
    ] = Field(description="Text; for json_schema and llguidance also an object.")
