"""`mlxvlm serve -m demo` in a process of its own, for tests of what talks to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PICTURES = Path(__file__).parent.parent / "examples" / "pictures"


@contextmanager
def demo_server(*flags: str) -> Iterator[str]:
    """Its address, without a slash at the end. Relative paths of pictures are in its folder, examples/pictures."""
    command = [sys.executable, "-m", "mlxvlm", "serve", "-m", "demo", "-p", "0", *flags]
    with subprocess.Popen(
        command, cwd=PICTURES, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("mlxvlm: demo at http://127.0.0.1:"), line
            yield line.split()[-1].removesuffix("/v1")
        finally:
            process.terminate()
