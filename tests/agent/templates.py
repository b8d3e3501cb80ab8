"""Small chat templates that write tools in the ways that checkpoints do."""

from __future__ import annotations

from mlxvlm.agent.formats import ToolFormat, tool_format
from mlxvlm.processors.chat_template import ChatTemplate
from mlxvlm.processors.tokenizer import Tokenizer
from tests.processors.checkpoints import byte_tokenizer

_TOOLS = "{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
_PLAIN = "<{{ m.role }}>{{ m.content }}"

# One bare JSON object a turn, as Llama 3.x.
LLAMA = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '<assistant>{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}" + _PLAIN + "{% endif %}{% endfor %}"
)
# Any number of them, as Llama 4.
LLAMA4 = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}<assistant><|python_start|>{{ m.content }}<|python_end|>"
    '{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% else %}" + _PLAIN + "{% endif %}{% endfor %}"
)
# As Hermes and Qwen 2.5: the results are a user's turn.
HERMES = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}<assistant>{{ m.content }}{% for c in m.tool_calls %}"
    '{{ "\\n" }}<tool_call>\n{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% elif m.role == 'tool' %}<user><tool_response>{{ m.content }}</tool_response>"
    "{% else %}" + _PLAIN + "{% endif %}{% endfor %}"
)
# With ids of nine letters, as Mistral's.
MISTRAL = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    "{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}:{{ m.content }}"
    "{% else %}" + _PLAIN + "{% endif %}{% endfor %}"
)
# Arguments are joined to other text.
ARGUMENT_TEXT = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}<assistant>{% for c in m.tool_calls %}"
    '{{ \'<tool_call>{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments }}}</tool_call>'
    "{% endfor %}{% else %}" + _PLAIN + "{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}" + _PLAIN + "\n{% endfor %}"
# User and assistant by turns, and nobody else.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('by turns') }}{% endif %}" + _PLAIN + "\n{% endfor %}"
)
ALL = {"llama": LLAMA, "llama4": LLAMA4, "hermes": HERMES, "mistral": MISTRAL, "plain": PLAIN}

END = 257
_SPECIAL = ("<s>", "</s>", "<image>", "[TOOL_CALLS]", "<|python_tag|>", "<|python_start|>", "<|python_end|>")
TOKENIZER = Tokenizer(byte_tokenizer(_SPECIAL), {})


def format_of(source: str, tokenizer: Tokenizer | None = None) -> ToolFormat:
    return tool_format(ChatTemplate(source, {}), tokenizer)
