"""`mlxvlm chat` behind a real pseudo-terminal, with a terminal's screen to look at."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pexpect
import pyte

ROOT = Path(__file__).parents[3]
_PATIENCE_S = 120.0  # of a busy machine: nothing here waits a fixed time
_PROMPT = re.compile(r"^(\[\d+ pictures?\] )?> (Ask something, or \\help)?$")
# What a developer's own terminal says of itself.
_CHOICES = ("NO_COLOR", "COLUMNS", "LINES", "TERM_PROGRAM", "LC_TERMINAL")
# Answers that last: each piece takes its time, and none is the last one.
SLOW = """
import dataclasses, sys, time
import mlxvlm.runner
from mlxvlm.engine.stream import Stream
defaults, put = mlxvlm.runner.sampling_defaults, Stream.put
mlxvlm.runner.sampling_defaults = lambda source: dataclasses.replace(defaults(source), ignore_eos=True, temperature=1.0)
Stream.put = lambda stream, item: (time.sleep(0.02), put(stream, item))[1]
from mlxvlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Screen(pyte.HistoryScreen):
    """Answers where the cursor is, as terminals do."""

    def __init__(self, columns: int, lines: int, answer: Callable[[str], object]) -> None:
        super().__init__(columns, lines, history=5000)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)


class Terminal:
    """A chat that was started and has shown its first prompt."""

    def __init__(self, home: Path, *flags: str, script: str = "", columns: int = 100, **more: str) -> None:
        program = ["-c", script] if script else ["-m", "mlxvlm"]
        kept = {name: value for name, value in os.environ.items() if name not in _CHOICES}
        env = kept | {"HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "PYTHONPATH": str(ROOT)}
        env |= {"TERM": "xterm-256color"} | more
        self.child = pexpect.spawn(
            sys.executable,
            [*program, "chat", "-m", "demo", *flags],
            env=env,
            cwd=str(ROOT),
            dimensions=(30, columns),
            encoding="utf-8",
            codec_errors="replace",
            timeout=_PATIENCE_S,
        )
        self.child.delaybeforesend = None
        self.raw = ""
        self.screen = Screen(columns, 30, self.child.send)
        self._stream = pyte.Stream(self.screen)
        self.wait(self.is_prompting)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.child.close(force=True)

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """With what has scrolled away."""
        past = ["".join(line[column].data for column in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*past, *self.shown])

    def is_prompting(self) -> bool:
        lines = [line for line in self.screen.display if line.strip()]
        return bool(lines) and bool(_PROMPT.match(lines[-1].rstrip() + " " * lines[-1].rstrip().endswith(">")))

    def wait(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not is_done():
            assert time.monotonic() < deadline, f"nothing came; the screen:\n{self.text}"
            try:
                piece = self.child.read_nonblocking(65536, timeout=1)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                raise AssertionError(f"it has ended; the screen:\n{self.text}") from None
            self.raw += piece
            self._stream.feed(piece)

    def type(self, keys: str) -> None:
        self.child.send(keys)

    def say(self, line: str, *expected: str) -> None:
        """Sends a line; waits for each text once more than it was there, and then for the next prompt."""
        before = [self.text.count(text) for text in expected]
        self.type(line + "\r")
        counts = list(zip(expected, before, strict=True))
        self.wait(lambda: all(self.text.count(text) > count for text, count in counts) and self.is_prompting())

    def fail(self, line: str, expected: str) -> None:
        """Sends a line that is refused with one of its own, comes back to be edited, and is cleared."""
        self.type(line + "\r")
        self.wait(lambda: expected in self.text and self.edited == f"> {line}")
        self.clear()

    @property
    def edited(self) -> str:
        """The line with the cursor."""
        return self.shown[self.screen.cursor.y]

    def clear(self) -> None:
        self.type("\x03")
        self.wait(self.is_prompting)

    def leave(self) -> int:
        self.type("\x04")
        return self.ended()

    def ended(self) -> int:
        """The exit code, once it has left."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.signalstatus is None, self.child.signalstatus
        return int(self.child.exitstatus)
