"""The page in Chromium, against canned answers: what somebody who chats does with it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.server.fake_api import Answer, FakeApi

if TYPE_CHECKING:
    from tests.server.browser import Page

SEEN = "A red heart and a black square on a white background."
PICTURES = Path(__file__).parent.parent.parent / "examples" / "pictures"
HEART = PICTURES / "red-heart-black-square.png"
WIDE = PICTURES / "yellow-circle-purple-square.png"
LONG = Answer(text="word " * 4000, piece=5, pause_s=0.01)
EDIT = "[aria-label='Edit and ask again']"
RETRY = "[aria-label='Ask again']"


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture_part(path: Path) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(path)}}


def test_a_picture_is_asked_about(page: Page, api: FakeApi) -> None:
    page.attach(HEART, WIDE)
    page.ask("What do you see?")
    assert page.answers() == [SEEN]
    figures = "312 prompt tokens (280 cached) · 11 answer tokens · 41.3 tok/s · first after 0.38 s"
    assert page.texts(".figures") == [figures]
    parts = [picture_part(HEART), picture_part(WIDE), {"type": "text", "text": "What do you see?"}]
    body = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}}
    assert api.bodies == [{**body, "messages": [{"role": "user", "content": parts}]}]
    page.ask("And now?")
    answered = {"role": "assistant", "content": SEEN}
    assert api.bodies[1]["messages"] == [
        {"role": "user", "content": parts},
        answered,
        {"role": "user", "content": "And now?"},
    ]
    assert page.complaints() == []


def test_a_picture_alone_is_a_question(page: Page, api: FakeApi) -> None:
    page.attach(HEART)
    page.ask("")
    assert api.bodies[0]["messages"] == [{"role": "user", "content": [picture_part(HEART)]}]
    page.wait(lambda: page.texts("#conversations a") == [HEART.name])


def test_an_attached_picture_can_be_removed_or_enlarged(page: Page, api: FakeApi) -> None:
    page.attach(HEART, WIDE)
    page.one(f"[aria-label='Remove {HEART.name}']").click()
    page.ask("Which?")
    assert api.bodies[0]["messages"][0]["content"][0] == picture_part(WIDE)
    assert page.one(".picture img").size["width"] + 2 == page.one(".picture").size["width"]  # the border's two pixels
    page.one(".picture").click()
    assert page.one("#viewer img").get_attribute("alt") == WIDE.name
    page.press("\ue00c")  # Escape
    assert not page.one("#viewer").is_displayed()


def dropped(page: Page, kind: str, name: str, media_type: str, content: bytes) -> None:
    """Drops or pastes a file, as the browser would tell the page of it."""
    page.run(
        """
        const [kind, name, type, content] = arguments;
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, { type }));
        const event = kind === "paste"
            ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
            : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
        document.querySelector("#composer textarea").dispatchEvent(event);
        """,
        *(kind, name, media_type, base64.b64encode(content).decode()),
    )


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted(page: Page, api: FakeApi, kind: str) -> None:
    dropped(page, kind, "heart.png", "image/png", HEART.read_bytes())
    page.one("#composer .thumbs li")
    page.ask("What?")
    assert api.bodies[0]["messages"][0]["content"][0] == picture_part(HEART)


@pytest.mark.parametrize(("name", "problem"), [("a.heic", "can’t read HEIC"), ("a.png", "is not a picture that")])
def test_what_is_no_picture_is_refused(page: Page, name: str, problem: str) -> None:
    dropped(page, "drop", name, "", b"no picture")
    page.wait(lambda: problem in page.one("#composer .problem").text)
    assert page.one("#composer .problem").text.startswith(name)
    assert not page.find("#composer .thumbs li")


def test_huge_pictures_are_scaled_down(page: Page, api: FakeApi, tmp_path: Path) -> None:
    Image.new("RGB", (5000, 1000), "green").save(tmp_path / "wide.png")
    page.attach(tmp_path / "wide.png")
    page.ask("What?")
    url = api.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    head, content = url.split(",")
    assert head == "data:image/jpeg;base64"
    (tmp_path / "sent.jpg").write_bytes(base64.b64decode(content))
    with Image.open(tmp_path / "sent.jpg") as sent:
        assert sent.size == (4096, 819)


def test_a_long_answer_is_stopped(page: Page, api: FakeApi) -> None:
    api.say(LONG)
    page.ask("Count.", wait=False)
    page.wait(lambda: "word word" in page.answers()[0])
    page.one("[aria-label=Stop]").click()
    page.finished()
    page.wait(lambda: api.num_disconnected == 1, "the server is told")
    assert page.texts(".answer .note") == ["Stopped."]
    kept = page.answers()[0]
    assert kept.startswith("word word")
    page.open(page.run("return location.pathname + location.hash"))
    page.wait(lambda: page.answers() == [kept])
    api.say(SEEN)
    page.ask("Go on.")
    assert api.bodies[1]["messages"][1]["content"].strip() == kept


def test_history_is_found_after_a_reload(page: Page) -> None:
    page.attach(HEART)
    page.ask("What do you see?")
    page.open()  # without the conversation's name: a new chat
    page.wait(lambda: page.texts("#conversations a") == ["What do you see?"])
    assert page.find(".answer") == []
    page.one("#conversations a").click()
    page.wait(lambda: page.answers() == [SEEN])
    assert page.one(".picture img").get_attribute("src") == data_url(HEART)
    assert page.texts(".bubble") == ["What do you see?"]
    assert "41.3 tok/s" in page.texts(".figures")[0]
    page.browser.refresh()
    page.wait(lambda: page.answers() == [SEEN])


SLOW_STORAGE = """
    const { open } = IDBFactory.prototype;
    const { set } = Object.getOwnPropertyDescriptor(IDBRequest.prototype, "onsuccess");
    IDBFactory.prototype.open = function (...given) {
        const request = open.apply(this, given);
        const later = (then) => set.call(request, (event) => setTimeout(() => then(event), 1000));
        Object.defineProperty(request, "onsuccess", { set: later });
        return request;
    };"""


def test_a_question_before_the_history_is_read(page: Page) -> None:
    added = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SLOW_STORAGE})
    page.open()
    page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    page.ask("First?")
    page.wait(lambda: page.texts("#conversations a") == ["First?"])
    assert page.answers() == [SEEN]


def test_leaving_in_the_middle_of_an_answer(page: Page, api: FakeApi) -> None:
    api.say(LONG)
    page.ask("Count.", wait=False)
    page.browser.refresh()
    page.wait(lambda: page.texts(".answer .problem") == ["The page was left before the answer was complete."])
    api.say(SEEN)
    page.one(RETRY).click()
    page.finished()
    page.wait(lambda: page.answers() == [SEEN])


def test_an_earlier_question_is_edited(page: Page, api: FakeApi) -> None:
    page.attach(HEART)
    api.say("one", "two", "three")
    page.ask("First?")
    page.ask("Second?")
    page.find(EDIT)[0].click()
    box = page.one(".question textarea")
    assert box.get_property("value") == "First?"
    page.press("\ue00c")  # Escape: nothing happened
    assert page.texts(".bubble") == ["First?", "Second?"]
    page.find(EDIT)[0].click()
    page.one(".question textarea").send_keys(" Again?", "\ue007")
    page.wait(lambda: page.answers() == ["three"])
    assert page.texts(".bubble") == ["First? Again?"]
    content = [picture_part(HEART), {"type": "text", "text": "First? Again?"}]
    assert api.bodies[2]["messages"] == [{"role": "user", "content": content}]


def test_an_answer_is_asked_for_again(page: Page, api: FakeApi) -> None:
    api.say("one", "two", "three")
    page.ask("First?")
    page.ask("Second?")
    assert [each.is_displayed() for each in page.find(RETRY)] == [False, True]  # what follows is not thrown away
    page.find(RETRY)[1].click()
    page.wait(lambda: page.answers() == ["one", "three"])
    assert api.bodies[2] == api.bodies[1]


def test_conversations_go_on_beside_each_other(page: Page, api: FakeApi) -> None:
    api.say(Answer("slow " * 100, piece=5, pause_s=0.02), SEEN)
    page.ask("First?", wait=False)
    page.one("#new-chat").click()
    page.wait(lambda: not page.find(".answer"))
    page.ask("Second?")
    assert page.answers() == [SEEN]
    page.wait(lambda: page.texts("#conversations a") == ["Second?", "First?"])
    page.run("document.querySelectorAll('#conversations a')[1].click()")  # at once: the list is drawn anew meanwhile
    page.wait(lambda: page.texts(".bubble") == ["First?"])
    page.finished()
    assert page.answers() == [("slow " * 100).strip()]


def test_conversations_are_renamed_and_deleted(page: Page) -> None:
    page.ask("First?")
    page.one("[aria-label='Rename First?']").click()
    page.press("Other", "\ue00c")  # Escape
    page.wait(lambda: page.texts("#conversations a") == ["First?"])
    assert page.focused() == "First?"
    page.one("[aria-label='Rename First?']").click()
    page.press("Shapes", "\ue007")
    page.wait(lambda: page.texts("#conversations a") == ["Shapes"])
    assert page.browser.title == "Shapes · mlxvlm"
    page.one("[aria-label='Delete Shapes']").click()
    assert page.one("#confirm-text").text == "Delete “Shapes”?"
    page.one("#confirm [value=no]").click()
    assert page.texts("#conversations a") == ["Shapes"]
    page.one("[aria-label='Delete Shapes']").click()
    page.one("#confirm [value=yes]").click()
    page.wait(lambda: not page.find("#conversations a") and not page.find(".answer"))
    page.browser.refresh()
    page.one("#composer textarea")
    assert page.texts("#conversations a") == []


def test_conversations_go_to_a_file_and_back(page: Page, tmp_path: Path) -> None:
    page.attach(HEART)
    page.ask("What do you see?")
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.one("#export").click()
    page.wait(lambda: list(tmp_path.glob("mlxvlm-*.json")), "a file is downloaded")
    file = next(tmp_path.glob("mlxvlm-*.json"))
    page.forget()
    page.open()
    page.one("#import-file").send_keys(str(file))
    page.wait(lambda: page.texts("#conversations a") == ["What do you see?"])
    page.one("#conversations a").click()
    page.wait(lambda: page.answers() == [SEEN])
    assert page.one(".picture img").get_attribute("src") == data_url(HEART)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "mlxvlm conversations 1"}', "null"])
def test_files_of_others_are_refused(page: Page, tmp_path: Path, content: str) -> None:
    (tmp_path / "some.json").write_text(content)
    page.one("#import-file").send_keys(str(tmp_path / "some.json"))
    page.wait(lambda: page.one("#banner").text.startswith("some.json "))
    assert page.complaints() == []


def test_a_question_without_an_answer_is_asked_with_the_next(page: Page, api: FakeApi) -> None:
    api.say(Answer(error=(503, "Loading.")), SEEN)
    page.attach(HEART)
    page.ask("First?")
    page.ask("Second?")
    content = [picture_part(HEART), {"type": "text", "text": "First?\n\nSecond?"}]
    assert api.bodies[1]["messages"] == [{"role": "user", "content": content}]


def test_a_title_that_is_being_written_is_left_alone(page: Page, api: FakeApi) -> None:
    api.say(Answer("word " * 40, piece=5, pause_s=0.02))
    page.ask("First?", wait=False)
    page.one("[aria-label='Rename First?']").click()
    page.press("Shap")
    page.finished()
    page.press("es", "\ue007")
    page.wait(lambda: page.texts("#conversations a") == ["Shapes"])


def test_long_pastes_and_lines(page: Page, api: FakeApi) -> None:
    text = "x" * 10_000
    page.run("const a = document.querySelector('#composer textarea'); a.focus(); a.value = arguments[0];"
             "a.dispatchEvent(new Event('input'))", text)  # fmt: skip
    page.ask("")
    assert api.bodies[0]["messages"][0]["content"] == text
    for width in (1200, 360):
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert page.run("return [document.documentElement, document.querySelector('main')]"
                        ".every((node) => node.scrollWidth <= node.clientWidth)")  # fmt: skip


def test_enter_sends_and_shift_enter_does_not(page: Page, api: FakeApi) -> None:
    page.one("#composer textarea").send_keys("a", "\ue008", "\ue007", "\ue008", "b")
    assert api.bodies == []
    page.ask("")
    assert api.bodies[0]["messages"][0]["content"] == "a\nb"
    page.run("document.querySelector('#composer textarea').value = 'かな'")
    page.run("document.querySelector('#composer textarea').dispatchEvent("
             "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true }))")  # fmt: skip
    assert page.one("#composer textarea").get_property("value") == "かな"


def test_the_end_is_followed_until_somebody_scrolls_up(page: Page, api: FakeApi) -> None:
    api.say(Answer("line\n\n" * 400, piece=6, pause_s=0.01))
    page.ask("Count.", wait=False)
    far = "const s = document.querySelector('#scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight"
    page.wait(lambda: page.run("return document.querySelector('#scroller').scrollTop") > 500)
    assert page.run(far) < 48
    page.run("document.querySelector('#scroller').scrollTop = 100")
    before = len(page.find(".markdown p"))
    page.wait(lambda: len(page.find(".markdown p")) > before + 20)
    assert page.run("return document.querySelector('#scroller').scrollTop") == 100
    page.one("#latest").click()
    page.finished()
    page.wait(lambda: page.run(far) < 48)
