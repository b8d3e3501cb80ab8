"""What a tool is and what a call of it looks like, whatever the model writes. Knows no format."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from mlxvlm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask for.

    parameters: a JSON schema of an object. strict: its arguments must follow the schema even where the model is free
    to call or not, and a keyword of the schema that can't be enforced is an error.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def as_template(self) -> dict[str, Any]:
        """The shape that chat templates read, which is OpenAI's."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The choice of one function, which must be called."""

    name: str


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call: the first of each `index` has the name, `arguments` of all of them join to JSON text."""

    index: int
    id: str
    name: str | None
    arguments: str


def new_call_id() -> str:
    """Unique without a counter, so that answers of different servers can be mixed."""
    return f"call_{secrets.token_hex(12)}"


def allowed(tools: Sequence[Tool], choice: ToolChoice) -> tuple[Tool, ...]:
    """The tools that may be called. Raises UsageError for a choice that names none of them."""
    if choice == "none":
        return ()
    if isinstance(choice, NamedTool):
        found = tuple(tool for tool in tools if tool.name == choice.name)
        if not found:
            raise UsageError(f"tool_choice names the function {choice.name!r}, which is not among the tools")
        return found
    if choice == "required" and not tools:
        raise UsageError("tool_choice is 'required', but there are no tools")
    return tuple(tools)
