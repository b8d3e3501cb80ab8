"""Web search as tools of one answer: results, their pages' best passages, and citations. Fetches by a given function.

Sizes and limits are mistral.rs's: 10 results, 4,096, 8,192 or 16,384 tokens. What the web says is foreign text: the
loop takes special tokens out of it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import quote, urlsplit

from mlxvlm.agent.loop import BoundTool, call
from mlxvlm.agent.ranking import bm25, passages_of
from mlxvlm.agent.readable import blocks_of, decoded, title_of
from mlxvlm.agent.tools import Tool
from mlxvlm.errors import InputError, UsageError

ContextSize: TypeAlias = Literal["low", "medium", "high"]
BUDGETS: Mapping[ContextSize, int] = {"low": 4096, "medium": 8192, "high": 16384}  # tokens of one tool result
MAX_RESULTS = 10
MAX_PLACE_CHARS = 100  # of each word for where the user is
SEARCH_TIMEOUT_S = 5.0
PAGE_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 4_000_000  # of a search service
SEARCH_NAME, PAGE_NAME = "search_the_web", "website_content_extractor"
_CHARS_PER_TOKEN = 4  # of English, roughly
_MAX_TITLE_CHARS, _MAX_DESCRIPTION_CHARS, _MAX_URL_CHARS = 200, 500, 2000
# DuckDuckGo's regions, country-language; a country with several has its largest language's.
# Source: https://duckduckgo.com/duckduckgo-help-pages/settings/params/
_REGIONS = (
    "ar-es at-de au-en be-nl bg-bg br-pt ca-en ch-de cl-es cn-zh co-es cz-cs de-de dk-da ee-et es-es fi-fi fr-fr gr-el "
    "hk-tzh hr-hr hu-hu id-id ie-en il-he in-en it-it jp-jp kr-kr lt-lt lv-lv mx-es my-ms nl-nl no-no nz-en pe-es "
    "ph-en pl-pl pt-pt ro-ro ru-ru se-sv sg-en sk-sk sl-sl th-th tr-tr tw-tzh ua-uk uk-en us-en ve-es vn-vi za-en"
)
_NO_REGION = "us-en"  # ddgs's own; some of its engines know no "everywhere"
_ISO = {"gb": "uk", "si": "sl"}  # where DuckDuckGo's country is not ISO's
_QUERY = {"query": {"type": "string", "description": "What to search for."}}
_URL = {"url": {"type": "string", "description": "The page's address."}}


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search finds. content: the page's text, where the search already has it."""

    title: str
    url: str
    description: str = ""
    content: str = ""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """`web_search_options`. location: the user's, as words ("Berlin, DE"); country: its ISO code, as far as known.

    max_uses: searches in one answer; pages that are read are not counted.
    """

    context_size: ContextSize = "medium"
    location: str = ""
    country: str = ""
    max_uses: int | None = None

    @classmethod
    def from_openai(cls, options: Mapping[str, Any]) -> SearchOptions:
        """From OpenAI's shape. Raises InputError naming the field."""
        size = options.get("search_context_size") or "medium"
        if size not in BUDGETS:
            raise InputError(f"search_context_size must be one of {', '.join(BUDGETS)}, not {size!r}")
        place = options.get("user_location") or {}
        place = place.get("approximate", place) if isinstance(place, Mapping) else place
        if not isinstance(place, Mapping):
            raise InputError("user_location must be an object with city, region, country or timezone")
        words = [place[name] for name in ("city", "region", "country", "timezone") if place.get(name)]
        if not all(isinstance(word, str) and len(word) <= MAX_PLACE_CHARS for word in words):
            raise InputError("city, region, country and timezone of user_location must be short texts")
        return cls(cast(ContextSize, size), ", ".join(words), place.get("country") or "", options.get("max_uses"))

    @property
    def region(self) -> str:
        """As DuckDuckGo names it."""
        country = self.country.lower()
        start = f"{_ISO.get(country, country)}-"
        return next((region for region in _REGIONS.split() if region.startswith(start)), _NO_REGION)


@dataclass(frozen=True, slots=True)
class Citation:
    """A place [start, end) of an answer that names a source."""

    url: str
    title: str
    start_index: int
    end_index: int

    def as_annotation(self) -> dict[str, Any]:
        """OpenAI's shape in a chat completion."""
        values = {"url": self.url, "title": self.title, "start_index": self.start_index, "end_index": self.end_index}
        return {"type": "url_citation", "url_citation": values}


