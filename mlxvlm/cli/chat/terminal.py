"""The chat of a person: a line to edit, Markdown that streams, Ctrl-C that stops an answer. Knows the terminal."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.plain_text import PlainTextOutput
from rich.console import Console
from rich.status import Status

from mlxvlm import __version__
from mlxvlm.cli.chat import preview
from mlxvlm.cli.chat.commands import take
from mlxvlm.cli.chat.completion import ChatCompleter
from mlxvlm.cli.chat.markdown import MarkdownView
from mlxvlm.cli.chat.session import Session, Turn, figures
from mlxvlm.cli.printable import printable
from mlxvlm.cli.tool_options import call_text
from mlxvlm.errors import MlxvlmError
from mlxvlm.messages import ToolCall

_HISTORY, _MAC_DATA, _DATA = "mlxvlm/chat_history", "Library/Application Support", ".local/share"
_MAX_HISTORY_CHARS = 100_000  # of one entry: a pasted data: URL is not worth keeping
_PLACEHOLDER = "Ask something, or \\help"


class Terminal:
    """The loop of one chat."""

    def __init__(self, session: Session, *, is_quiet: bool = False, keeps_history: bool = True) -> None:
        self._session = session
        self._is_quiet = is_quiet
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._editor: PromptSession[str] = PromptSession(
            history=open_history() if keeps_history else InMemoryHistory(),
            completer=ChatCompleter(),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="  ",
            reserve_space_for_menu=5,
            output=PlainTextOutput(sys.stdout) if self._console.is_dumb_terminal else None,
        )

    def run(self) -> int:
        """Until Ctrl-D or \\exit."""
        session, draft = self._session, ""
        self._say(f"mlxvlm {__version__} | {session.model}: {session.about}")
        self._say("\\help lists commands, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves")
        for picture in session.pending:
            preview.show(self._console, picture)
        with suppress(EOFError):
            while True:
                hint = FormattedText([("fg:ansibrightblack", "" if session.turns else _PLACEHOLDER)])
                line = self._editor.prompt(self._prompt, default=draft, placeholder=hint)
                with _unseen_keys():
                    draft = self._handle(line)
        return 0

    def _prompt(self) -> str:
        count = len(self._session.pending)
        return f"[{count} picture{'s' if count > 1 else ''}] > " if count else "> "

    def _say(self, text: str) -> None:
        if text:
            self._console.print(printable(text), style="dim")

    def _handle(self, line: str) -> str:
        """Carries out a line, and returns what is to be edited: all of it where it failed."""
        draft = line
        try:
            outcome = take(self._session, line)
            if outcome.leave:
                raise EOFError
            for picture in outcome.pictures:
                preview.show(self._console, picture)
            self._say(outcome.note)
            if outcome.ask is None:
                return ""
            draft = outcome.ask.text if outcome.kept is None else ""
            return "" if self._answer(outcome.ask, outcome.kept) else draft
        except MlxvlmError as error:
            self._console.print(str(error), style="red")
        except KeyboardInterrupt:
            self._say("Stopped.")
        return self._edited(draft)

    def _edited(self, draft: str) -> str:
        """The draft, unless it is so long that it would push what went wrong out of the window."""
        rows = sum(1 + len(line) // self._console.width for line in draft.splitlines())
        if rows <= self._console.height // 2:
            return draft
        self._editor.history.append_string(draft)  # without the pictures: they are still attached
        self._say("Up brings the text back.")
        return ""

    def _answer(self, question: Turn, kept: int | None) -> bool:
        """Whether there is one now. Raises MlxvlmError."""
        is_dumb = self._console.is_dumb_terminal
        view = _PlainView() if is_dumb else MarkdownView(self._console)
        waiting = Status("thinking", console=self._console)

        def show(text: str) -> None:
            waiting.stop()
            view.feed(text)

        def tell(calls: Sequence[ToolCall]) -> None:
            waiting.stop()
            view.close()
            for call in calls:
                self._say(f"[{call_text(call)}]")
            if not is_dumb:
                waiting.start()

        if not is_dumb:
            waiting.start()
        try:
            completion = self._session.answer(question, show, kept, tell)
        finally:
            waiting.stop()
            view.close()
        if completion.finish_reason == "cancelled":
            self._say("Stopped.")
        if completion.finish_reason == "length":
            self._say(f"Cut at {completion.usage.completion_tokens} tokens: \\max N sets the limit.")
        self._say("\n".join(self._session.sources))
        if not self._is_quiet:
            self._say(figures(completion.usage))
        self._console.print()
        return self._session.last is completion


class _PlainView:
    """An answer as it comes, for terminals that can't go back."""

    def feed(self, text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    def close(self) -> None:
        sys.stdout.write("\n")


@contextmanager
def _unseen_keys() -> Iterator[None]:
    """What is typed meanwhile is kept for the next prompt, and does not run into the answer."""
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _keys() -> KeyBindings:
    """Enter sends, but not behind a backslash; Alt-Enter (Esc, Enter) breaks the line; Ctrl-C clears."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=~is_searching)  # there it leaves the search
    @keys.add("<sigint>")
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


def open_history() -> History:
    """What was typed in earlier runs, from a file of the user's alone; where none can be written, of this run."""
    mac = Path.home() / _MAC_DATA
    path = (
        mac if sys.platform == "darwin" else Path(os.environ.get("XDG_DATA_HOME") or Path.home() / _DATA)
    ) / _HISTORY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return _History(str(path))


class _History(FileHistory):
    """A file that stays small; a full disk is no reason to end a chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            if len(string) <= _MAX_HISTORY_CHARS:
                super().store_string(string)
