"""The page for everybody: axe-core finds nothing serious, and the keyboard alone is enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.fake_api import Answer, FakeApi

if TYPE_CHECKING:
    from tests.server.browser import Page

HEART = Path(__file__).parent.parent.parent / "examples" / "pictures" / "red-heart-black-square.png"
RICH = """# Shapes

Two **shapes**, *one* `heart`, see [the manual](https://manual.example/) or ![a chart](https://chart.example/c.png):

| shape | colour |
|:--|--:|
| heart | red |

```python
print("heart")
```

1. one
   - two

> quoted

---

$$a^2$$
"""
TAB, ENTER, ESCAPE, SHIFT = "\ue004", "\ue007", "\ue00c", "\ue008"


def converse(page: Page, api: FakeApi) -> None:
    """A conversation with everything in it: a picture, rich text, an error."""
    page.attach(HEART)
    api.say(RICH, Answer("Half", error=(200, "Out of memory.")))
    page.ask("What do you see?")
    page.ask("And now?")


def serious(page: Page, axe: str) -> list[Any]:
    """Serious and critical violations, with the elements they are about."""
    page.run(axe)
    found = page.browser.execute_async_script(
        "const done = arguments[0]; axe.run(document).then((found) => done(found.violations), (e) => done(String(e)));"
    )
    assert isinstance(found, list), found
    bad = [each for each in found if each["impact"] in ("serious", "critical")]
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in bad]


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    path = pytestconfig.getoption("--axe")
    if path is None:
        pytest.skip("needs --axe FILE, axe.min.js of the npm package axe-core")
    return str(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, api: FakeApi, axe: str, scheme: str, width: int) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.wait(lambda: page.run("return document.documentElement.dataset.theme") == scheme)
    assert serious(page, axe) == []
    converse(page, api)
    page.attach(HEART)
    assert serious(page, axe) == []
    page.one("[aria-label='Edit and ask again']").click()
    assert serious(page, axe) == []
    page.one("#open-settings").click()
    assert serious(page, axe) == []
    page.press(ESCAPE)
    if width < 600:
        page.one("#open-sidebar").click()
        assert serious(page, axe) == []
        page.one("#close-sidebar").click()


def tab_to(page: Page, name: str, key: str = TAB) -> None:
    for _ in range(60):
        if page.focused() == name:
            return
        page.press(key)
    raise AssertionError(f"the focus does not reach {name!r}")


def test_the_keyboard_is_enough(page: Page, api: FakeApi) -> None:
    api.say("one", "two", "three", Answer("word " * 2000, pause_s=0.01), "five")
    assert page.focused() == "Message"
    page.press("First?", ENTER)
    page.finished()
    assert page.focused() == "Message"
    page.press("Second?", ENTER)
    page.wait(lambda: page.answers() == ["one", "two"])
    page.finished()
    tab_to(page, "Edit and ask again")
    page.press(ENTER)
    assert page.focused() == "Edit the message"
    page.press(ESCAPE)
    assert page.focused() == "Edit and ask again"
    tab_to(page, "Ask again")
    page.press(ENTER)
    page.wait(lambda: page.answers() == ["one", "three"])
    page.finished()
    assert page.focused() == "Message"
    page.press("Count.", ENTER)
    page.wait(lambda: "word word" in page.answers()[-1])
    page.press(ESCAPE)
    page.finished()
    assert page.texts(".answer .note") == ["Stopped."]
    tab_to(page, "Rename First?")
    page.press(ENTER)
    page.press("Numbers", ENTER)
    page.wait(lambda: page.texts("#conversations a") == ["Numbers"])
    tab_to(page, "New chat")
    page.press(ENTER)
    page.wait(lambda: not page.find(".answer"))
    tab_to(page, "Delete Numbers")
    page.press(ENTER)
    tab_to(page, "Delete")
    page.press(ENTER)
    page.wait(lambda: not page.find("#conversations a"))
    assert page.focused() == "Message"


def test_each_stop_shows_the_focus(page: Page, api: FakeApi) -> None:
    """From the top, Tab goes through everything that can be used, in the order of the page, and each stop is seen."""
    converse(page, api)
    page.run("document.activeElement.blur(); document.body.tabIndex = -1; document.body.focus()")
    script = """
        const node = document.activeElement, style = getComputedStyle(node), box = node.closest(".composer");
        const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
        const shown = outlined || (box && getComputedStyle(box).boxShadow !== "none");
        const { width, height } = node.getBoundingClientRect();
        return [node.tagName, shown && width > 0 && height > 0];"""
    names = []
    for _ in range(60):
        page.press(TAB)
        tag, is_shown = page.run(script)
        if tag == "BODY" or (names and page.focused() == names[0]):
            break
        names.append(page.focused())
        assert is_shown, names
    start = ["Skip to the message box", "New chat", "What do you see?", "Rename What do you see?"]
    assert names[:4] == start
    assert names[4:10] == ["Delete What do you see?", "Export", "Import", "Model", "Use dark colours", "Settings"]
    rest = [
        "Edit and ask again",
        HEART.name,
        "the manual",
        "a chart",
        "Table",
        "Copy the code",
        "Code",
        "Copy the answer",
    ]
    assert [name for name in rest if name not in names] == []
    assert names[-2:] == ["Attach pictures", "Message"]


def test_finished_blocks_are_announced(page: Page, api: FakeApi) -> None:
    assert page.one("#live").get_attribute("aria-live") == "polite"
    page.run(
        """
        window.told = [];
        new MutationObserver((changes) => changes.forEach((change) =>
            change.addedNodes.forEach((node) => window.told.push(node.textContent)))
        ).observe(document.querySelector("#live"), { childList: true, subtree: true });
        """
    )
    api.say(Answer("One block.\n\nAnother block.\n\nThe last.", piece=1))
    page.ask("Well?")
    page.wait(lambda: page.run("return window.told") == ["One block.", "Another block.", "The last."])
    page.browser.refresh()  # history is not read out
    page.wait(lambda: page.answers() != [])
    assert page.run("return document.querySelector('#live').childNodes.length") == 0


def test_the_theme_is_switched_and_kept(page: Page) -> None:
    page.one("[aria-label='Use dark colours']").click()
    page.browser.refresh()
    assert page.run("return document.documentElement.dataset.theme") == "dark"
    page.one("[aria-label='Use light colours']").click()
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 250)"


def test_the_systems_colours_change_while_the_page_is_open(page: Page) -> None:
    for scheme, label in (("dark", "Use light colours"), ("light", "Use dark colours")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.one(f"[aria-label='{label}']")
        assert page.run("return document.documentElement.dataset.theme") == scheme


def test_the_list_on_a_narrow_screen(page: Page) -> None:
    size = {"width": 390, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert not page.one("#new-chat").is_displayed()
    page.one("#open-sidebar").click()
    assert page.focused() == "Close the list"
    assert page.one("#new-chat").is_displayed()
    assert page.run("return document.querySelector('#stage').inert")
    page.press(ESCAPE)
    page.wait(lambda: not page.one("#new-chat").is_displayed())
    assert page.focused() == "Conversations"
