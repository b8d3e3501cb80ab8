"""The page's Markdown, rendered by its own modules in Chromium."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server.browser import Page

# Nodes as [name, children], text as itself; the furniture of code and tables is left out.
TREE = """
    const tree = (node) => node.nodeType === Node.TEXT_NODE ? node.textContent
        : [node.localName + (node.start > 1 ? node.start : "") + (node.localName === "a" ? " " + node.href : ""),
           ...[...node.childNodes].filter((each) => each.localName !== "button").map(tree)];
    const joined = (list) => list.map((each) => Array.isArray(each) ? joined(each) : each).reduce((all, each) =>
        typeof each === "string" && all.length > 1 && typeof all.at(-1) === "string"
            ? [...all.slice(0, -1), all.at(-1) + each] : [...all, each], []);
"""

CASES: dict[str, Any] = {
    "plain": [["p", "plain"]],
    "a\nb\n\nc": [["p", "a\nb"], ["p", "c"]],
    "# One\n### Three ###\ntext": [["h2", "One"], ["h4", "Three"], ["p", "text"]],
    "#no heading": [["p", "#no heading"]],
    "*a* **b** ***c*** _d_ __e__\n\n~~f~~": [
        ["p", ["em", "a"], " ", ["strong", "b"], " ", ["strong", ["em", "c"]], " ", ["em", "d"], " ", ["strong", "e"]],
        ["p", ["del", "f"]],
    ],
    "**bold *both* bold**": [["p", ["strong", "bold ", ["em", "both"], " bold"]]],
    "2 * 3 * 4, snake_case_name, **open": [["p", "2 * 3 * 4, snake_case_name, **open"]],
    "**never *closed": [["p", "**never *closed"]],
    "*crossed **marks* here**": [["p", ["em", "crossed **marks"], " here**"]],
    "`a*b*` and ``a`b`` and `": [["p", ["code", "a*b*"], " and ", ["code", "a`b"], " and `"]],
    r"\*no\* \# \\": [["p", r"*no* # \ ".strip()]],
    "[a *b*](https://x.example/y) <https://z.example>\n\nhttps://w.example/q_(r).": [
        ["p", ["a https://x.example/y", "a ", ["em", "b"]], " ", ["a https://z.example/", "https://z.example"]],
        ["p", ["a https://w.example/q_(r)", "https://w.example/q_(r)"], "."],
    ],
    "(https://x.example)": [["p", "(", ["a https://x.example/", "https://x.example"], ")"]],
    "[https://a.example](https://b.example)": [["p", ["a https://b.example/", "https://a.example"]]],
    "![alt](https://x.example/p.png) ![](https://y.example/p.png)": [
        ["p", ["a https://x.example/p.png", "alt"], " ", ["a https://y.example/p.png", "https://y.example/p.png"]]
    ],
    "[a](mailto:x@y) [b](/v1/models) [c](#d) [d](ftp://x)": [["p", "[a](mailto:x@y) [b](/v1/models) [c](#d) [d](ftp://x)"]],
    "a  \nb<br>c<br/>d": [["p", "a", ["br"], "b", ["br"], "c", ["br"], "d"]],
    "$a_1 * b_2 * c$ costs $5 or $6": [["p", "$a_1 * b_2 * c$ costs $5 or $6"]],
    r"\(x_1 * x_2\) and \[y_1\]": [["p", r"\(x_1 * x_2\) and \[y_1\]"]],
    "$$\nx_1 * y_2\n$$\nafter": [["p", "$$\nx_1 * y_2\n$$"], ["p", "after"]],
    "- a\n- b\n  - c\n    d\n- e": [["ul", ["li", "a"], ["li", "b", ["ul", ["li", "c\nd"]]], ["li", "e"]]],
    "3. a\n4. b": [["ol3", ["li", "a"], ["li", "b"]]],
    "1. a\n\n   b\n\n2. c": [["ol", ["li", ["p", "a"], ["p", "b"]], ["li", ["p", "c"]]]],
    "- a\ngoes on\n\nout": [["ul", ["li", "a\ngoes on"]], ["p", "out"]],
    "- a\n1. b": [["ul", ["li", "a"]], ["ol", ["li", "b"]]],
    "- [ ] a\n- [x] b": [["ul", ["li", "☐ a"], ["li", "☑ b"]]],
    "1. a\n   ```py\n   x = 1\n     y\n   ```\n2. b": [
        ["ol", ["li", "a", ["div", ["div", "py"], ["pre", ["code", "x = 1\n  y"]]]], ["li", "b"]]
    ],
    "in\n1986. it was": [["p", "in\n1986. it was"]],
    "text\n- item\n* * *": [["p", "text"], ["ul", ["li", "item"]], ["hr"]],
    "> a\n> - b": [["blockquote", ["p", "a"], ["ul", ["li", "b"]]]],
    "> > c\nd": [["blockquote", ["blockquote", ["p", "c"]]], ["p", "d"]],
    "```\n**a** <b>\n": [["div", ["div"], ["pre", ["code", "**a** <b>\n"]]]],
    "~~~js\n```\n~~~\nb": [["div", ["div", "js"], ["pre", ["code", "```"]]], ["p", "b"]],
    "````\n```\na\n```\n````": [["div", ["div"], ["pre", ["code", "```\na\n```"]]]],
    "| a | b \\| c |\n|---|:-:|\n| 1 | **2** |\n| 3 |\n\nend": [
        ["div", ["table", ["thead", ["tr", ["th", "a"], ["th", "b | c"]]],
                 ["tbody", ["tr", ["td", "1"], ["td", ["strong", "2"]]], ["tr", ["td", "3"], ["td"]]]]],
        ["p", "end"],
    ],
    "a | b\nno table": [["p", "a | b\nno table"]],
    "&amp; <b>x</b>": [["p", "&amp; <b>x</b>"]],
    "": [],
    " \n\t\n": [],
}  # fmt: skip


def rendered(page: Page, texts: list[str]) -> list[Any]:
    """The tree of each text, shown at once."""
    script = TREE + """
        return given[0].map((text) => {
            const root = document.createElement("div");
            new module.MarkdownView(root).update(text);
            return joined(tree(root)).slice(1);
        });"""  # fmt: skip
    return list(page.import_and("markdown.js", script, texts))


def test_cases(page: Page) -> None:
    found = dict(zip(CASES, rendered(page, list(CASES)), strict=True))
    assert found == CASES


PIECES = [
    *("a", "word ", " ", "\n", "\n", "\n\n", "  ", "    ", "- ", "* ", "1. ", "2) ", "+ ", "# ", "## ", "> ", "---\n"),
    *("```", "```py\n", "~~~\n", "`", "*", "**", "_", "~~", "$", "$$", "$$\n", "\\", "\\[", "\\]", "|", " | ", "|-|\n"),
    *("|---|---|\n", "[", "](", ")", "![", "https://x.example/", "<br>", "<", ">", "\t", "א", "[ ] ", "\n- ", "\n> "),
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Pieces that mean something to Markdown, thrown together."""
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 40)))


