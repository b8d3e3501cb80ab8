"""Stop strings in pieces against the same text in one piece."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.engine.stops import StopMatcher


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow twin: letter by letter, the first stop string that is complete ends the text."""
    for end in range(len(text) + 1):
        complete = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: min(complete)], True
    return text, False


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_pieces_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    passed = [matcher.feed(piece) for piece in pieces]
    if not matcher.stopped:
        passed.append(matcher.flush())
    assert ("".join(passed), matcher.stopped) == cut("".join(pieces), stops)


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1))
def test_nothing_is_held_longer_than_needed(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = given_out = ""
    for piece in pieces:
        seen += piece
        given_out += matcher.feed(piece)
        if matcher.stopped:
            return
        held = seen[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_without_stops_text_passes_at_once() -> None:
    assert StopMatcher(()).feed("anything") == "anything"


@pytest.mark.parametrize("stop", ["END", "E"])
def test_after_a_stop_nothing_passes(stop: str) -> None:
    matcher = StopMatcher([stop])
    assert matcher.feed("the END of it") == "the "
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""
