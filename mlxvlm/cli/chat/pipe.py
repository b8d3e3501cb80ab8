"""The chat of a script: a line is a message, answers go to stdout, all else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from mlxvlm.cli.chat.commands import take
from mlxvlm.cli.chat.session import Session
from mlxvlm.cli.printable import printable
from mlxvlm.cli.tool_options import call_text
from mlxvlm.errors import InputError, MlxvlmError
from mlxvlm.messages import ToolCall

_INTERRUPTED = 130


def chat(session: Session) -> int:
    """Until the last line, or \\exit. The exit code is that of the first line that failed; the others are answered."""
    code = 0
    for line in _lines():
        try:
            outcome = take(session, line)
            note = "\n".join([outcome.note, *map(str, outcome.pictures)]).strip()
            if note:
                print(note, file=sys.stderr)
            if outcome.leave:
                break
            if outcome.ask is not None:
                completion = session.answer(outcome.ask, _show, outcome.kept, _tell)
                _show("" if completion.text.endswith("\n") else "\n")
                for source in session.sources:
                    print(source, file=sys.stderr)
                if completion.finish_reason == "cancelled":
                    return _INTERRUPTED
        except MlxvlmError as error:
            print(f"mlxvlm: error: {error}", file=sys.stderr)
            code = code or error.exit_code
    return code


def _lines() -> Iterator[str]:
    try:
        for line in sys.stdin or ():
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"a line on stdin is not text: {error}") from error


def _tell(calls: Sequence[ToolCall]) -> None:
    for call in calls:
        print(f"[{call_text(call)}]", file=sys.stderr)


def _show(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
