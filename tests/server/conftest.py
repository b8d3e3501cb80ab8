"""The packaged demo model behind HTTP, and what tests of the server share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import openai
import pytest

import mlxvlm
from mlxvlm.engine.engine import Engine
from mlxvlm.server.app import create_app
from mlxvlm.server.models import SingleModel
from tests.processors.conftest import web
from tests.server.serving import client_of, serving

__all__ = ["web"]


@pytest.fixture(scope="session")
def demo_engine() -> Iterator[Engine]:
    with mlxvlm.load("demo") as engine:
        yield engine


@pytest.fixture(scope="session")
def demo_url(demo_engine: Engine) -> Iterator[str]:
    with serving(create_app(SingleModel("demo", demo_engine))) as url:
        yield url


@pytest.fixture(scope="session")
def client(demo_url: str) -> Iterator[openai.OpenAI]:
    with client_of(demo_url) as client:
        yield client


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "mlxvlm-engine"}


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """For tests that must close every engine that they start."""
    before = engine_threads()
    yield
    assert engine_threads() <= before
