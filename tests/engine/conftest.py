"""What the tests of faults and of the life cycle share."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlxvlm.engine import drafts


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlxvlm")]


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """Threads end, and memory comes back without the garbage collector's help."""
    gc.collect()
    floor = mx.get_active_memory()
    gc.disable()
    yield
    gc.enable()
    assert not our_threads()
    assert mx.get_active_memory() <= floor


@pytest.fixture
def tireless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses go on however often they fail."""
    monkeypatch.setattr(drafts, "_LONGEST_PAUSE", 0)
