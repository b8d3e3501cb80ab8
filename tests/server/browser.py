"""A headless Chromium on the page, in the words of somebody who uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

PICTURES = Path(__file__).parent.parent.parent / "examples" / "pictures"
HEART = PICTURES / "red-heart-black-square.png"

# No connection but to the page: background updates would fail one after the other on a machine without network.
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--force-prefers-reduced-motion"),
]
_WAIT_S = 20.0


@contextmanager
def chromium(binary: str, driver: str, profile: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*_FLAGS, f"--user-data-dir={profile}", "--window-size=1200,850"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """The page at `url`; every wait ends with an AssertionError after 20 s."""

    def __init__(self, browser: webdriver.Chrome, url: str):
        self.browser = browser
        self.url = url

    def open(self, path: str = "/") -> None:
        """Loads the page anew and waits for the models."""
        self.browser.get("about:blank")
        self.browser.get(self.url + path)
        self.wait(lambda: self.find("#composer textarea") and self.find("#messages"))

    def forget(self) -> None:
        """Leaves no conversation, setting or zoom behind."""
        self.browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": self.url, "storageTypes": "all"})
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        self.browser.get_log("browser")

    def find(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> WebElement:
        self.wait(lambda: bool(self.find(selector)), selector)
        return self.find(selector)[0]

    def wait(self, is_so: Callable[[], Any], what: str = "") -> None:
        def holds() -> bool:
            try:
                return bool(is_so())
            except StaleElementReferenceException:  # drawn anew while it was read
                return False

        end = time.monotonic() + _WAIT_S
        while not holds():
            assert time.monotonic() < end, f"it did not happen: {what or is_so}"
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def import_and(self, module: str, script: str, *arguments: Any) -> Any:
        """Runs `script` with the exports of one of the page's modules as `module`; its value may be a promise."""
        code = f"""
            const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);
            import('/ui/{module}').then(async (module) => {{ {script} }})
                .then(done, (error) => done('error: ' + error));"""
        return self.browser.execute_async_script(code, *arguments)

    def attach(self, *pictures: Path) -> None:
        before = len(self.find("#composer .thumbs li"))
        self.one("#composer input[type=file]").send_keys("\n".join(map(str, pictures)))
        self.wait(lambda: len(self.find("#composer .thumbs li")) == before + len(pictures))

    def ask(self, text: str, wait: bool = True) -> None:
        before = len(self.find(".answer"))
        self.one("#composer textarea").send_keys(text, Keys.ENTER)
        self.wait(lambda: len(self.find(".answer")) == before + 1, "an answer begins")
        if wait:
            self.finished()

    def finished(self) -> None:
        self.wait(lambda: self.find(".answer") and not self.find(".answer[aria-busy=true]"), "the answer ends")

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.find(selector)]

    def answers(self) -> list[str]:
        return self.texts(".answer .markdown")

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        """The accessible name of what has the focus."""
        return str(self.browser.switch_to.active_element.accessible_name)

    def complaints(self, but: Sequence[str] = ()) -> list[str]:
        """What the console said, policy violations and script errors among it."""
        lines = [entry["message"] for entry in self.browser.get_log("browser")]
        return [line for line in lines if not any(part in line for part in but)]
