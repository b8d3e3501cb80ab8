"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["ask.py", "stream_async.py"])
def test_example(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.strip()) > 20


def test_an_example_that_needs_a_photo_says_so() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "smolvlm.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "PHOTO" in done.stderr
