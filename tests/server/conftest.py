"""Fixtures for the server's tests."""

from __future__ import annotations

from tests.processors.conftest import web

__all__ = ["web"]
