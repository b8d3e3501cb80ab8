"""The readable text of a web page. Knows tags, not sites; looks at each character a fixed number of times.

Neither `html.parser`, whose time grows with the square of a page that is broken on purpose (CVE-2025-6069), nor a
library: those bring an XML parser written in C and a dozen packages to tell an article from its frame, which the
share of links in a block does well enough for passages that are ranked anyway.
"""

from __future__ import annotations

import html
import re

MAX_PAGE_CHARS = 1_000_000
_MAX_LINK_SHARE = 0.5  # of a block's text: above, it is a menu
_MIN_BLOCK_CHARS = 25  # below, a button or a label, unless it is a heading

_DROPPED = ("script", "style", "noscript", "template", "svg", "iframe", "head", "nav", "aside", "footer", "form")
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_BLOCKS = _HEADINGS | {
    *("address", "article", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt", "figcaption"),
    *("figure", "header", "hr", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "th"),
    *("thead", "tr", "ul"),
}
# str.lower may change a text's length, and with it all places in it.
_LOWER = {ord(char): char.lower() for char in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_TAG = re.compile(r"/?[a-zA-Z][a-zA-Z0-9]*")
_CHARSET = re.compile(rb"""charset\s*=\s*["']?([A-Za-z0-9_-]{2,30})""")


def decoded(page: bytes) -> str:
    """Text of a page by what it says of its encoding; UTF-8 where it says nothing that makes sense."""
    named = _CHARSET.search(page[:4096])
    try:
        return page[: 4 * MAX_PAGE_CHARS].decode(named[1].decode() if named else "utf-8", "replace")
    except (LookupError, ValueError):  # no such encoding, or one that is none of text
        return page[: 4 * MAX_PAGE_CHARS].decode("utf-8", "replace")


def title_of(page: str) -> str:
    """The page's title, "" without one."""
    lower = page[:MAX_PAGE_CHARS].translate(_LOWER)
    start = lower.find("<title")
    end = lower.find("</title", start)
    return _squeezed(page[start:end].partition(">")[2]) if 0 <= start < end else ""


def blocks_of(page: str) -> list[str]:
    """Paragraphs, headings, items and cells in order, without menus, forms and scripts."""
    page = page[:MAX_PAGE_CHARS]
    if "<" not in page:
        return [block for block in map(_squeezed, page.split("\n\n")) if block]
    blocks: list[str] = []
    text, linked, heading, in_link = [""], 0, False, False

    def close() -> None:
        nonlocal linked
        block = _squeezed("".join(text))
        if block and linked <= _MAX_LINK_SHARE * len(block) and (heading or len(block) >= _MIN_BLOCK_CHARS):
            blocks.append(block)
        text[:], linked = [""], 0

    for tag, data in _pieces(page):
        name = tag.removeprefix("/")
        if name in _BLOCKS:
            close()
            heading = tag in _HEADINGS
        elif name == "a":
            in_link = tag == "a"
        text.append(data)
        linked += len(_squeezed(data)) if in_link else 0
    close()
    return blocks


def _pieces(page: str) -> list[tuple[str, str]]:
    """Each tag's name in lower case, "/" before it for the end of an element, with the text after it."""
    lower = page.translate(_LOWER)
    last = {name: lower.rfind(f"</{name}") for name in _DROPPED}
    pieces: list[tuple[str, str]] = []
    at = 0
    while at < len(page):
        start = page.find("<", at)
        if start != at:  # before the first tag, or after a comment
            pieces.append(("", page[at : start if start >= 0 else len(page)]))
        if start < 0:
            break
        if page.startswith("<!--", start):
            end = page.find("-->", start)
            at = len(page) if end < 0 else end + 3
            continue
        found = _TAG.match(page, start + 1)
        name = found[0].lower() if found else ""
        if name in _DROPPED and last[name] > start:
            at = lower.find(f"</{name}", start)
            continue
        following = page.find("<", start + 1)
        following = len(page) if following < 0 else following
        tag, closed, data = page[start:following].partition(">")
        pieces.append((name, data if closed and found else "" if found else tag + closed + data))
        at = following
    return pieces


def _squeezed(text: str) -> str:
    return " ".join(html.unescape(text).split())
