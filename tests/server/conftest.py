"""Fixtures for the server's tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.processors.conftest import web

__all__ = ["web"]


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "mlxvlm-engine"}


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """For tests that must close every engine that they start."""
    before = engine_threads()
    yield
    assert engine_threads() <= before
