"""Conversations in files: what is kept of them, what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from mlxvlm.cli.chat.commands import take
from mlxvlm.cli.chat.session import Picture, Session, Turn
from mlxvlm.errors import InputError
from tests.cli.chat.test_session import HEART, engine, say, session, state

__all__ = ["engine", "session"]


def test_saved_and_loaded_it_goes_on_the_same(session: Session, tmp_path: Path) -> None:
    say(session, rf"\image {HEART} What do you see?")
    take(session, r"\system Be brief.")
    take(session, rf'\save "{tmp_path}/my chat.json"')
    expected = say(session, "What color is the heart?")
    saved = json.loads((tmp_path / "my chat.json").read_text())
    assert saved["model"] == "demo"
    assert saved["messages"][0] == {"role": "system", "content": "Be brief."}
    assert saved["messages"][1]["content"] == [
        {"type": "image_url", "image_url": {"url": Path(HEART).as_uri()}},
        {"type": "text", "text": "What do you see?"},
    ]
    take(session, r"\clear")
    take(session, r"\system off")
    assert "pink-heart.png" in take(session, rf"\load {tmp_path}/my\ chat.json").note
    assert session.system == "Be brief."
    found = say(session, "What color is the heart?")
    assert (found.text, found.usage.prompt_tokens) == (expected.text, expected.usage.prompt_tokens)


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", ""])
def test_pictures_without_a_file_are_kept_whole(prefix: str, session: Session, tmp_path: Path) -> None:
    text = base64.b64encode(Path(HEART).read_bytes()).decode()
    session.turns = [Turn("user", ("a", Picture.open(prefix + text), "b"))]
    take(session, rf"\save {tmp_path}/chat.json")
    take(session, rf"\load {tmp_path}/chat.json")
    assert [type(part) for part in session.turns[0].parts] == [str, Picture, str]
    assert session.turns[0].pictures[0].image.size == (256, 256)


def test_only_a_transcript_is_replaced(session: Session, tmp_path: Path) -> None:
    take(session, rf"\save {tmp_path}/chat.json")
    take(session, rf"\save {tmp_path}/chat.json")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis.txt is there and is no transcript, .*: choose another name"):
        take(session, rf"\save {tmp_path}/thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "thesis.txt"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "3",
        '{"messages": 3}',
        "[3]",
        '[{"role": "tool", "content": "x"}]',
        '[{"role": "user"}]',
        '[{"role": "user", "content": [{"type": "audio"}]}]',
        '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]',
        '[{"role": "user", "content": [{"type": "image_url", "image_url": "nowhere.png"}]}]',
        '[{"role": "user", "content": [{"type": ["x"]}]}]',
    ],
)
def test_nonsense(content: str, session: Session, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(content)
    say(session, "Hello!")
    before = state(session)
    with pytest.raises(InputError) as caught:
        take(session, rf"\load {tmp_path}/chat.json")
    assert len(str(caught.value)) < 400
    assert state(session) == before


def test_a_question_without_an_answer_is_answered(session: Session, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "Hello!"}]')
    take(session, rf"\load {tmp_path}/chat.json")
    say(session, r"\retry")
    assert [turn.role for turn in session.turns] == ["user", "assistant"]