# Both may be coroutine functions. A search gives SearchResults, or mappings with title, url, description, content;
# a fetch gives a page's bytes, and refuses what must not be fetched (private addresses) with an error.
Search: TypeAlias = Callable[[str], Any]
Fetch: TypeAlias = Callable[[str], Any]


@dataclass
class WebSearch:
    """The tools of one answer, and the sources that they have shown to the model.

    count_tokens: of a text; only the budget depends on it. room: tokens that a result may have at most, where the
    model's context is small.
    """

    search: Search
    fetch: Fetch | None = None
    options: SearchOptions = SearchOptions()
    count_tokens: Callable[[str], int] = lambda text: len(text) // _CHARS_PER_TOKEN
    room: int | None = None
    sources: list[SearchResult] = field(default_factory=list)
    num_uses: int = 0

    def tools(self) -> list[BoundTool]:
        """Search, and reading one page where there is a fetch."""
        place = f" The user is in {self.options.location}." if self.options.location else ""
        description = (
            "Searches the web and returns numbered sources. Use it for what is recent or not known to you, and name "
            f"the sources that an answer rests on by their numbers, as in [1].{place}"
        )
        tools = [BoundTool(_tool(SEARCH_NAME, description, _QUERY), self._search, SEARCH_TIMEOUT_S + PAGE_TIMEOUT_S)]
        if self.fetch is not None:
            description = "Returns the readable text of one web page."
            tools.append(BoundTool(_tool(PAGE_NAME, description, _URL), self._page, PAGE_TIMEOUT_S))
        return tools

    async def _search(self, arguments: Mapping[str, Any]) -> str:
        query = _argument(arguments, "query")
        most = self.options.max_uses
        if most is not None and self.num_uses >= most:
            raise InputError(f"no search is left of {most}: answer with what was found")
        self.num_uses += 1
        async with asyncio.timeout(SEARCH_TIMEOUT_S):
            found = await call(self.search, query)
        results = [_result(one) for one in found[:MAX_RESULTS]]
        results = [result for result in results if _is_web(result.url)]
        if not results:
            return "Nothing was found."
        pages = await asyncio.gather(*(self._read(result) for result in results))
        numbers = [self._number(page) for page in pages]
        return await asyncio.to_thread(self._shown, numbers, pages, query)  # millions of words, at worst

    async def _page(self, arguments: Mapping[str, Any]) -> str:
        url = _argument(arguments, "url")
        if not _is_web(url):
            raise InputError("only http and https addresses can be read")
        assert self.fetch is not None
        page = _text_of(await call(self.fetch, url))
        title, blocks = await asyncio.to_thread(_readable, page)
        result = SearchResult((title or url)[:_MAX_TITLE_CHARS], url, "", "\n".join(blocks))
        return await asyncio.to_thread(self._shown, [self._number(result)], [result], "")

    async def _read(self, result: SearchResult) -> SearchResult:
        """With the page's text; what can't be read keeps its description."""
        if result.content or self.fetch is None:
            return result
        try:
            async with asyncio.timeout(PAGE_TIMEOUT_S - 1):
                page = _text_of(await call(self.fetch, result.url))
        except Exception:  # noqa: BLE001 - whatever a page's server does, the other results stand
            return result
        _, blocks = await asyncio.to_thread(_readable, page)
        return replace(result, content="\n".join(blocks))

    def _number(self, result: SearchResult) -> int:
        """A source's number, the same for the same address."""
        for number, source in enumerate(self.sources, 1):
            if source.url == result.url:
                return number
        self.sources.append(result)
        return len(self.sources)

    def _shown(self, numbers: Sequence[int], pages: Sequence[SearchResult], query: str) -> str:
        """Sources with their best passages, as many as the budget holds; each source is named at least."""
        heads = [
            f"[{number}] {page.title}\n{page.url}\n{page.description}".strip()
            for number, page in zip(numbers, pages, strict=True)
        ]
        passages = [(at, text) for at, page in enumerate(pages) for text in passages_of(page.content.split("\n"))]
        scores = bm25(query, [text for _, text in passages])
        # With equal scores in the order of the results, and of the page.
        order = sorted(range(len(passages)), key=lambda index: -scores[index])
        budget = BUDGETS[self.options.context_size]
        left = min(budget, budget if self.room is None else self.room) - sum(map(self.count_tokens, heads))
        kept: list[int] = []
        for index in order:
            left -= self.count_tokens(passages[index][1])
            if left < 0:
                break
            kept.append(index)
        chosen = [
            [passages[index][1] for index in sorted(kept) if passages[index][0] == at] for at in range(len(pages))
        ]
        return "\n\n".join("\n".join([head, *texts]) for head, texts in zip(heads, chosen, strict=True))

    def citations(self, text: str) -> list[Citation]:
        """Where an answer names sources: [1], or their addresses."""
        found = []
        for match in re.finditer(r"\[(\d{1,4})\]", text):
            if 1 <= int(match[1]) <= len(self.sources):
                found.append((match.start(), match.end(), self.sources[int(match[1]) - 1]))
        for source in self.sources:
            for match in re.finditer(rf"{re.escape(source.url)}(?![\w/?=&#%-])", text):
                found.append((match.start(), match.end(), source))
        found.sort(key=lambda place: place[:2])
        return [Citation(source.url, source.title, start, end) for start, end, source in found]


