"""A person at a terminal: the demo model, real keys, a real screen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.chat.pseudo_terminal import ROOT, SLOW, Terminal

HEART = "examples/pictures/pink-heart.png"
STAR = "examples/pictures/green-star.png"


def test_a_conversation_about_two_pictures(tmp_path: Path) -> None:
    """As the transcripts of mistral.rs's pages go, with a family's token typed and without."""
    with Terminal(tmp_path) as terminal:
        terminal.say(rf"\image {HEART} <image>What do you see?", "A pink heart on a gray background.")
        terminal.say("What color is the heart?", "The heart is pink.")
        terminal.say(rf"\image {STAR} What do you see?", "green star")
        terminal.say(r"\stats", "turns           6", "2, 2 encoded so far")
        assert "pink-heart.png (256 x 256)" in terminal.text
        assert "first token" in terminal.text
        assert terminal.leave() == 0


def test_the_conversation_of_the_documents(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "chat.md").read_text().split("```\n")[1]
    lines = document.splitlines()
    with Terminal(tmp_path) as terminal:
        for place, line in enumerate(lines):
            if typed := re.match(r"(\[1 picture\] )?> (.*)", line):
                terminal.say(typed[2], lines[place + 1])
        assert timeless("\n".join(lines[1:])) in timeless(terminal.text)
        assert terminal.leave() == 0


def timeless(text: str) -> str:
    """Without speeds, which are the machine's, and how many positions the cache has, which may be one fewer."""
    return re.sub(r"[\d.]+ (tok/)?s \||\d+ of them", "N", text)


def test_every_command(tmp_path: Path) -> None:
    saved = tmp_path / "my chat.json"
    with Terminal(tmp_path) as terminal:
        terminal.say(r"\help", "temperature [T | default]", r"\exit")
        terminal.say("/help seed", "the same seed gives")
        for name, field in {"temperature": "temperature", "topp": "top_p", "minp": "min_p"}.items():
            terminal.say(rf"\{name} 0.5", f"{field} 0.5")
        for name, field in {"topk": "top_k", "max": "max_tokens", "seed": "seed"}.items():
            terminal.say(rf"/{name} 40", f"{field} 40")
        terminal.fail(r"\temperature hot", "temperature is a number or default, not 'hot'")
        terminal.say(r"\temperature default", "temperature 0.0")
        terminal.say(r"\system Be brief.", "System: Be brief.\n")
        terminal.say(r"\model", "demo: idefics3", "context 2048")
        terminal.say(rf"\image {HEART}", "[1 picture] >")
        terminal.say("What do you see?", "A pink heart on a gray background.")
        terminal.say(r"\retry", "A pink heart on a gray background.")
        terminal.say(rf'\save "{saved}"', "Saved 2 turns")
        terminal.say(r"\undo", "Taken back: What do you see?")
        terminal.say(r"\clear", "A new conversation")
        terminal.say(rf"\load {str(saved).replace(' ', chr(92) + ' ')}", "Loaded 2 turns with pink-heart.png")
        terminal.say("What color is the heart?", "The heart is pink.")
        terminal.type("\\exit\r")
        assert terminal.ended() == 0
    assert [message["role"] for message in json.loads(saved.read_text())["messages"]] == ["system", "user", "assistant"]


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(tmp_path: Path) -> None:
    with Terminal(tmp_path, "-q", script=SLOW) as terminal:
        terminal.type("Hello!\r")
        terminal.wait(lambda: len([line for line in terminal.shown if line]) > 4)
        terminal.type("\x03")
        terminal.wait(lambda: "Stopped." in terminal.text and terminal.is_prompting())
        terminal.say(r"\stats", "turns           2")
        assert terminal.leave() == 0


def test_what_is_typed_during_an_answer_waits_for_the_prompt(tmp_path: Path) -> None:
    with Terminal(tmp_path, "-q", "--max-tokens", "40", script=SLOW) as terminal:
        terminal.type("Hello!\r")
        terminal.wait(lambda: "thinking" in terminal.raw and "thinking" not in terminal.text)
        terminal.type("\\stats\r")
        terminal.wait(lambda: "turns           2" in terminal.text and terminal.is_prompting())
        assert terminal.raw.index("stats") > terminal.raw.index("Cut at 40 tokens") > 0
        assert terminal.leave() == 0


