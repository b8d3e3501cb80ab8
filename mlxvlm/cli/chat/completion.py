"""What Tab offers: commands, and files for those that take one. Knows prompt_toolkit's completers."""

from __future__ import annotations

from collections.abc import Iterator

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from mlxvlm.cli.chat.commands import COMMANDS, MARKS
from mlxvlm.cli.chat.words import escaped, last_word


class ChatCompleter(Completer):
    """Of the line up to the cursor."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Names while a command is typed, paths behind one that takes them."""
        text = document.text_before_cursor
        name, space, rest = text[1:].partition(" ")
        if not text.startswith(MARKS):
            return
        if not space:
            for each, command in COMMANDS.items():
                if each.startswith(name.lower()):
                    yield Completion(each, -len(name), display=text[0] + each, display_meta=command.help)
        elif name.lower() in COMMANDS and COMMANDS[name.lower()].takes_path:
            yield from self._files(rest, complete_event)

    def _files(self, rest: str, event: CompleteEvent) -> Iterator[Completion]:
        word, quote = last_word(rest)
        for found in self._paths.get_completions(Document(word), event):
            text = found.text + "/" * found.display_text.endswith("/")
            yield Completion(text if quote else escaped(text), display=found.display)
