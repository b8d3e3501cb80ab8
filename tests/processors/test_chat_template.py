"""Chat templates: what transformers' environment does, and what the sandbox refuses."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

import pytest

from mlxvlm.errors import ModelError, TemplateError
from mlxvlm.processors.chat_template import ChatTemplate

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<b>é & 'ü'</b>"}]},
    {"role": "assistant", "content": [{"type": "text", "text": ""}]},
]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES, variables)


RENDERED = {
    "a": "a",
    "a\n": "a",  # Jinja drops one newline at the end
    "a\n\n": "a\n",
    "a\r\nb": "a\nb",
    "{% if true %}\na\n{% endif %}\nb": "a\nb",  # trim_blocks
    "    {% if true %}a{% endif %}": "a",  # lstrip_blocks
    "  {{ 1 }}": "  1",
    "x {%- if true %} a {%- endif %}": "x a",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}": "<s></s>",
    "{{ add_generation_prompt }}": "True",
    "{% for m in messages %}{{ m['role'] }}{{ m.role }} {% endfor %}": "useruser assistantassistant ",
    "{% for tool in tools %}x{% endfor %}": "",
    "{% for tool in [] %}x{% else %}none{% endfor %}": "none",
    "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}": "02345678",
    "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}": "012",
    "{% generation %}a{{ bos_token }}{% endgeneration %}b": "a<s>b",
    "{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration -%}{% endfor %}": "userassistant",
    "{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}": "4",
    "{% set d = dict(a=1, **{'b': 2}) %}{{ d.a + d['b'] }}": "3",
    "{{ dict([('a', 1)]) | tojson }}": '{"a": 1}',
    "{{ messages[0].content[1].text }}": "<b>é & 'ü'</b>",
    "{{ messages[0].content[1] | tojson }}": """{"type": "text", "text": "<b>é & 'ü'</b>"}""",
    "{{ {'a': [1, true, none]} | tojson(indent=1) }}": '{\n "a": [\n  1,\n  true,\n  null\n ]\n}',
    "{{ {'b': 1, 'a': 2} | tojson }}": '{"b": 1, "a": 2}',
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}": '{"a":2,"b":1}',
    "{{ 'é' | tojson(ensure_ascii=true) }}": '"\\u00e9"',
    "{{ 'a b'.split(' ')[-1] | upper }}": "B",
    "{{ tools is defined }}{{ tools is none }}{{ tools }}": "FalseFalse",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{{ messages[1:] | length }}{{ messages[-1].role }}": "1assistant",
    "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{{ say(messages[0]) }}": "[user]",
    "{{ 'User: x'.startswith('User') }}": "True",
}


@pytest.mark.parametrize("source", RENDERED)
def test_render(source: str) -> None:
    assert render(source) == RENDERED[source]


def test_variables_go_before_the_defaults() -> None:
    source = "{{ add_generation_prompt }} {{ bos_token }} {{ tools | length }}"
    assert render(source, add_generation_prompt=False, bos_token="B", tools=[1, 2]) == "False B 2"


def test_today() -> None:
    before = datetime.now()
    text = render("{{ strftime_now('%Y-%m-%d') }}")
    assert text in {before.strftime("%Y-%m-%d"), datetime.now().strftime("%Y-%m-%d")}


def test_one_template_renders_many_times() -> None:
    template = ChatTemplate("{% set n = namespace(x=0) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ messages | length }}", {})
    assert [template.render(MESSAGES[:count]) for count in (0, 1, 2)] == ["10", "11", "12"]


REFUSED = {
    "{{ raise_exception('Only user and assistant!') }}": "refuses these messages: Only user and assistant!",
    "{{ raise_exception('two\nlines') }}": "refuses these messages: two lines",
    "{{ ''.__class__ }}x{{ ''.__class__.__mro__ }}": "'__class__' of 'str' object is unsafe",
    "{{ messages.__class__.__base__.__subclasses__() }}": "is unsafe",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x }}": "is unsafe",
    "{{ strftime_now.__code__.co_code }}": "is unsafe",
    "{{ dict.__call__.__globals__ }}": "is unsafe",
    "{{ dict.fromkeys([1]) }}": "has no attribute 'fromkeys'",
    "{{ '{0.__class__.__mro__}'.format(1) }}": "is unsafe",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}": "is unsafe",
    "{{ messages.append({}) }}": "is unsafe",
    "{{ messages.clear() }}": "is unsafe",
    "{{ messages[0].update(role='system') }}": "is unsafe",
    "{{ messages[0].content.pop() }}": "is unsafe",
    "{% set x = messages[0].setdefault('a', 1) %}": "is unsafe",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{{ messages[0].content[1].url.x }}": "has no attribute 'url'",
    "{{ messages[9].role }}": "has no element 9",
    "{{ nothing() }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ 'a' + 1 }}": "TypeError: can only concatenate",
    "{{ nothing | tojson }}": "TypeError: Object of type Undefined is not JSON serializable",
    "{% for i in range(10 ** 9) %}{% endfor %}": "OverflowError: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError: ",
    "{{ ('a' * 10 ** 15) | length }}": "MemoryError",
    "{{ [1].index(2) }}": "ValueError: ",
    "{% include 'other' %}": "no loader for this environment",
}


@pytest.mark.parametrize("source", REFUSED)
def test_refused(source: str) -> None:
    before = copy.deepcopy(MESSAGES)
    with pytest.raises(TemplateError) as caught:
        render(source)
    message = str(caught.value)
    assert REFUSED[source] in message
    assert message.startswith("the chat template ")
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 3
    assert before == MESSAGES


def test_reserved_variable() -> None:
    with pytest.raises(TemplateError, match="multiple values"):
        render("a", messages=[])


BROKEN = {
    "a\n{% if %}": "Expected an expression, got 'end of statement block' (line 2)",
    "{% for m in messages %}\n\n{{ m }": "(line 3)",
    "{{ x ": "(line 1)",
    "{% nonsense %}": "Encountered unknown tag 'nonsense'. (line 1)",
    "{% generation %}a": "(line 1)",
    "{{ x | no_such_filter }}": "No filter named 'no_such_filter'. (line 1)",
    "{{ f(a=1, a=2) }}": "keyword argument repeated",
    "{{" + "(" * 5000: "recursion",
}


@pytest.mark.parametrize("source", BROKEN, ids=lambda source: source[:20])
def test_syntax_errors(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        ChatTemplate(source, {})
    message = str(caught.value)
    assert message.startswith("the chat template has a syntax error: ")
    assert BROKEN[source] in message
    assert len(message.splitlines()) == 1


CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": "é"}}}
PRINTS_ARGUMENTS = {
    "{{ c.function.arguments | tojson }}": '{"a": "é"}',
    "{{ c.function.arguments }}": '{"a": "é"}',
    "{{ 'f(' + c.function.arguments + ')' }}": 'f({"a": "é"})',
    "{{ c['function'] | tojson }}": '{"name": "f", "arguments": {"a": "é"}}',
    "{% for name, value in c.function.arguments.items() %}{{ name }}={{ value }}{% endfor %}": "a=é",
    "{{ c.function.name }}": "f",
}


@pytest.mark.parametrize("source", PRINTS_ARGUMENTS)
@pytest.mark.parametrize("start", ["", "{{ raise_exception('no question') if messages[0].role != 'user' }}"])
def test_arguments_are_what_the_template_wants(source: str, start: str) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    loop = "{% for m in messages %}{% for c in m.tool_calls %}" + source + "{% endfor %}{% endfor %}"
    assert ChatTemplate(start + loop, {}).render(turns) == PRINTS_ARGUMENTS[source]
    assert CALL["function"]["arguments"] == {"a": "é"}  # type: ignore[index]


TURN = "{% for m in messages %}"
END = "{% endfor %}"
WANTS_STRINGS = {
    TURN + "{{ m.role }}: {{ m.content }}" + END: True,
    TURN + "{{ m['content'] | trim }}" + END: True,
    TURN + "{% set words = m['content'] %}{{ words }}" + END: True,
    TURN + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}" + END: True,  # fails on a list
    TURN + "{% if m.content is string %}{{ m.content }}{% else %}{{ raise_exception('no') }}{% endif %}" + END: True,
    TURN + "{% for part in m.content %}{{ part.text }}{% endfor %}" + END: False,
    TURN + "{{ m.content[0].text }}" + END: False,
    TURN + "{{ m.content | map(attribute='text') | join }}" + END: False,
    TURN + "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}" + END: False,
    TURN + "{{ m.role }}" + END: False,
    "{{ raise_exception('never') }}": False,
    "{{ messages[1].content }}": False,
    "{{ 1 / 0 }}": False,
}


@pytest.mark.parametrize("source", WANTS_STRINGS)
def test_whether_it_takes_strings(source: str) -> None:
    assert ChatTemplate(source, {}).takes_strings is WANTS_STRINGS[source]
