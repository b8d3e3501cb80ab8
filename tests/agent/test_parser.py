"""Calls in an answer, however it is cut into pieces."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxvlm.agent.formats import CallDelta, Tool
from mlxvlm.agent.parser import Piece, ToolParser
from mlxvlm.agent.reader import MalformedError, Reader, is_json, python_value
from mlxvlm.engine.request import Delta
from tests.agent.templates import ALL, format_of

TOOLS = (Tool("f"), Tool("get_sum"))
FORMATS = {name: format_of(source) for name, source in ALL.items()}
Found = tuple[str, str]  # of a call: name and arguments


def parsed(parser: ToolParser, pieces: Sequence[str]) -> list[str | Found]:
    """Text and whole calls in order."""
    out: list[Piece] = []
    for piece in pieces:
        out += parser.feed(Delta(piece))
    return whole([*out, *parser.finish()])


def whole(pieces: Sequence[Piece]) -> list[str | Found]:
    found: list[str | Found] = []
    ids: dict[int, str] = {}
    for piece in pieces:
        assert piece != ""
        if isinstance(piece, str):
            found.append(str(found.pop()) + piece if found and isinstance(found[-1], str) else piece)
            continue
        assert piece.id == ids.setdefault(piece.index, piece.id)
        if piece.name is not None:
            assert piece.index == len(ids) - 1, "calls are counted in order"
            found.append((piece.name, piece.arguments))
        else:
            name, arguments = found.pop()
            found.append((str(name), str(arguments) + piece.arguments))
    assert len(set(ids.values())) == len(ids)
    return found


def read(name: str, text: str, *, constrained: bool = False, grows: bool = True) -> list[str | Found]:
    return parsed(FORMATS[name].parser(TOOLS, constrained=constrained, grows=grows), [text])


F = ("f", "{}")
CASES: dict[tuple[str, str], list[str | Found]] = {
    ("llama", '{"name": "f", "parameters": {"a": [1, "}"]}}'): [("f", '{"a": [1, "}"]}')],
    ("llama", ' \n{"name": "f"}\n'): [F],
    ("llama", '{"type": "function", "name": "f", "parameters": null}'): [
        '{"type": "function", "name": "f", "parameters": null}'
    ],
    ("llama", '{"type": "function", "name": "f", "parameters": {}}'): [F],
    ("llama", '{"type": "object", "name": "f"}'): ['{"type": "object", "name": "f"}'],
    ("llama", '{"parameters": {"a":1}, "name": "f"}'): [("f", '{"a":1}')],
    ("llama", '{"name": "f"}; {"name": "get_sum"}\n{"name": "f"},{"name": "f"}{"name": "f"}'): [
        F,
        ("get_sum", "{}"),
        F,
        F,
        F,
    ],
    ("llama", '{"name": "f"}; {"x": 1}'): [F, '; {"x": 1}'],
    ("llama", '{"name": "f"}; bye'): [F, "; bye"],
    ("llama", '{"name": "Bob", "parameters": {}}'): ['{"name": "Bob", "parameters": {}}'],
    ("llama", '{"name": "f", "age": 3}'): ['{"name": "f", "age": 3}'],
    ("llama", '{"name": "f", "name": "f"}'): ['{"name": "f", "name": "f"}'],
    ("llama", '{"name": "f", "parameters": {"a": NaN}}'): ['{"name": "f", "parameters": {"a": NaN}}'],
    ("llama", '{"name": "f", "parameters": {"a": 01}}'): ['{"name": "f", "parameters": {"a": 01}}'],
    ("llama", '{"name": "f", "parameters": [1]}'): ['{"name": "f", "parameters": [1]}'],
    ("llama", '{"name": "f", "parameters": "{\\"a\\": 1}"}'): [("f", '{"a": 1}')],
    ("llama", '{"name": "f", "parameters": "{\\"a\\": }"}'): ['{"name": "f", "parameters": "{\\"a\\": }"}'],
    ("llama", '{"name": "f", "parameters": {"a"'): ['{"name": "f", "parameters": {"a"'],
    ("llama", 'Use {"name": "f"} so.'): ['Use {"name": "f"} so.'],
    ("llama", 'I will:\n  {"name": "f"}\nDone. '): ["I will:", F, "\nDone. "],
    ("llama", '[{"name": "f"}, {"name": "f"}]'): [F, F],
    ("llama", '[{"name": "f"}, {"name": "g"}]'): ['[{"name": "f"}, {"name": "g"}]'],
    ("llama", '<|python_tag|>{"name": "f"}'): [F],
    ("llama", '<|python_tag|>f.call(query="x")'): [("f", '{"query": "x"}')],
    ("llama", "<|python_tag|>print(1)"): ["<|python_tag|>print(1)"],
    ("llama", "[1, 2]\n[f]"): ["[1, 2]\n[f]"],
    ("llama4", '[f(a=1, b="x\\"]"), get_sum(), ]'): ['[f(a=1, b="x\\"]"), get_sum(), ]'],
    ("llama4", '[f(a=1, b="x\\"]"), get_sum( )] ok'): [("f", '{"a": 1, "b": "x\\"]"}'), ("get_sum", "{}"), " ok"],
    ("llama4", "<|python_start|>[f(a=(None, .5, -1., {'k': [True]}),)]<|python_end|>"): [
        ("f", '{"a": [null, 0.5, -1, {"k": [true]}]}')
    ],
    ("llama4", "<|python_start|>f(a='é\\n\\x41\\u00e9\\q')"): [("f", '{"a": "é\\nAé\\\\q"}')],
    ("llama4", '<|python_start|>hm<|python_end|>{"name": "f"}'): ["<|python_start|>hm<|python_end|>" + '{"name": "f"}'],
    ("llama4", "[f(1)]"): ["[f(1)]"],
    ("llama4", "[f(a=1, a=2)]"): ["[f(a=1, a=2)]"],
    ("llama4", "[f(a=__import__('os'))]"): ["[f(a=__import__('os'))]"],
    ("llama4", "[f(a=1) + f(a=2)]"): ["[f(a=1) + f(a=2)]"],
    ("llama4", "[g()]"): ["[g()]"],
    ("hermes", 'Hi <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'): ["Hi", F],
    ("hermes", '<tool_call>{"name": "f"}</tool_call> <tool_call>{"name": "f"}</tool_call> x'): [F, F, " x"],
    ("hermes", '<tool_call>[{"name": "f"},{"name": "f"}]</tool_call>'): [F, F],
    ("hermes", '<tool_call>{"name": "f"}'): [F],
    ("hermes", '<tool_call>{"name": "f"} <tool'): [F, " <tool"],
    ("hermes", '<tool_call>{"name": "f"}\n</tool'): [F],
    ("llama4", '<|python_start|>{"name": "f"}<|pyth'): [F],
    ("hermes", '<tool_call>{"name": "f"<tool_call>{"name": "f"}'): ['<tool_call>{"name": "f"', F],
    ("hermes", '{"name": "f"}'): ['{"name": "f"}'],
    ("hermes", "a < b, <tool_calls>, </tool_call>"): ["a < b, <tool_calls>, </tool_call>"],
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>'): [
        ("f", '{"a": "</tool_call>"}')
    ],
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "f"}]'): [F, F],
    ("mistral", 'x [TOOL_CALLS]{"name": "f"}'): ["x", F],
    ("mistral", "[TOOL_CALLS] [1]"): ["[TOOL_CALLS] [1]"],
    ("mistral", "[TOOL_[TOOL_CALLS"): ["[TOOL_[TOOL_CALLS"],
    ("plain", '<tool_call>{"name": "f"}</tool_call>'): [F],
}


@pytest.mark.parametrize("written", CASES, ids="-".join)
def test_cases(written: tuple[str, str]) -> None:
    (name, text), found = written, CASES[written]
    assert read(name, text) == found
    assert parsed(FORMATS[name].parser(TOOLS), list(text)) == found


def test_what_an_unfinished_call_quotes_is_no_call() -> None:
    """A page that the model copies into an argument must not become a call of its own."""
    text = "[f(a='x\\n', b=[\n[f(a=1)]\n"
    assert read("llama4", text) == [text]
    quoting = '<tool_call>{"name": "f", "arguments": {"a": "\n<tool_call>{\\"name\\": \\"f\\"}</tool_call>'
    assert read("hermes", quoting) == [quoting]


def test_without_tools_all_is_text() -> None:
    for name, format in FORMATS.items():
        text = format.render([]) + '{"name": "f"} <tool_call>{"name": "f"}</tool_call> [f()]'
        assert parsed(format.parser(()), list(text)) == [text], name


def test_special_markers_are_never_shown() -> None:
    parser = ToolParser(FORMATS["llama4"].style.syntax, TOOLS, {"<|python_start|>", "<|python_end|>"})
    assert parsed(parser, ['<|python_start|>I call<|python_end|>{"name": "f"}']) == ["I call", F]
    parser = ToolParser(FORMATS["llama4"].style.syntax, (), {"<|python_start|>", "<|python_end|>"})
    assert parsed(parser, ["<|python_start|>print(1)<|python_end|>"]) == ["print(1)"]


def test_text_is_not_held_back_for_long() -> None:
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.feed(Delta("Hello <too")) == ["Hello"]
    assert parser.feed(Delta("lbox")) == [" <toolbox"]
    assert FORMATS["llama"].parser(TOOLS).feed(Delta('{"name": "Bob", ')) == ['{"name": "Bob",']


def test_under_a_grammar_arguments_grow() -> None:
    parser = FORMATS["hermes"].parser(TOOLS, constrained=True)
    pieces: list[Piece] = []
    for piece in ('<tool_call>\n{"name": "f', '", "arguments": {"a', '": [1', "2", "]}}\n</tool_call>"):
        pieces += parser.feed(Delta(piece))
    pieces += parser.finish()
    assert [(piece.name, piece.arguments) for piece in pieces if isinstance(piece, CallDelta)] == [
        ("f", ""),
        (None, '{"a'),
        (None, '": [1'),
        (None, "2"),
        (None, "]}"),
    ]
    assert whole(pieces) == [("f", '{"a": [12]}')]


@pytest.mark.parametrize("cut", range(1, 86))
def test_under_a_grammar_a_cut_answer_gives_what_there_is(cut: int) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": [-12.5e3, true, "\\u00e9"]}}\n</tool_call>'[:cut]
    found = read("hermes", text, constrained=True)
    begun = text.find('"arguments": ') + len('"arguments": ')
    if '"arguments": {' not in text:
        assert found == [text.rstrip()] or found == [text]
    else:
        assert found == [("f", text[begun : text.find("}}") + 1 or None])]
    if "]}" not in text:
        assert read("hermes", text, constrained=True, grows=False) in ([text], [text.rstrip()]), "no call is broken"
    else:
        assert read("hermes", text, constrained=True, grows=False) == found


# Properties.

GARBAGE = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "<tool",
            "[TOOL_CALLS]",
            "<|python_start|>",
            "<|python_end|>",
            "<|python_tag|>",
            '{"name": "f"',
            '"arguments": ',
            '"parameters": {',
            "f(",
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            '"',
            "'",
            "\\",
            ":",
            ",",
            ";",
            " ",
            "\n",
            "a=",
            "1",
            "-",
            "é",
            "true",
            "Tr",
            '{"name": "f"}',
            "[f()]",
            "\\u12",
            "\ud800",
        ]
    )
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), JSON, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "get_sum"]), ARGUMENTS), min_size=1, max_size=3)


def cut(text: str, places: Sequence[int]) -> list[str]:
    at = sorted({place % (len(text) + 1) for place in places})
    return [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]


def squeezed(text: str) -> str:
    return re.sub(r"[ \t\r\n]+", "", text)


@example("llama", ['{"name": "f"}'], [], True)
@example("hermes", ["<tool_call>", '{"name": "f"', ",", '"arguments": ', "{"], [], False)
@given(st.sampled_from(sorted(FORMATS)), GARBAGE, st.lists(st.integers(0, 200)), st.sampled_from([None, False, True]))
def test_garbage_is_kept_however_it_is_cut(name: str, words: list[str], places: list[int], grows: bool | None) -> None:
    """grows: of calls under a grammar; None: without one."""
    text = "".join(words)
    kind = {"constrained": grows is not None, "grows": bool(grows)}
    parser = FORMATS[name].parser(TOOLS, **kind)
    found = parsed(parser, cut(text, places))
    assert found == read(name, text, **kind)
    calls = [piece for piece in found if isinstance(piece, tuple)]
    if not calls:
        assert "".join(map(str, found)) == text
    if not grows:
        assert all(is_json(arguments) and arguments.startswith("{") for _, arguments in calls)
    # What is text is in the answer, in order.
    rest = squeezed(text)
    for piece in found:
        if isinstance(piece, str):
            assert squeezed(piece) in rest
            rest = rest[rest.index(squeezed(piece)) + len(squeezed(piece)) :]


@given(
    st.sampled_from(sorted(FORMATS)),
    CALLS,
    st.booleans(),
    st.sampled_from([None, False, True]),
    st.sampled_from(["", "Well,"]),
)
def test_what_is_spelt_is_read(
    name: str, calls: list[tuple[str, dict[str, Any]]], ascii: bool, grows: bool | None, before: str
) -> None:
    style = FORMATS[name].style
    spelt = style.render([(tool, json.dumps(arguments, ensure_ascii=ascii)) for tool, arguments in calls])
    text = f"{before}\n{spelt}" if before else spelt
    for pieces in ([text], list(text)):
        found = parsed(FORMATS[name].parser(TOOLS, constrained=grows is not None, grows=bool(grows)), pieces)
        expected: list[Any] = [before, *calls] if before else list(calls)
        assert [one if isinstance(one, str) else (one[0], json.loads(one[1])) for one in found] == expected


@given(CALLS, st.booleans())
def test_pythonic_calls_are_read(calls: list[tuple[str, dict[str, Any]]], wrapped: bool) -> None:
    spelt = [f"{tool}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for tool, arguments in calls]
    text = f"[{', '.join(spelt)}]"
    text = f"<|python_start|>{text}<|python_end|>" if wrapped else text
    found = parsed(FORMATS["llama4"].parser(TOOLS), list(text))
    assert [(one[0], json.loads(one[1])) for one in found] == calls


@given(st.text("{}[]\",:'\\u0123456789eE+-.truefalsn \n\x01é", max_size=30) | JSON.map(json.dumps))
@example("1" * 5000)
@example("[" * 65 + "]" * 65)
def test_json_is_what_the_standard_library_reads(text: str) -> None:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse, parse_int=str)
        valid = True
    except ValueError:
        valid = False
    if is_json(text):
        assert valid
    elif valid:
        assert text.startswith((" ", "\n", "\t", "\r")) or text[-1:].isspace() or text.count("[") > 60


@given(st.text("()[]{}\"',:\\nxu0123456789eE+-.TrueFalsNo \n", max_size=30) | JSON.map(repr))
@example("1e400")
@example("007")
def test_python_literals_mean_what_python_says(text: str) -> None:
    reader = Reader()
    reader.text, reader.ended = text, True
    coroutine = python_value(reader)
    try:
        next(coroutine)
    except StopIteration as done:
        spelt = done.value
    except MalformedError:
        return
    assert is_json(spelt)
    source = text[: reader.at].strip()
    try:
        meant = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return  # more is read than Python does: true, 007
    if isinstance(meant, float) and math.isinf(meant):
        return
    assert json.loads(spelt) == json.loads(json.dumps(meant))
