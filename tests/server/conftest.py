"""Chromium for the page's tests; they are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.server.fake_api import FakeApi, serving

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from tests.server.browser import Page


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
    with serving(api.app()) as url:
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
