"""Formats are chosen by what a template does; what they make of a conversation; what their grammars allow."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.agent.formats import NamedTool, Tool, ToolChoice, ToolFormat
from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.detokenizer import Detokenizer
from mlxvlm.errors import InputError, UsageError
from mlxvlm.messages import ImagePart, Message, TextPart, ToolCall, assistant, system, user
from mlxvlm.processors.base import turn_of_text
from mlxvlm.processors.chat_template import ChatTemplate
from mlxvlm.processors.tokenizer import Tokenizer
from tests.agent.templates import (
    ALL,
    ARGUMENT_TEXT,
    END,
    HERMES,
    LLAMA,
    LLAMA4,
    MISTRAL,
    NO_SYSTEM,
    PLAIN,
    TOKENIZER,
    format_of,
)
from tests.agent.test_parser import parsed
from tests.processors.checkpoints import byte_tokenizer

ADD = Tool("add", "Adds.", {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False})
SAY = Tool("say", "", {"properties": {"to": {"enum": ["Ann", "Bob"]}}, "required": ["to"]})
CALLS = (ToolCall("call_1", "add", '{"a": 1}'), ToolCall("call_2", "say", '{"to": "Ann"}'))
RESULTS = [Message("tool", (TextPart(text),), tool_call_id=f"call_{text}") for text in "12"]
CHAT = [user("Go."), Message("assistant", (), CALLS), *RESULTS, user("Thanks.")]


def rendered(source: str, messages: list[Message], tools: tuple[Tool, ...] = (), choice: ToolChoice = "auto") -> str:
    format = format_of(source)
    turns = [turn_of_text(message, message.parts, "") for message in format.messages(messages, tools, choice)]
    return ChatTemplate(source, {}).render(turns, format.variables(tools, choice))


class TestChoice:
    @pytest.mark.parametrize("name", ALL)
    def test_by_what_the_template_does(self, name: str) -> None:
        format = format_of(ALL[name])
        written = {
            "llama": '{"name": "add", "parameters": {"a": 1}}\n{"name": "say", "parameters": {"to": "Ann"}}',
            "llama4": '{"name": "add", "parameters": {"a": 1}}\n{"name": "say", "parameters": {"to": "Ann"}}',
            "mistral": (
                '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "say", "arguments": {"to": "Ann"}}]'
            ),
        }
        generic = "\n".join(
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>' for call in CALLS
        )
        assert format.render(CALLS) == written.get(name, generic)
        assert format.native == (name != "plain")
        assert format.style.parallel == (name != "llama")

    def test_white_space_is_the_templates(self) -> None:
        format = format_of(ARGUMENT_TEXT)
        assert format.native
        assert format.render(CALLS[:1]) == '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

    @pytest.mark.parametrize(
        "source",
        [
            PLAIN.replace("{% for", "{# <tool_call> [TOOL_CALLS] tools #}{% for"),
            HERMES.replace("{% for t in tools %}", "{% for t in [] %}"),  # renders calls, but describes no tools
            HERMES.replace('{"name": "{{', "<function={{"),  # a spelling that is not known here
            "{{ raise_exception('never') }}",
        ],
    )
    def test_what_does_not_know_tools_gets_plain_text(self, source: str) -> None:
        assert not format_of(source).native

    def test_special_tokens_are_made_visible(self) -> None:
        assert format_of(MISTRAL, TOKENIZER).visible_token_ids == {TOKENIZER.token_id("[TOOL_CALLS]")}
        assert len(format_of(LLAMA, TOKENIZER).visible_token_ids) == 3
        assert not format_of(HERMES, TOKENIZER).visible_token_ids
        assert not format_of(LLAMA).visible_token_ids
        # Qwen's <tool_call> is an added token, but decoded text has it.
        backend = byte_tokenizer()
        backend.add_tokens([tokenizers.AddedToken("<tool_call>", special=False)])
        assert not format_of(HERMES, Tokenizer(backend, {})).visible_token_ids


class TestMessages:
    def test_of_a_template_that_knows_tools(self) -> None:
        text = rendered(HERMES, CHAT, (ADD,))
        assert text == (
            '{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": '
            '{"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}}}\n'
            '<user>Go.<assistant>\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
            '{"name": "say", "arguments": {"to": "Ann"}}\n</tool_call><user><tool_response>1</tool_response>'
            "<user><tool_response>2</tool_response><user>Thanks."
        )

    def test_one_call_a_turn_where_the_template_takes_no_more(self) -> None:
        assert rendered(LLAMA, CHAT) == (
            '<user>Go.<assistant>{"name": "add", "parameters": {"a": 1}}<tool>1'
            '<assistant>{"name": "say", "parameters": {"to": "Ann"}}<tool>2<user>Thanks.'
        )
        assert rendered(LLAMA4, CHAT).count("<assistant>") == 1

    def test_results_of_no_call_are_kept(self) -> None:
        strange = Message("tool", (TextPart("3"),), tool_call_id="other")
        assert rendered(LLAMA, [*CHAT[:4], strange]).endswith("<tool>2<tool>3")

    def test_short_ids_where_the_template_wants_them(self) -> None:
        text = rendered(MISTRAL, CHAT)
        first, second = (part.split(":")[0] for part in text.split("[TOOL_RESULTS]")[1:])
        assert len(first) == len(second) == 9
        assert first != second
        kept = [Message("assistant", (), (ToolCall("abcdefgh1", "f", ""),)), Message("tool", tool_call_id="abcdefgh1")]
        assert "[TOOL_RESULTS]abcdefgh1:" in rendered(MISTRAL, kept)

    def test_arguments_as_text_where_the_template_joins_them(self) -> None:
        assert '"arguments": {"a": 1}}</tool_call>' in rendered(ARGUMENT_TEXT, CHAT)

    @pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', "{'a': 1}", "[" * 100_000])
    def test_arguments_that_are_no_object(self, arguments: str) -> None:
        with pytest.raises(InputError, match="the arguments of the call of 'f' are no JSON object"):
            rendered(HERMES, [Message("assistant", (), (ToolCall("1", "f", arguments),))])

    def test_no_arguments(self) -> None:
        assert '"arguments": {}}' in rendered(HERMES, [Message("assistant", (), (ToolCall("1", "f", ""),))])

    def test_in_plain_text(self) -> None:
        text = rendered(PLAIN, [system("Be brief."), *CHAT], (ADD,))
        assert text.startswith("<system>Be brief.\n\nYou can call functions")
        assert '\n{"type": "function", "function": {"name": "add"' in text
        assert text.endswith(
            '<user>Go.\n<assistant><tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
            '{"name": "say", "arguments": {"to": "Ann"}}\n</tool_call>\n<user><tool_response>\n1\n</tool_response>\n'
            "<tool_response>\n2\n</tool_response>\n<user>Thanks.\n"
        )
        assert rendered(PLAIN, [user("Hi")], (ADD,)).startswith("<system>You can call")

    def test_without_a_system_turn(self) -> None:
        text = rendered(NO_SYSTEM, [*CHAT[:4], assistant("Done.")], (ADD,))
        assert text.startswith("<user>You can call functions")
        assert "\n\nGo.\n<assistant>" in text

    def test_text_is_one_part(self) -> None:
        turns = format_of(PLAIN).messages([system("Be brief."), *CHAT], (ADD,), "auto")
        assert [len(turn.parts) for turn in turns] == [1] * 5

    def test_pictures_stay(self) -> None:
        turns = [Message("user", (ImagePart("a"), TextPart("?"))), Message("tool", (ImagePart("b"),))]
        found = format_of(PLAIN).messages(turns, (ADD,), "auto")
        assert [image.source for turn in found for image in turn.images] == ["a", "b"]
        assert found[1].role == "user"

    @pytest.mark.parametrize("name", ALL)
    def test_none(self, name: str) -> None:
        text = rendered(ALL[name], CHAT, (Tool("secret"),), "none")
        assert "secret" not in text
        assert "add" in text


class TestGrammar:
    def test_free(self) -> None:
        format = format_of(HERMES)
        assert format.grammar((ADD,), "auto") is None
        assert format.grammar((ADD,), "none") is None
        assert format.grammar((), "auto") is None

    def test_choices_that_can_not_be(self) -> None:
        format = format_of(HERMES)
        with pytest.raises(UsageError, match="'sub', which is not among the tools"):
            format.grammar((ADD,), NamedTool("sub"))
        with pytest.raises(UsageError, match="'required', but there are no tools"):
            format.variables((), "required")

    def test_a_strict_tool_must_be_enforceable(self) -> None:
        schema = {"properties": {"a": {"type": "string", "contains": 1}}}
        for strict in (True, False):
            grammar = format_of(HERMES).grammar((Tool("f", "", schema, strict),), "required")
            assert grammar is not None
            if strict:
                with pytest.raises(InputError, match="contains"):
                    CONSTRAINTS.compile(grammar)
            else:
                CONSTRAINTS.compile(grammar)


CONSTRAINTS = Constraints(TOKENIZER, frozenset({END}), TOKENIZER.backend.get_vocab_size())


def accepted(format: ToolFormat, text: str, **options: Any) -> bool:
    """Whether the grammar allows a whole answer."""
    grammar = format.grammar(**{"tools": (ADD, SAY), "choice": "required", **options})
    assert grammar is not None
    matcher = CONSTRAINTS.compile(grammar).matcher
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


ONE = '{"name": "add", "KEY": {"a": 1}}'
WRONG = '{"name": "add", "KEY": {"a": "x"}}'
SPELT = {
    "llama": (ONE, f"{ONE}\n{ONE}", WRONG),
    "llama4": (ONE, f"{ONE}\n{ONE}", WRONG),
    "hermes": tuple(
        f"<tool_call>\n{text}\n</tool_call>" for text in (ONE, f"{ONE}\n</tool_call>\n<tool_call>\n{ONE}", WRONG)
    ),
    "mistral": (f"[TOOL_CALLS] [{ONE}]", f"[TOOL_CALLS] [{ONE}, {ONE}]", f"[TOOL_CALLS] [{WRONG}]"),
}
STRICT = Tool(ADD.name, ADD.description, ADD.parameters, strict=True)


@pytest.mark.parametrize("name", SPELT)
def test_what_a_grammar_allows(name: str) -> None:
    format = format_of(ALL[name], TOKENIZER)
    one, two, wrong = (text.replace("KEY", format.style.key) for text in SPELT[name])
    assert accepted(format, one)
    assert accepted(format, two) == format.style.parallel
    assert not accepted(format, two, parallel=False)
    assert not accepted(format, two, choice=NamedTool("add"))
    assert accepted(format, one, choice=NamedTool("add"))
    assert not accepted(format, one, choice=NamedTool("say"))
    for text in (wrong, "Hello.", "", f"Hello.\n{one}"):
        assert not accepted(format, text)
    for text in (one, "Hello.", "", "{}", "[1]", '{"name": "Bob"}', "Hello.\n\n"):
        assert accepted(format, text, tools=(STRICT,), choice="auto"), text
    assert not accepted(format, wrong, tools=(STRICT,), choice="auto")
    assert not accepted(format, f"Hello.\n{wrong}", tools=(STRICT,), choice="auto")
    assert accepted(format, f"Hello.\n{one}", tools=(STRICT,), choice="auto") == (format.style.key == "arguments")
    assert not accepted(format, two, tools=(ADD,), choice="auto", parallel=False)
    assert accepted(format, one, tools=(ADD,), choice="auto", parallel=False)


def said(format: ToolFormat, seed: int, max_tokens: int, **options: Any) -> tuple[str, bool]:
    """An answer of a model that says anything that the grammar allows, and whether it came to an end."""
    grammar = format.grammar(**options)
    assert grammar is not None
    constraint, rng = CONSTRAINTS.compile(grammar), np.random.default_rng(seed)
    visible = {token: TOKENIZER.spelling(token) for token in format.visible_token_ids}
    detokenizer, ids, text = Detokenizer(TOKENIZER.decode, visible), [], ""
    while len(ids) < max_tokens:
        mask = np.unpackbits(CONSTRAINTS.masks([(constraint, ids)])[0].view(np.uint8), bitorder="little")
        choices = np.flatnonzero(mask)
        ids.append(int(END if END in choices and rng.random() < 0.3 else rng.choice(choices)))
        if ids[-1] == END:
            return text + detokenizer.flush(), True
        text += detokenizer.feed(ids[-1])
    return text + detokenizer.flush(), False


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SPELT)), st.integers(0, 2**31), st.sampled_from(["required", "add", "auto"]), st.booleans()
)
def test_what_a_grammar_leads_to_is_read(name: str, seed: int, choice: str, parallel: bool) -> None:
    format = format_of(ALL[name], TOKENIZER)
    tools = (STRICT, SAY)
    chosen: Any = NamedTool("add") if choice == "add" else choice
    text, ended = said(format, seed, 250, tools=tools, choice=chosen, parallel=parallel)
    found = parsed(format.parser(tools, constrained=True), list(text))
    calls = [one for one in found if isinstance(one, tuple)]
    if not ended:
        return
    if choice != "auto":
        assert calls == found
        assert len(calls) >= 1
    if choice == "add" or not parallel or not format.style.parallel:
        assert len(calls) <= 1
    for called, arguments in calls:
        values = json.loads(arguments)
        assert isinstance(values["a"], int) if called == "add" else values["to"] in ("Ann", "Bob")
