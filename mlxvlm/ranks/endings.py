"""How a rank's process ends when it can't go on: MLX's collectives wait for ever, and nothing interrupts them."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

FAILED = 1  # exit status
# A line on stdin: the text goes to stderr. No line: nothing.
_MESSENGER = ("/bin/sh", "-c", 'IFS= read -r line && printf "%s\\n" "$0" >&2')


def end_process(text: str) -> NoReturn:
    """One line on stderr and the end, whatever other threads are at."""
    with suppress(OSError):
        os.write(2, f"mlxvlm: error: {text}\n".encode(errors="replace"))
    os._exit(FAILED)


@contextmanager
def no_longer_than(deadline_s: float, text: str) -> Iterator[None]:
    """Ends the process as end_process does where the block takes longer, also where it keeps Python's lock.

    No thread of Python's could do that: faulthandler's needs no lock, and wakes a process that has the text.
    """
    sys.stderr.flush()
    messenger = subprocess.Popen([*_MESSENGER, f"mlxvlm: error: {text}"], stdin=subprocess.PIPE)
    assert messenger.stdin is not None
    faulthandler.dump_traceback_later(deadline_s, file=messenger.stdin.fileno(), exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        messenger.stdin.close()
        messenger.wait()
