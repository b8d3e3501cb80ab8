"""The page and its server: settings that are sent, errors that come back, a server that goes away."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from tests.server.fake_api import Answer, FakeApi

if TYPE_CHECKING:
    from tests.server.browser import Page

SEEN = "A red heart and a black square on a white background."
RETRY = "[aria-label='Ask again']"


def test_settings_are_sent_and_kept(page: Page, api: FakeApi) -> None:
    given = {"system": "Be brief.", "temperature": "0.5", "top_p": "0.9", "max_tokens": "64", "seed": "7"}
    page.one("#open-settings").click()
    for name, value in given.items():
        page.one(f"#settings [name={name}]").send_keys(value)
    page.one("#settings [value=save]").click()
    page.browser.refresh()
    page.wait(lambda: page.texts("#model option"))
    page.run("const m = document.querySelector('#model'); m.selectedIndex = 1; m.dispatchEvent(new Event('change'))")
    page.ask("Well?")
    body = api.bodies[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.5, 0.9, 64, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["model"] == "Qwen/Qwen2-VL-2B-Instruct"


def test_an_api_key_is_asked_for(page: Page, api: FakeApi) -> None:
    api.key = "secret"
    page.open()
    page.wait(lambda: "asks for an API key" in page.one("#banner").text)
    page.one("#banner button").click()
    page.one("#settings [name=key]").send_keys("secret", "\ue007")
    page.wait(lambda: page.one("#banner").text == "")
    page.ask("Well?")
    assert page.answers() == [SEEN]
    kept = page.run("return [JSON.stringify({...localStorage}), JSON.stringify({...sessionStorage})]")
    assert "secret" not in kept[0]
    assert json.loads(kept[1]) == {"mlxvlm.key": "secret"}


def test_errors_are_shown_in_their_place(page: Page, api: FakeApi) -> None:
    failures = [Answer(error=(400, "max_tokens is too large.")), Answer(error=(429, "Busy."), retry_after_s=5)]
    api.say(*failures, Answer("Half", error=(200, "Out of memory.")), Answer("Lost", finish=None), SEEN)
    page.ask("Well?")
    expected = [
        ("", "max_tokens is too large."),
        ("", "Busy. (try again in 5 s)"),
        ("Half", "Out of memory."),
        ("Lost", "The connection ended before the answer was complete."),
    ]
    for text, problem in expected:
        page.wait(lambda problem=problem: page.texts(".answer .problem") == [problem], problem)
        assert page.answers() == [text]
        page.one(RETRY).click()
    page.wait(lambda: page.answers() == [SEEN] and not page.find(".answer .problem"))


def test_an_answer_that_is_cut_says_so(page: Page, api: FakeApi) -> None:
    api.say(Answer("Once upon", finish="length"))
    page.ask("A story.")
    assert page.texts(".answer .note") == ["The answer reached the most tokens allowed."]


def test_a_server_that_does_not_measure(page: Page, api: FakeApi) -> None:
    api.say(Answer("word " * 30, piece=5, pause_s=0.01, is_measured=False))
    page.ask("Count.")
    parts = page.texts(".figures")[0].split(" · ")
    assert parts[:2] == ["7 prompt tokens", "30 answer tokens"]
    assert re.fullmatch(r"\d+\.\d tok/s", parts[2])
    assert re.fullmatch(r"first after \d+\.\d\d s", parts[3])


def test_the_server_goes_away_and_comes_back(page: Page, api: FakeApi) -> None:
    page.browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.ask("Well?")
    assert page.texts(".answer .problem") == ["The server can’t be reached. Is it still running?"]
    page.wait(lambda: "Trying again" in page.one("#banner").text)
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    page.wait(lambda: page.one("#banner").text == "")
    page.one(RETRY).click()
    page.wait(lambda: page.answers() == [SEEN])


def test_a_server_that_dies_in_the_middle(page: Page, api: FakeApi) -> None:
    api.say(Answer("Half of it", pause_s=0.2, is_broken=True))
    page.ask("Well?")
    assert page.texts(".answer .problem") == ["The connection to the server was lost."]
    assert page.answers() == ["Half of it"]
