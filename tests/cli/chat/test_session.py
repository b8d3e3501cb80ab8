"""The chat without a terminal: what is kept, what is not, and what a turn costs."""

from __future__ import annotations

import base64
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlxvlm
from mlxvlm.cli.chat.commands import COMMANDS, Outcome, take
from mlxvlm.cli.chat.session import Session, Turn
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion
from mlxvlm.errors import ContextLengthError, ImageError, InputError, MlxvlmError, UsageError
from tests.processors.conftest import Web, web

__all__ = ["web"]

PICTURES = Path(__file__).parents[3] / "examples" / "pictures"
HEART, STAR = str(PICTURES / "pink-heart.png"), str(PICTURES / "green-star.png")
SEES_HEART = "A pink heart on a gray background."


@pytest.fixture(scope="module")
def engine() -> Iterator[mlxvlm.Engine]:
    with mlxvlm.load("demo") as running:
        yield running


@pytest.fixture
def session(engine: mlxvlm.Engine) -> Session:
    return Session(engine, "demo", "a model", SamplingParams(max_tokens=60))


def ignore(text: str) -> None:
    pass


def say(session: Session, line: str) -> Completion:
    outcome = take(session, line)
    assert outcome.ask is not None, outcome
    return session.answer(outcome.ask, ignore, outcome.kept)


def state(session: Session) -> Any:
    return list(session.turns), list(session.pending), session.system, session.sampling, session.last


def test_no_picture_is_encoded_twice(session: Session) -> None:
    before = session.engine.stats().encoded_images
    assert say(session, rf"\image {HEART} What do you see?").text.strip() == SEES_HEART
    say(session, "What color is the heart?")
    say(session, rf"/image {STAR} What is in the second picture?")
    say(session, "What color is the star?")
    assert session.engine.stats().encoded_images == before + 2
    assert session.last is not None
    assert session.last.usage.cached_tokens > 0
    assert [len(turn.pictures) for turn in session.turns] == [1, 0, 0, 0, 1, 0, 0, 0]


def test_pictures_of_the_web_are_fetched_once(session: Session, web: Web, tmp_path: Path) -> None:
    """As mistral.rs's pages write it: a second picture goes on with the chat."""
    heart, star = (web.add(f"/{Path(path).name}", Path(path).read_bytes()) for path in (HEART, STAR))
    assert say(session, "Hello!").text
    assert say(session, rf"\image {heart} <image>What do you see?").text.strip() == SEES_HEART
    assert "star" in say(session, rf"\image {star} What is in the second picture?").text
    assert web.asked == ["/pink-heart.png", "/green-star.png"]
    take(session, rf"\save {tmp_path}/chat.json")
    assert heart in (tmp_path / "chat.json").read_text()


def test_a_picture_waits_for_its_question(session: Session) -> None:
    outcome = take(session, rf"\image {HEART}")
    assert outcome.ask is None
    assert [str(picture) for picture in outcome.pictures] == ["pink-heart.png (256 x 256)"]
    assert "pink-heart.png" in take(session, r"\image").note
    assert "pink-heart.png" in take(session, "  ").note
    assert say(session, "What do you see?").text.strip() == SEES_HEART
    assert session.pending == []
    assert "pink-heart" not in take(session, r"\image").note


@pytest.mark.parametrize("line", ["What do <image>you see?", "<image>What do you see?", "What do you see?<image>"])
def test_a_typed_token_is_the_pictures_place(line: str, session: Session) -> None:
    take(session, rf"\image {HEART}")
    placed = say(session, line)
    assert placed.usage.image_tokens == 16
    direct = mlxvlm.Message(
        "user", tuple(mlxvlm.ImagePart(HEART) if not part else mlxvlm.TextPart(part) for part in parts_of(line))
    )
    request = mlxvlm.Request([direct], session.sampling)
    assert session.engine.generate(request).text == placed.text


def parts_of(line: str) -> list[str]:
    """Texts, and "" for the picture."""
    before, after = line.split("<image>")
    return [*([before] if before else []), "", *([after] if after else [])]


def test_a_wrong_number_of_tokens_is_an_error_and_nothing_is_lost(session: Session) -> None:
    take(session, rf"\image {HEART}")
    before = state(session)
    with pytest.raises(InputError, match="2 image marker"):
        say(session, "<image><image>What?")
    assert state(session) == before
    assert len(before[1]) == 1


