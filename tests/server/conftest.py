"""What tests of the server share: the packaged demo model behind HTTP, and Chromium, where there is one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import openai
import pytest

import mlxvlm
from mlxvlm.agent.formats import tool_format
from mlxvlm.engine.engine import Engine
from mlxvlm.server.app import create_app
from mlxvlm.server.models import SingleModel
from tests.processors.conftest import web
from tests.server.fake_api import FakeApi
from tests.server.fake_api import serving as serving_fake
from tests.server.serving import client_of, serving

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from tests.server.browser import Page

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
def calling_url(demo_engine: Engine) -> Iterator[str]:
    """The demo model, and how it writes calls of tools."""
    tools = tool_format(demo_engine.processor.template, demo_engine.processor.tokenizer)
    with serving(create_app(SingleModel("demo", demo_engine, tools))) as url:
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


@pytest.fixture(scope="session")
def chrome(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    found = {name: pytestconfig.getoption(f"--{name}") or shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    pytest.importorskip("selenium", reason="needs selenium, of the extra `browser`")
    from tests.server.browser import chromium

    with chromium(str(found["chromium"]), str(found["chromedriver"]), tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[FakeApi, str]]:
    api = FakeApi()
    with serving_fake(api.app()) as url:
        yield api, url


@pytest.fixture
def api(served: tuple[FakeApi, str]) -> FakeApi:
    """What stands behind `page`, as new."""
    api, _ = served
    vars(api).update(vars(FakeApi()))
    return api


@pytest.fixture
def page(chrome: Chrome, api: FakeApi, served: tuple[FakeApi, str]) -> Iterator[Page]:
    """The page, opened, in a browser that knows nothing yet."""
    from tests.server.browser import Page

    page = Page(chrome, served[1])
    page.forget()
    page.open()
    page.wait(lambda: page.texts("#model option"))
    yield page
    chrome.get("about:blank")  # ends its connections
