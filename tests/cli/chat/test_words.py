"""Which pictures a line names."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.cli.chat.words import escaped, is_dropped, last_word, split_sources

URL = "https://example.org/a%20b.jpg?x=1"
DATA = "data:image/png;base64,AAAA"


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # macOS parts time and PM with a narrow no-break space.
    for name in ("a.png", "b c.jpg", "it's.png", "back\\slash.png", "Bild 3.04\u202fPM.png", "notes"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sources", "rest"),
    [
        (f"{URL} What mountain is this?", [URL], "What mountain is this?"),
        (f"{URL} <|image|>What type is it?", [URL], "<|image|>What type is it?"),
        (DATA, [DATA], ""),
        (f"{DATA}\nWhat?", [DATA], "What?"),
        ("a.png", ["a.png"], ""),
        ("a.png a.png  compare a.png", ["a.png", "a.png"], "compare a.png"),
        ("'b c.jpg' What?", ["b c.jpg"], "What?"),
        ('"b c.jpg" "quoted question"', ["b c.jpg"], '"quoted question"'),
        (r"b\ c.jpg What?", ["b c.jpg"], "What?"),
        ("b c.jpg What?", ["b c.jpg"], "What?"),
        ("a.png b c.jpg What?", ["a.png", "b c.jpg"], "What?"),
        (r"it\'s.png it's here", ["it's.png"], "it's here"),
        (r"'it'\''s.png' 'b c.jpg' it's here", ["it's.png", "b c.jpg"], "it's here"),
        ("""'it'"'"'s.png' 'Is it?'""", ["it's.png"], "'Is it?'"),
        ("it's.png it's here", ["it's.png"], "it's here"),
        (r"back\slash.png x", [r"back\slash.png"], "x"),
        ("Bild\\ 3.04\u202fPM.png When?", ["Bild 3.04\u202fPM.png"], "When?"),
        ("Bild 3.04\u202fPM.png When?", ["Bild 3.04\u202fPM.png"], "When?"),
        ("a.png notes on it", ["a.png"], "notes on it"),  # a file, but no picture
        ("nowhere.png What?", ["nowhere.png"], "What?"),
        ("'unclosed.png", ["unclosed.png"], ""),
        ("a.png line one\nline two", ["a.png"], "line one\nline two"),
        ("a.png b\0c", ["a.png"], "b\0c"),
        ("", [], ""),
    ],
)
def test_split_sources(text: str, sources: list[str], rest: str) -> None:
    assert split_sources(text) == (sources, rest)


def test_what_a_terminal_drops(pictures: Path) -> None:
    path = pictures / "b c.jpg"
    for line in (shlex.quote(str(path)), str(path).replace(" ", "\\ "), f'"{path}" What?', path.as_uri(), DATA):
        assert is_dropped(line), line
    for line in ("/nowhere.png", "/help", "hello", "a.png", "it's.png", f"'{pictures}/notes'", "~", "/", "https://x/a"):
        assert not is_dropped(line), line


@given(st.text(st.characters(exclude_characters="\n\r\t\0", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_an_escaped_name_is_one_word_again(name: str) -> None:
    for typed in (escaped(name), shlex.quote(name)):
        assert split_sources(f"{typed} rest") == ([name], "rest") or name.lower().startswith(("data:", "http"))


@given(st.text(max_size=60))
def test_any_text_is_split_without_losing_its_end(text: str) -> None:
    sources, rest = split_sources(text)
    assert text.rstrip(" \t\r\n").endswith(rest)
    assert bool(sources) == bool(text.strip(" \t\r\n"))
    is_dropped(text)
    last_word(text)


@pytest.mark.parametrize(
    ("text", "word", "quote"),
    [("", "", ""), ("a", "a", ""), (r"x/my\ pho", "x/my pho", ""), ("x 'my pho", "my pho", "'"), ("a.png ", "", "")],
)
def test_last_word(text: str, word: str, quote: str) -> None:
    assert last_word(text) == (word, quote)
