"""The page on the server that `mlxvlm serve` runs, with the demo model behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.golden import GOLDENS
from tests.server.whole import whole

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ITEMS = json.loads((GOLDENS / "demo" / "golden.json").read_text())["items"]
ITEM = next(item for item in ITEMS if len(item["images"]) == 1 and len(item["messages"]) == 1)


def test_a_question_about_a_picture(chrome: Chrome) -> None:
    from tests.server.browser import Page

    question = next(part["text"] for part in ITEM["messages"][0]["content"] if part["type"] == "text")
    with whole() as server:
        page = Page(chrome, server.url)
        page.forget()
        page.open()
        page.wait(lambda: page.texts("#model option") == ["demo"])
        page.attach(GOLDENS / "demo" / ITEM["images"][0])
        page.ask(question)
        assert page.answers() == [ITEM["text"].strip()]
        assert page.complaints() == []
        chrome.get(f"{server.url}/docs")
        assert "POST /v1/chat/completions" in chrome.page_source
        assert chrome.execute_script("return getComputedStyle(document.body).maxWidth") == "960px", "styles apply"
        assert page.complaints() == []
        chrome.get("about:blank")