def test_a_paste_of_ten_thousand_characters_is_one_message(tmp_path: Path) -> None:
    lines = [f"line {number:04}" for number in range(1000)]
    pasted = "\n".join(lines)
    assert len(pasted) == 9_999
    with Terminal(tmp_path) as terminal:
        terminal.type(f"\x1b[200~{pasted}\x1b[201~")
        terminal.wait(lambda: terminal.edited == "  line 0999")
        # More than the demo's context holds: one line says so and stays in sight, and the text is kept.
        terminal.type("\r")
        terminal.wait(lambda: "Up brings the text back." in terminal.text and terminal.is_prompting())
        assert "context is 2048" in "\n".join(terminal.shown)
        terminal.type("\x1b[A")
        terminal.wait(lambda: terminal.edited == "  line 0999")
        terminal.clear()
        terminal.say("Hello!", "Show me a picture")
        assert terminal.leave() == 0


def test_a_long_message_that_fails_leaves_the_reason_in_sight(tmp_path: Path) -> None:
    pasted = "word " * 1999 + "end"
    with Terminal(tmp_path) as terminal:
        terminal.type(f"\\image {HEART} \x1b[200~{pasted}\x1b[201~\r")
        terminal.wait(lambda: "Up brings the text back." in terminal.text and terminal.is_prompting())
        shown = "\n".join(terminal.shown)
        assert "the model's context is 2048" in shown
        assert "[1 picture] > " in shown
        terminal.type("\x1b[A")
        terminal.wait(lambda: terminal.edited.endswith("word end"))
        assert HEART not in "\n".join(terminal.shown)
        terminal.clear()


def test_mistakes_cost_nothing(tmp_path: Path) -> None:
    with Terminal(tmp_path) as terminal:
        terminal.fail(r"\image nowhere.png What is it?", "no such image file: nowhere.png")
        terminal.fail(r"\imagin x", r"there is no command \imagin: did you mean \image?")
        terminal.say(rf"\image {HEART} What do you see?", "A pink heart on a gray background.")
        assert terminal.leave() == 0


def test_lines_files_and_history(tmp_path: Path) -> None:
    with Terminal(tmp_path) as terminal:
        for typed, completed in (("\\ima", r"> \image"), (" exam", "examples/"), ("pictures/pink-h", HEART)):
            terminal.type(typed)
            terminal.wait(lambda typed=typed: terminal.edited.endswith(typed))
            terminal.type("\t")
            terminal.wait(lambda completed=completed: terminal.edited.endswith(completed))
        terminal.type(" What do\\\r")  # a backslash at the end, Alt-Enter: the message goes on
        terminal.wait(lambda: terminal.screen.cursor.x == 2)
        terminal.type("you\x1b\rsee?\r")
        terminal.wait(lambda: "first token" in terminal.text and terminal.is_prompting())
        assert terminal.leave() == 0
    with Terminal(tmp_path) as terminal:
        terminal.type("\x1b[A")
        terminal.wait(lambda: "  you" in terminal.shown and "  see?" in terminal.shown)
        terminal.clear()
        terminal.type("\x12What")  # Ctrl-R
        terminal.wait(lambda: "I-search backward: What" in terminal.shown)
        terminal.type("\x03")
        terminal.wait(lambda: terminal.is_prompting() and "I-search" not in "".join(terminal.shown))
        terminal.say("Hello!", "first token")
        assert terminal.leave() == 0


def test_a_resized_window(tmp_path: Path) -> None:
    with Terminal(tmp_path, "-q", script=SLOW) as terminal:
        terminal.type("Hello!\r")
        terminal.wait(lambda: len([line for line in terminal.shown if line]) > 4)
        terminal.screen.resize(20, 50)
        terminal.child.setwinsize(20, 50)
        seen = len(terminal.raw)
        terminal.wait(lambda: len(terminal.raw) > seen + 2000)
        terminal.type("\x03")
        terminal.wait(lambda: "Stopped." in terminal.text and terminal.is_prompting())
        assert max(map(len, terminal.shown)) <= 50
        terminal.say(r"\stats", "turns           2")
        assert terminal.leave() == 0


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
def test_poor_terminals(variables: dict[str, str], tmp_path: Path) -> None:
    with Terminal(tmp_path, **variables) as terminal:
        terminal.say(rf"\image {HEART} What do you see?", "A pink heart on a gray background.")
        if "TERM" in variables:
            assert "\x1b[" not in terminal.raw.replace("\x1b[?2004", "")
        else:
            assert not re.search(r"\x1b\[[\d;]*\b(3[0-79]|9[0-7]|4[0-79])m", terminal.raw)
        assert terminal.leave() == 0
