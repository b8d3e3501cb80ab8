"""Renders a checkpoint's Jinja chat template. Knows no family: each processor passes messages in the shape it needs.

Source: transformers `utils/chat_template_utils.py` (environment, filters, globals).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxvlm.errors import ModelError, TemplateError

# What a template's expressions raise while they run.
_RENDER_ERRORS = (TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RecursionError, MemoryError)


_PROBE = "mlxvlm-probe-text"  # what no template says of itself


_PROBE_CALL = {"type": "function", "id": "callprobe", "function": {"name": _PROBE, "arguments": {_PROBE: True}}}
_CALLING = (
    {"role": "user", "content": _PROBE},
    {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
)


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only passes its content through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateDict:
    """`dict(...)` inside templates, without the attributes of the real type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=TemplateDict())
    return environment


class ChatTemplate:
    """A compiled template with the special tokens it may name (bos_token ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:  # the last two: from Python's compiler
            raise ModelError(f"the chat template has a syntax error: {_reason(error)}") from error

    @cached_property
    def takes_strings(self) -> bool:
        """Whether a turn's content must be text: the template prints it as it is, which of a list is Python's repr.

        Found by rendering one turn both ways, because templates reach the content by many names and filters.
        """
        parts = [{"type": "text", "text": _PROBE}]
        if _PROBE not in (self._probe(_PROBE) or ""):
            return False
        with_parts = self._probe(parts)
        # Templates that join content to other text with "+" fail on a list.
        return with_parts is None or repr(parts) in with_parts

    @cached_property
    def takes_argument_text(self) -> bool:
        """Whether a call's arguments must be JSON text: the template prints them as they are."""
        with_object = self._tried(_CALLING)
        if with_object is None:  # such templates join them to other text with "+"
            return self._tried([_with_argument_text(turn) for turn in _CALLING]) is not None
        return repr({_PROBE: True}) in with_object

    def _probe(self, content: Any) -> str | None:
        """One turn rendered."""
        return self._tried([{"role": "user", "content": content}])

    def _tried(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """None where the template refuses these messages."""
        try:
            return self._render(messages, None)
        except TemplateError:
            return None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt text, ending where the assistant's turn begins. Raises TemplateError with the template's words.

        The arguments of calls are given as objects; a template that wants text gets JSON text.
        """
        if any(message.get("tool_calls") for message in messages) and self.takes_argument_text:
            messages = [_with_argument_text(message) for message in messages]
        return self._render(messages, variables)

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None) -> str:
        context = {"add_generation_prompt": True, **self.special_tokens, **(variables or {})}
        try:
            return self._template.render(messages=messages, **context)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses these messages: {_reason(error)}") from error
        except _RENDER_ERRORS as error:
            kind = type(error).__name__
            raise TemplateError(f"the chat template fails on these messages: {kind}: {_reason(error)}") from error


def _with_argument_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": _tojson(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _reason(error: Exception) -> str:
    """The error's words on one line."""
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    words = getattr(error, "message", None) or getattr(error, "msg", None) or str(error) or type(error).__name__
    return " ".join(words.split()) + (f" (line {line})" if line else "")