def test_data_urls_base64_and_dropped_files(session: Session, tmp_path: Path) -> None:
    text = base64.b64encode(Path(HEART).read_bytes()).decode()
    dropped = tmp_path / "my heart.png"
    dropped.write_bytes(Path(HEART).read_bytes())
    escaped = str(dropped).replace(" ", "\\ ")
    for line in (rf"\image data:image/png;base64,{text}", rf"\image {text}", f"data:image/png;base64,{text}", escaped):
        assert take(session, line).pictures[0].image.size == (256, 256)
    assert say(session, f"'{dropped}' What do you see?").finish_reason == "stop"
    assert len(session.turns[0].pictures) == 5
    assert str(take(session, dropped.as_uri()).pictures[0]) == "my heart.png (256 x 256)"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (r"\image nowhere.png What?", ImageError),
        (rf"\image {HEART} https://127.0.0.1:9/x.png What?", ImageError),
        (r"\imagine x", UsageError),
        ("/etc/passwd", UsageError),
        ("\\", UsageError),
        (r"\temperature hot", UsageError),
        (r"\temperature -1", UsageError),
        (r"\topk 1.5", UsageError),
        (r"\topp nan", UsageError),
        (r"\max 0", UsageError),
        (r"\save", UsageError),
        (r"\save /nowhere/at/all.json", InputError),
        (r"\load /nowhere.json", InputError),
        (r"\retry", InputError),
        ("word " * 3000, ContextLengthError),
    ],
)
def test_what_fails_changes_nothing(line: str, error: type[MlxvlmError], session: Session) -> None:
    take(session, rf"\image {STAR}")
    before = state(session)
    with pytest.raises(error) as caught:
        say(session, line)
    assert "\n" not in str(caught.value)
    assert state(session) == before


def test_an_unknown_command_names_the_nearest(session: Session) -> None:
    with pytest.raises(UsageError, match=r"did you mean /temperature\?"):
        take(session, "/temprature 1")
    assert take(session, r" \frac{1}{2}").ask == Turn("user", (r"\frac{1}{2}",))


def test_settings(session: Session) -> None:
    for name, field, value in (
        ("temperature", "temperature", 0.5),
        ("top_k", "top_k", 7),
        ("top-p", "top_p", 0.9),
        ("MinP", "min_p", 0.1),
        ("max", "max_tokens", 5),
        ("seed", "seed", 3),
    ):
        assert take(session, rf"\{name} {value}").note == f"{field} {value}"
        assert getattr(session.sampling, field) == value
        assert take(session, rf"\{name}").note == f"{field} {value}"
    assert say(session, "Hello!").usage.completion_tokens <= 5
    assert take(session, r"\seed off").note == "seed not set"
    for name in ("temperature", "topk", "topp", "minp", "max", "seed"):
        take(session, rf"\{name} default")
    assert session.sampling == session.start


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (r"\seed -1", "seed must be a whole number from 0 to 18446744073709551615, not -1"),
        (r"\seed 18446744073709551616", "from 0 to 18446744073709551615"),
        (r"\seed 1.5", "seed is a whole number, default or off, not '1.5'"),
        (r"\temperature -1", "from 0 to 100"),
        (r"\temperature nan", "from 0 to 100"),
        (r"\topk -1", "of at least 0"),
        (r"\topk off", "a whole number or default, not 'off'"),
        (r"\topp 1.5", "from 0 to 1"),
        (r"\minp -0.1", "from 0 to 1"),
        (r"\max 0", "of at least 1"),
    ],
)
def test_settings_have_ranges(line: str, words: str, session: Session) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        take(session, line)
    assert session.sampling == session.start


def test_the_largest_seed(session: Session) -> None:
    take(session, rf"\seed {2**64 - 1}")
    take(session, r"\temperature 1")
    assert say(session, "Hello!").text


def test_a_seed_repeats(session: Session) -> None:
    take(session, r"\temperature 5")
    texts = []
    for seed in ("1", "1", "2"):
        take(session, rf"\seed {seed}")
        texts.append(say(session, "Hello!").text)
        take(session, r"\undo")
    assert texts[0] == texts[1] != texts[2]