def test_streamed_is_the_same_as_whole(page: Page) -> None:
    """What is grown piece by piece, in whatever pieces, ends as what is shown at once; finished blocks stay."""
    rng = random.Random(4)
    texts = [*CASES, *(random_text(rng) for _ in range(4000))]
    script = TREE + """
        const wrong = [];
        given[0].forEach((text, n) => {
            const whole = document.createElement("div"), grown = document.createElement("div");
            new module.MarkdownView(whole).update(text);
            const finished = [];
            const view = new module.MarkdownView(grown, (node) => finished.push([node, node.textContent]));
            for (let end = 1 + n % 3; end < text.length; end += 1 + n % 3) view.update(text.slice(0, end));
            view.update(text);
            view.finish();
            const kept = finished.every(([node, text], i) => grown.childNodes[i] === node && node.textContent === text);
            if (!grown.isEqualNode(whole) || !kept || finished.length !== grown.childNodes.length) wrong.push(text);
        });
        return wrong;"""  # fmt: skip
    assert page.import_and("markdown.js", script, texts) == []


def test_finished_blocks_are_not_rendered_again(page: Page) -> None:
    script = """
        const root = document.createElement("div");
        let changes = 0;
        const view = new module.MarkdownView(root);
        let text = "";
        const counts = [];
        for (let i = 0; i < 300; i++) {
            text += "A paragraph of some words.\\n\\n";
            const watch = new MutationObserver(() => {});
            watch.observe(root, { childList: true });
            view.update(text);
            counts.push(watch.takeRecords().length);
        }
        return [Math.max(...counts), view.open.length, root.children.length];"""
    assert page.import_and("markdown.js", script) == [1, 1, 300]


