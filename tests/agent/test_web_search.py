"""Search, pages, ranking and citations, from a server of our own."""

from __future__ import annotations

import importlib
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.agent.loop import Answer, BoundTool, call, run_in_thread, run_tools
from mlxvlm.agent.ranking import bm25, passages_of, words_of
from mlxvlm.agent.readable import blocks_of, decoded, title_of
from mlxvlm.agent.web_search import (
    MAX_RESULTS,
    PAGE_NAME,
    SEARCH_NAME,
    SearchOptions,
    SearchResult,
    WebSearch,
    ddgs_search,
    url_search,
)
from mlxvlm.errors import InputError, UsageError
from mlxvlm.messages import ToolCall, user

PAGE = """<!doctype html><html><head><title>Cats &amp; dogs</title><style>p {x: 1}</style></head><body>
<nav><ul><li><a href="/">A long menu of things that nobody reads</a></li></ul></nav>
<h1>Cats</h1><p>Cats sleep for <b>sixteen</b> hours a day, &eacute;h?<br>They purr while they are doing it.</p>
<div><a href="x">Read more about this in other places</a></div><!-- <p>A comment that is no text at all.</p> -->
<script>if (a < b) { document.write("<p>a paragraph of a script</p>") }</script><p>Short.</p>
<p>Dogs bark at the postman; if 1 < 2 they bark again.</p></body></html>"""
BLOCKS = [
    "Cats",
    "Cats sleep for sixteen hours a day, éh?",
    "They purr while they are doing it.",
    "Dogs bark at the postman; if 1 < 2 they bark again.",
]