def ddgs_search(query: str, region: str = _NO_REGION) -> list[SearchResult]:
    """By the `ddgs` package (extra "search"), which asks several engines without a key."""
    check_search(None)
    from ddgs import DDGS
    from ddgs.exceptions import DDGSException

    try:
        found = DDGS(timeout=int(SEARCH_TIMEOUT_S)).text(query, region=region, max_results=MAX_RESULTS)
    except DDGSException as error:
        if "No results" in str(error):
            return []
        raise
    return [SearchResult(one.get("title", ""), one.get("href", ""), one.get("body", "")) for one in found]


def check_search(address: str | None) -> None:
    """Raises UsageError for an address that is none; without one, where the package ddgs is missing."""
    if address is not None:
        url_search(address)
        return
    try:
        import ddgs  # noqa: F401
    except ImportError as error:
        raise UsageError("web search needs the package ddgs: pip install 'mlxvlm[search]'") from error


def search_by(address: str | None, options: SearchOptions) -> Search:
    """The search service at an address, or ddgs, which searches in the user's country."""
    return url_search(address) if address is not None else partial(ddgs_search, region=options.region)


def url_search(address: str) -> Search:
    """A search service of the user's own: `{query}` in its address, or a parameter q, answered by JSON.

    The answer is a list of results, or an object with one as "results": title, url, description, content.
    """
    if not _is_web(address):
        raise UsageError(f"the search address {address!r} is no http or https address")

    async def search(query: str) -> list[SearchResult]:
        import httpx2

        encoded = quote(query, safe="")
        joint = "&" if "?" in address else "?"
        url = address.replace("{query}", encoded) if "{query}" in address else f"{address}{joint}q={encoded}"
        body = bytearray()
        async with (
            httpx2.AsyncClient(timeout=SEARCH_TIMEOUT_S) as client,
            client.stream("GET", url, headers={"Accept": "application/json"}) as response,
        ):
            response.raise_for_status()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise InputError(f"the search service's answer has more than {MAX_ANSWER_BYTES} bytes")
        found = json.loads(body)
        found = found.get("results", []) if isinstance(found, dict) else found
        if not isinstance(found, list):
            raise InputError("the search service's answer is no list of results")
        return [_result(one) for one in found[:MAX_RESULTS]]

    return search


def _result(one: Any) -> SearchResult:
    if isinstance(one, SearchResult):
        one = asdict(one)
    if not isinstance(one, Mapping):
        raise InputError("a search result is no object with title, url, description and content")

    def text(*names: str) -> str:
        return next((value for name in names if isinstance(value := one.get(name), str)), "")

    title, description = text("title")[:_MAX_TITLE_CHARS], text("description", "snippet", "body")
    return SearchResult(title, text("url", "href", "link"), description[:_MAX_DESCRIPTION_CHARS], text("content"))


def _tool(name: str, description: str, properties: Mapping[str, Any]) -> Tool:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return Tool(name, description, schema)


def _argument(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"the argument {name!r} is missing")
    return value.strip()


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and len(url) <= _MAX_URL_CHARS


def _text_of(page: Any) -> str:
    return page if isinstance(page, str) else decoded(bytes(page))


def _readable(page: str) -> tuple[str, list[str]]:
    return title_of(page), blocks_of(page)