HOSTILE = {
    "quotes": "> " * 20_000,
    "stars": "*" * 50_000,
    "mixed marks": "*a **b _c ~~d " * 5_000,
    "brackets": "[" * 50_000,
    "links": "[a](" * 20_000,
    "pictures": "![a" * 20_000,
    "ticks": "` a" * 20_000,
    "backslashes": "\\(" * 20_000,
    "dollars": "$a " * 20_000,
    "lists": "".join(f"{' ' * 2 * depth}- a\n" for depth in range(400)),
    "items": "- a\n" * 5_000,
    "rows": "|a|b|\n|-|-|\n" + "|1|2|\n" * 3_000,
    "pipes": "|" * 20_000 + "\n" + "|" * 20_000,
    "rules": "- " * 20_000 + "x",
    "delimiters": "a|b\n" + "-" * 20_000 + "x",
    "hashes": "# " + "#" * 20_000 + " x",
    "spaces": "a" + " " * 50_000 + "b",
    "heading spaces": "# a" + " " * 50_000 + "b",
    "fence spaces": "```" + " " * 50_000 + "`",
    "fence tildes": "~" * 50_000 + "`",
    "delimiter spaces": "a|b\n-" + " " * 50_000 + "x",
    "rule spaces": "---" + " " * 50_000 + "x",
    "angles": "<https://" * 10_000,
    "titles": '[a](https://x "' * 10_000,
    "addresses": "https://x" + ")" * 20_000,
    "one line": "word " * 40_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_long(page: Page, name: str) -> None:
    """Squares of these lengths would take minutes, and the driver gives a script 30 s."""
    script = """
        const root = document.createElement("div");
        new module.MarkdownView(root).update(given[0]);
        return root.childNodes.length > 0;"""
    assert page.import_and("markdown.js", script, HOSTILE[name]) is True


def test_texts_of_any_direction(page: Page) -> None:
    script = """
        const root = document.createElement("div");
        document.body.append(root);
        new module.MarkdownView(root).update("שלום עולם\\n\\nhello\\n\\n- مرحبا\\n\\n```\\ncode\\n```");
        const found = [...root.children].map((node) => getComputedStyle(node).direction);
        root.remove();
        return found;"""
    assert page.import_and("markdown.js", script) == ["rtl", "ltr", "rtl", "ltr"]


def test_code_is_copied(page: Page) -> None:
    page.browser.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.url},
    )
    script = """
        const root = document.createElement("div");
        document.body.append(root);
        new module.MarkdownView(root).update("```py\\nx = 1\\n\\ny = 2\\n```");
        root.querySelector("[aria-label='Copy the code']").click();
        await new Promise((resolve) => setTimeout(resolve, 200));
        root.remove();
        return await navigator.clipboard.readText();"""
    assert page.import_and("markdown.js", script) == "x = 1\n\ny = 2"