class TestPages:
    def test_a_page(self) -> None:
        assert title_of(PAGE) == "Cats & dogs"
        assert blocks_of(PAGE) == BLOCKS

    def test_upper_case_and_odd_letters(self) -> None:
        # The capital İ becomes two characters in lower case.
        page = "İ" * 9 + " is what this text begins with<SCRIPT>no</SCRIPT><P>and this is what it goes on with</P>"
        assert blocks_of(page) == ["İ" * 9 + " is what this text begins with", "and this is what it goes on with"]
        assert title_of("İİ<TITLE>x</TITLE>") == "x"

    def test_plain_text(self) -> None:
        assert blocks_of("One\nline.\n\nTwo.") == ["One line.", "Two."]

    def test_what_is_never_closed(self) -> None:
        text = "This text must be found in the page."
        for start in ("<nav>", "<script>", "<form><div>", '<p class="', "<a>x</a>"):
            assert blocks_of(f"{start}<p>{text}</p>") == [text]
        assert blocks_of(f"<p>{text}</p><!-- no end <p>{text}</p>") == [text]

    @given(st.text("<>/!-ab\"' &;=p", max_size=60))
    def test_garbage(self, page: str) -> None:
        blocks_of(page)
        title_of(page)

    @pytest.mark.parametrize("unit", ["<", "<!--", "<a ", "<script>", "</script", '<a "', "<!a", "&", "<nav></nav>"])
    def test_broken_pages_come_to_an_end(self, unit: str) -> None:
        """Where the time grew with the square, this would take hours."""
        blocks_of(unit * (2_000_000 // len(unit)))

    def test_encodings(self) -> None:
        assert decoded("é".encode()) == "é"
        assert decoded('<meta charset="iso-8859-1">é'.encode("latin-1")).endswith("é")
        for name in ("nonsense", "base64", "utf-8\x00", "undefined", "idna"):
            assert "a" in decoded(f"<meta charset={name}>a".encode())


class TestRanking:
    @given(st.lists(st.text("ab c", max_size=12), max_size=6), st.text("abc ", max_size=6))
    def test_the_formula(self, passages: list[str], query: str) -> None:
        words = [words_of(passage) for passage in passages]
        for index, score in enumerate(bm25(query, passages)):
            expected = 0.0
            for word in set(query.split()):
                having = sum(word in other for other in words)
                count = words[index].count(word)
                weight = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
                average = sum(map(len, words)) / len(words) or 1
                norm = 1.5 * (0.25 + 0.75 * len(words[index]) / average)
                expected += weight * count * 2.5 / (count + norm) if count else 0
            assert score == pytest.approx(expected)

    def test_scripts_without_spaces(self) -> None:
        scores = bm25("東京", ["大阪の話", "東京の天気は晴れ", "weather"])
        assert scores[1] > scores[0] == scores[2] == 0

    @given(st.lists(st.text("abc ", max_size=40).map(str.strip)))
    def test_passages_keep_all_words(self, blocks: list[str]) -> None:
        passages = passages_of(blocks, 10)
        assert all(0 < len(passage) <= 10 for passage in passages)
        letters = Counter("".join(blocks)) - Counter(" " * 10_000)
        assert Counter("".join(passages)) - Counter(" \n" * 10_000) == letters


RESULTS = [
    {"title": "Cats", "url": "https://a.example/cats", "description": "About cats."},
    {"title": "Dogs", "url": "https://b.example/dogs", "description": "About dogs.", "content": "Dogs bark.\nAt all."},
    {"title": "Bad", "url": "file:///etc/passwd", "description": "no"},
]


def shown(tool: BoundTool, **arguments: str) -> str:
    text: str = run_in_thread(lambda: call(tool.function, arguments))
    return text


def searching(**options: Any) -> WebSearch:
    return WebSearch(**{"search": lambda query: RESULTS, "fetch": lambda url: PAGE.encode(), **options})


class TestSearch:
    def test_sources_with_their_passages(self) -> None:
        search = searching()
        text = shown(search.tools()[0], query="cats sleep")
        assert text == (
            "[1] Cats\nhttps://a.example/cats\nAbout cats.\n" + "\n".join(BLOCKS) + "\n\n"
            "[2] Dogs\nhttps://b.example/dogs\nAbout dogs.\nDogs bark.\nAt all."
        )
        assert [source.title for source in search.sources] == ["Cats", "Dogs"]

    def test_the_budget_keeps_the_best(self) -> None:
        pages = [SearchResult(f"P{i}", f"https://x.example/{i}", "", f"{'word ' * 200}needle{i} ") for i in range(9)]
        for size, most in (("low", 4096), ("medium", 8192)):
            search = searching(
                search=lambda query: pages,
                options=SearchOptions(size),  # type: ignore[arg-type]
                count_tokens=lambda text: len(text),
            )
            text = shown(search.tools()[0], query="needle7")
            assert "needle7" in text
            assert len(text) <= most + 100
            assert all(f"[{i + 1}] P{i}" in text for i in range(9))
        assert text.count("word word") > 0

    def test_what_a_page_does_to_its_fetch_stays_its_own(self) -> None:
        def fetch(url: str) -> bytes:
            raise InputError("the address is private")

        text = shown(searching(fetch=fetch).tools()[0], query="cats")
        assert text.startswith("[1] Cats\nhttps://a.example/cats\nAbout cats.\n\n[2] Dogs")
        assert shown(searching(fetch=None).tools()[0], query="cats") == text
        assert len(searching(fetch=None).tools()) == 1

    def test_reading_a_page(self) -> None:
        search = searching()
        read = search.tools()[1]
        assert read.tool.name == PAGE_NAME
        assert shown(read, url="https://c.example/").startswith("[1] Cats & dogs\nhttps://c.example/\nCats\nCats sleep")
        for url in ("file:///etc/passwd", "data:text/html,x", "x", "http://[", "https://" + "x" * 3000):
            with pytest.raises(InputError, match="only http and https"):
                shown(read, url=url)

    def test_numbers_go_on_over_searches(self) -> None:
        search = searching()
        tool = search.tools()[0]
        shown(tool, query="a")
        search.search = lambda query: [RESULTS[1], {"link": "https://new.example", "snippet": "New."}]
        assert shown(tool, query="b").startswith("[2] Dogs")
        assert search.sources[2].url == "https://new.example"

    def test_results_are_bounded(self) -> None:
        fetched: list[str] = []
        many = [{"title": "x", "url": f"https://x.example/{index}"} for index in range(99)]
        search = searching(search=lambda query: many, fetch=lambda url: fetched.append(url) or "")
        shown(search.tools()[0], query="x")
        assert len(search.sources) == len(fetched) == MAX_RESULTS

    def test_nothing_found(self) -> None:
        assert shown(searching(search=lambda query: []).tools()[0], query="x") == "Nothing was found."

    @pytest.mark.parametrize("arguments", [{}, {"query": " "}, {"query": 3}])
    def test_a_question_is_needed(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="'query' is missing"):
            shown(searching().tools()[0], **arguments)

    def test_in_the_loop(self) -> None:
        search = searching(options=SearchOptions(location="Berlin, DE"))
        answers = [Answer("", (ToolCall("1", SEARCH_NAME, '{"query": "cats"}'),)), Answer("They sleep [1].")]
        outcome = run_in_thread(lambda: run_tools([user("?")], search.tools(), lambda turns, more: answers.pop(0)))
        assert "sixteen hours" in outcome.turns[1].text
        assert "The user is in Berlin, DE." in search.tools()[0].tool.description
        assert [citation.url for citation in search.citations(outcome.answer.text)] == ["https://a.example/cats"]


def test_citations() -> None:
    search = searching(sources=[SearchResult("A", "https://a.example/x"), SearchResult("B", "https://b.example")])
    text = "One [1], two [2][9], see (https://a.example/x), not https://a.example/xyz."
    found = search.citations(text)
    assert [(text[one.start_index : one.end_index], one.title) for one in found] == [
        ("[1]", "A"),
        ("[2]", "B"),
        ("https://a.example/x", "A"),
    ]
    assert found[0].as_annotation() == {
        "type": "url_citation",
        "url_citation": {"url": "https://a.example/x", "title": "A", "start_index": 4, "end_index": 7},
    }


def test_options() -> None:
    location = {"type": "approximate", "approximate": {"city": "Berlin", "country": "DE"}}
    options = SearchOptions.from_openai({"search_context_size": "low", "user_location": location})
    assert options == SearchOptions("low", "Berlin, DE", "DE")
    assert SearchOptions.from_openai({"user_location": {"type": "approximate", "city": "Rome"}}).location == "Rome"
    assert SearchOptions.from_openai({}) == SearchOptions("medium", "")
    for wrong in ({"search_context_size": "huge"}, {"user_location": "Rome"}, {"user_location": {"city": 3}}):
        with pytest.raises(InputError, match=r"search_context_size|user_location"):
            SearchOptions.from_openai(wrong)


class Service(BaseHTTPRequestHandler):
    answers: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.answers.get(self.path.split("?")[0])
        self.send_response(200 if body is not None else 500)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_service_of_the_users_own(service: str) -> None:
    Service.answers = {
        "/list": json.dumps(RESULTS).encode(),
        "/object": json.dumps({"results": [{"title": "T", "link": "https://x.example", "snippet": "S"}]}).encode(),
        "/wrong": b'"x"',
        "/huge": b"[" + b" " * 4_000_001 + b"]",
        "/html": b"<html>",
    }
    found = run_in_thread(lambda: call(url_search(f"{service}/list?lang=en"), "a b&c"))
    assert [result.title for result in found] == ["Cats", "Dogs", "Bad"]
    assert run_in_thread(lambda: call(url_search(f"{service}/object?text={{query}}"), "ü")) == [
        SearchResult("T", "https://x.example", "S")
    ]
    assert Service.asked == ["/list?lang=en&q=a%20b%26c", "/object?text=%C3%BC"]
    for path, error in (("wrong", InputError), ("huge", InputError), ("html", ValueError), ("none", Exception)):
        with pytest.raises(error):
            run_in_thread(lambda path=path: call(url_search(f"{service}/{path}"), "x"))  # type: ignore[misc]
    with pytest.raises(UsageError, match="no http or https address"):
        url_search("ftp://x")


def test_ddgs(monkeypatch: pytest.MonkeyPatch) -> None:
    ddgs = pytest.importorskip("ddgs")

    def text(self: Any, query: str, **options: Any) -> list[dict[str, str]]:
        if query == "nothing":
            raise ddgs.exceptions.DDGSException("No results found.")
        if query == "broken":
            raise ddgs.exceptions.DDGSException("no connection")
        return [{"title": query, "href": "https://x.example", "body": str(options["max_results"])}]

    monkeypatch.setattr(importlib.import_module("ddgs.ddgs").DDGS, "text", text)
    assert ddgs_search("q") == [SearchResult("q", "https://x.example", "10")]
    assert ddgs_search("nothing") == []
    with pytest.raises(ddgs.exceptions.DDGSException):
        ddgs_search("broken")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ddgs", None)
    with pytest.raises(UsageError, match=r"pip install 'mlxvlm\[search\]'"):
        ddgs_search("q")
