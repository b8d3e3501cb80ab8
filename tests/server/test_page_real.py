"""The page on the server that `mlxvlm serve` runs, with the demo model behind it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlxvlm.engine.request import Delta
from mlxvlm.engine.stream import Stream
from mlxvlm.server.registry import ModelSpec
from tests.fakes import eventually
from tests.golden import GOLDENS
from tests.server.whole import Whole, whole

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from tests.server.browser import Page

DEMO = Path(__file__).parents[2] / "mlxvlm" / "demo"
ITEMS = json.loads((GOLDENS / "demo" / "golden.json").read_text())["items"]
ITEM = next(item for item in ITEMS if len(item["images"]) == 1 and len(item["messages"]) == 1)
HOSTILE = "<script>document.title = 'taken'</script> ![chart]({own}/beacon?secret=1) <img src={own}/beacon>\n\n"


@contextmanager
def opened(chrome: Chrome, model: str = "demo") -> Iterator[tuple[Page, Whole]]:
    from tests.server.browser import Page

    with whole([ModelSpec("demo", model)]) as server:
        page = Page(chrome, server.url)
        page.forget()
        page.open()
        page.wait(lambda: page.texts("#model option") == ["demo"])
        yield page, server
        chrome.get("about:blank")


def test_a_question_about_a_picture(chrome: Chrome) -> None:
    question = next(part["text"] for part in ITEM["messages"][0]["content"] if part["type"] == "text")
    with opened(chrome) as (page, server):
        page.attach(GOLDENS / "demo" / ITEM["images"][0])
        page.ask(question)
        assert page.answers() == [ITEM["text"].strip()]
        page.open()
        page.one("#conversations a").click()
        page.wait(lambda: page.answers() == [ITEM["text"].strip()])
        assert page.complaints() == []
        chrome.get(f"{server.url}/docs")
        assert "POST /v1/chat/completions" in chrome.page_source
        assert chrome.execute_script("return getComputedStyle(document.body).maxWidth") == "960px", "styles apply"
        assert page.complaints() == []


def endless(folder: Path) -> str:
    """The demo model with no token that ends an answer."""
    model = Path(shutil.copytree(DEMO, folder / "model"))
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.0}')
    config = json.loads((model / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("eos_token_id", None)
    (model / "config.json").write_text(json.dumps(config))
    return str(model)


def test_a_long_answer_is_stopped(chrome: Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Stream.put

    def slow(stream: Stream, item: Any) -> None:
        time.sleep(0.02)
        put(stream, item)

    monkeypatch.setattr(Stream, "put", slow)
    with opened(chrome, endless(tmp_path)) as (page, server):
        page.ask("Hello!", wait=False)
        page.wait(lambda: len(page.answers()[0]) > 20)
        page.one("[aria-label=Stop]").click()
        page.finished()
        assert page.texts(".answer .note") == ["Stopped."]
        assert eventually(lambda: server.registry.figures()["demo"].running == 0), "the engine is told"
        assert server.registry.figures()["demo"].generated_tokens < 2000
        [kept] = page.answers()
        page.browser.refresh()
        page.wait(lambda: page.answers() == [kept])


def test_what_the_model_writes_does_nothing(chrome: Chrome, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Stream.put
    with opened(chrome) as (page, server):
        # The policy lets pictures come from the page's own server.
        text = HOSTILE.replace("{own}", server.url)

        def hostile(stream: Stream, item: Any) -> None:
            put(stream, replace(item, text=text) if isinstance(item, Delta) and item.text else item)

        monkeypatch.setattr(Stream, "put", hostile)
        page.ask("Hello!")
        assert "<script>document.title = 'taken'</script>" in page.answers()[0]
        assert page.one(".markdown a").text == "chart"
        page.run("return new Promise((resolve) => setTimeout(resolve, 300))")  # what loads, begins to by now
        assert page.find(".markdown img, .markdown script") == []
        assert page.browser.title != "taken"
        assert page.complaints() == [], "a beacon would be told as missing"