def test_system_is_told_first(session: Session) -> None:
    plain = say(session, "Hello!").usage.prompt_tokens
    assert take(session, r"\clear").note
    take(session, "\\system Be brief.\nBe kind.")
    assert session.system == "Be brief.\nBe kind."
    assert say(session, "Hello!").usage.prompt_tokens > plain
    take(session, r"\system off")
    assert session.system == ""


def test_undo_retry_clear(session: Session) -> None:
    first = say(session, rf"\image {HEART} What do you see?")
    say(session, "What color is the heart?")
    again = say(session, r"\retry")
    assert again.text.strip() == "The heart is pink."
    assert [turn.role for turn in session.turns] == ["user", "assistant"] * 2
    take(session, rf"\image {STAR}")
    take(session, r"\undo")
    assert (len(session.turns), session.pending) == (4, [])
    take(session, r"\undo")
    assert session.turns[-1].text == first.text.strip()
    take(session, r"\clear")
    assert (session.turns, session.last) == ([], None)
    assert take(session, r"\undo").note


def test_a_failed_retry_keeps_the_answer(session: Session) -> None:
    say(session, "Hello!")
    take(session, f"\\system {'word ' * 3000}")
    before = state(session)
    with pytest.raises(ContextLengthError):
        say(session, r"\retry")
    assert state(session) == before


def test_the_space_that_templates_write_is_not_kept_twice(session: Session) -> None:
    shown: list[str] = []
    session.answer(session.compose("Hello!"), shown.append)
    assert session.last is not None
    assert session.last.text.startswith(" ")  # the demo's own first token
    assert "".join(shown) == session.last.text.lstrip()
    assert session.turns[-1].text == session.last.text.strip()


class TestCtrlC:
    def interrupted(self, session: Session, times: int, is_due: Callable[[list[str]], bool]) -> Completion:
        session.sampling = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=1500)
        shown: list[str] = []

        def show(text: str) -> None:
            shown.append(text)
            if is_due(shown):
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        completion = session.answer(session.compose("Hello!"), show)
        assert completion.text.lstrip().startswith("".join(shown)[:20])
        return completion

    def test_it_ends_the_answer_and_keeps_what_was_said(self, session: Session) -> None:
        completion = self.interrupted(session, 1, lambda shown: len(shown) == 3)
        assert completion.finish_reason == "cancelled"
        assert completion.usage.completion_tokens < 1500
        assert session.turns[-1].text == completion.text.strip()
        session.sampling = SamplingParams(max_tokens=5)
        assert say(session, "Hello!").usage.prompt_tokens > completion.usage.completion_tokens

    def test_a_third_one_is_an_exception(self, session: Session) -> None:
        before = state(session)
        with pytest.raises(KeyboardInterrupt):
            self.interrupted(session, 4, lambda shown: len(shown) == 3)
        assert state(session)[0] == before[0]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_answer_without_a_word_is_not_kept(
        self, session: Session, engine: mlxvlm.Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit = engine.submit

        def cancelled(request: mlxvlm.Request) -> mlxvlm.Stream:
            stream = submit(request)
            stream.cancel()
            return stream

        monkeypatch.setattr(engine, "submit", cancelled)
        take(session, rf"\image {HEART}")
        before = state(session)
        completion = say(session, "What?")
        assert (completion.finish_reason, completion.text) == ("cancelled", "")
        assert state(session) == before


def test_every_command_has_help_and_leaving_leaves(session: Session) -> None:
    listed = take(session, r"\help").note
    for name, command in COMMANDS.items():
        assert f"\\{name}" in listed
        assert command.help in listed
    assert len(take(session, r"\help \seed").note.splitlines()) == 1
    for line in (r"\exit", "/quit", "exit", "Quit "):
        assert take(session, line) == Outcome(leave=True)
    for line in (" exit", "quit the room"):
        assert take(session, line).ask is not None
    assert "a model" in take(session, r"\model").note
    assert "turns           0" in take(session, r"\stats").note
    assert take(session, "") == Outcome()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (r"\help sed", r"there is no command \sed: did you mean \seed?"),
        (r"\help temp", r"there is no command \temp: did you mean \temperature?"),
        (r"\help /imgae x", "there is no command /imgae: did you mean /image?"),
        (r"\help xyzzy", r"there is no command \xyzzy: \help lists them"),
        (r"\help /", "there is no command /: /help lists them"),
    ],
)
def test_help_for_what_is_no_command(line: str, error: str, session: Session) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(error)}$"):
        take(session, line)
