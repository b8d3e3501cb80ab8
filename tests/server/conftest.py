"""Fixtures for the server's tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.processors.conftest import web

__all__ = ["web"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert "mlxvlm-engine" not in [thread.name for thread in threading.enumerate()]
