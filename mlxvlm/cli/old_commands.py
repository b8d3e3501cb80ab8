"""mistral.rs's commands that are not ours -> ours. Knows its flags of 2025, runs nothing.

`run` began a conversation, and a kind of model might follow. Earlier, flags of the program came before the kind, those
of the model behind it: `-i` and `-c` meant two things.
Source: mistral.rs 0.6.0, mistralrs-server/src/main.rs and mistralrs-core/src/model_selected.rs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

_KINDS = ("vision-plain", "plain")
_CONVERSATIONS = [[command, kind] for command in ("run", "chat") for kind in ("vision", "multimodal")]
_ONE_QUESTION = ("-i", "--image", "--input")  # `run vision -i photo.jpg` asks about a photo
_CHAT = ("-i", "--interactive-mode")
_SWITCHES = (
    *(*_CHAT, "-l", "--log", "--truncate-sequence", "--no-kv-cache", "--no-paged-attn", "--paged-attn", "--cpu"),
    *("--enable-search", "--enable-thinking"),
)
_OTHERS = (
    *("--pa-", "--token-source", "--prefix-cache-n", "-n", "--num-device-layers"),
    *("--search-bert-model", "--mcp-port"),
)
# Theirs -> ours; the empty ones need no counterpart.
_BEFORE: Mapping[str, str] = {
    **dict.fromkeys(("-p", "--port"), "-p"),
    **dict.fromkeys(("-s", "--seed"), "--seed"),
    **dict.fromkeys(("-c", "--chat-template", "-j", "--jinja-explicit"), "--chat-template"),
    **{name: name for name in ("--isq", "--mcp-config", "--enable-search")},
    "--serve-ip": "--host",
    "--max-seqs": "--max-rows",
    **dict.fromkeys(_CHAT, ""),
}
_BEHIND: Mapping[str, str] = {
    **dict.fromkeys(("-m", "--model-id"), "-m"),
    **dict.fromkeys(("-d", "--dtype"), "--dtype"),
    **dict.fromkeys(("-f", "--from-uqff"), "--from-uqff"),
    "--topology": "--topology",
    **dict.fromkeys(("-a", "--arch"), ""),  # the checkpoint says what it is
}
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_NOT_IN = {"chat": ("-p", "--host", "--max-rows"), "serve": ("--seed",)}


def hint(argv: Sequence[str]) -> str | None:
    """A line with our command for one of theirs, None for all others."""
    if list(argv[:2]) in _CONVERSATIONS and not any(word.startswith(_ONE_QUESTION) for word in argv):
        return f"a conversation is another command here: {shlex.join(['mlxvlm', 'chat', *argv[2:]])}"
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    command = words.pop(0) if words and words[0] in ("run", "chat") else ""
    place = next((place for place, word in enumerate(words) if word in _KINDS), None)
    # `run plain` asks a question.
    if place is None or (command == "run" and words[0] != _KINDS[0]):
        return None
    before, behind = list(_flags(words[:place], _SWITCHES)), list(_flags(words[place + 1 :]))
    if not all(name in _BEFORE or name in _SWITCHES or name.startswith(_OTHERS) for name, _ in before):
        return None
    ours = "serve" if any(_BEFORE.get(name) == "-p" for name, _ in before) else "chat"
    found, lost = [], []
    for theirs, (name, values) in [*((_BEFORE, flag) for flag in before), *((_BEHIND, flag) for flag in behind)]:
        flag = theirs.get(name)
        if flag is None or flag in _NOT_IN[ours]:
            lost.append(name)
        elif flag:
            found += [flag, *(_DTYPES.get(value, value) if flag == "--dtype" else value for value in values)]
    text = f"this is mistral.rs's old order of words; here it is: {shlex.join(['mlxvlm', ours, *found])}"
    return text + (f" (without {', '.join(lost)}, which nothing here corresponds to)" if lost else "")


def _flags(words: Sequence[str], switches: Sequence[str] = ()) -> Iterator[tuple[str, Sequence[str]]]:
    """Each flag with its value, if it takes one."""
    rest = list(words)
    while rest:
        name = rest.pop(0)
        takes_value = name not in switches and rest and not rest[0].startswith("-")
        yield name, [rest.pop(0)] if takes_value else []
