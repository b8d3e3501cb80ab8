"""`mlxvlm bench`, with the demo model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxvlm import load
from mlxvlm.checkpoint.load import open_model
from mlxvlm.cli import bench, main
from mlxvlm.engine.decoding import Decoding
from mlxvlm.errors import UsageError

Capture = pytest.CaptureFixture[str]
SMALL = ["--tokens", "4", "--repeat", "1", "--prompt-tokens", "16", "64", "--batch", "1", "3", "--image-size", "40"]


def test_json(capsys: Capture) -> None:
    assert main(["bench", "-m", "demo", "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["is_complete"]) == ("demo", True)
    names = [
        "load_s",
        "time_to_first_token_cold_s",
        "time_to_first_token_warm_s",
        "prefill_16_tokens_per_s",
        "prefill_64_tokens_per_s",
        "decode_1_rows_tokens_per_s",
        "decode_3_rows_tokens_per_s",
        "peak_memory_bytes",
    ]
    assert all(found[name] > 0 for name in names)
    picture = found["image_40"]
    assert picture["tokens"] > 0
    assert picture["time_to_first_token_s"] >= picture["vision_and_prefill_s"] > picture["vision_s"] > 0
    assert found["peak_memory_bytes"] >= found["weights_bytes"] > 0


def test_the_recipe(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "types.yaml").write_text("0-1: {isq: 8@32}")
    flags = ["--isq", "4@32", "--isq-vision", "--topology", str(tmp_path / "types.yaml"), "--no-isq-cache"]
    assert main(["bench", "-m", "demo", "--json", *SMALL, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["isq"], found["isq_vision"]) == ("4@32", "True")
    assert found["topology"].endswith("types.yaml")
    assert "mmproj" not in found


def test_table(capsys: Capture) -> None:
    assert main(["bench", "-m", "demo", *SMALL, "--prompt-tokens", "16", "1000000"]) == 0
    out = capsys.readouterr().out
    for row in ("device", "load", "prefill 16", "decode 3 rows", "image 40", "peak memory"):
        assert f"\n{row}" in out
    assert "1000000" not in out  # beyond the context


def test_an_interrupt_leaves_what_there_is(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> Iterator[tuple[str, Any]]:
        yield "time_to_first_token_cold_s", 1.5
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_measure", measure)
    assert main(["bench", "-m", "demo", *SMALL]) == 130
    out = capsys.readouterr().out
    assert "time to first token cold     1.500 s" in out
    assert out.endswith("(interrupted)\n")


def test_an_error_leaves_what_there_is(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> Iterator[tuple[str, Any]]:
        yield "time_to_first_token_cold_s", 1.5
        raise UsageError("no memory for a picture")

    monkeypatch.setattr(bench, "_measure", measure)
    assert main(["bench", "-m", "demo", "--json", *SMALL]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["time_to_first_token_cold_s"], found["is_complete"]) == (1.5, False)
    assert "no memory for a picture" in err


@pytest.mark.parametrize("flag", ["--tokens", "--batch", "--prompt-tokens", "--image-size", "--repeat"])
def test_numbers_that_can_not_be(flag: str, capsys: Capture) -> None:
    assert main(["bench", "-m", "demo", flag, "0"]) == 2
    assert f"{flag} takes numbers from 1" in capsys.readouterr().err


def test_a_row_s_last_token_is_no_step(capsys: Capture) -> None:
    assert main(["bench", "-m", "demo", "--tokens", "1"]) == 2
    assert "--tokens takes numbers from 2" in capsys.readouterr().err


def test_pictures_that_would_be_refused(capsys: Capture) -> None:
    assert main(["bench", "-m", "demo", "--image-size", "40", "13342"]) == 2
    assert "--image-size takes numbers up to 13341" in capsys.readouterr().err


def test_all_rows_are_there_as_long_as_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are more rows than tokens."""
    rows, tokens = 12, 6
    steps = Counter[int]()

    def advance(self: Decoding, decoding: list[Any], call: Any = Decoding.advance) -> None:
        steps[len(decoding)] += 1
        call(self, decoding)

    monkeypatch.setattr(Decoding, "advance", advance)
    with load("demo", speculation="off") as engine:
        assert bench._step_s(engine, bench._Prompts(open_model("demo")), rows, tokens) > 0
    assert steps[rows] >= tokens - 1


def test_rows_that_wait_for_others_are_no_batch() -> None:
    prompts = bench._Prompts(open_model("demo"))
    with load("demo", max_rows=2) as engine:
        assert bench._step_s(engine, prompts, 2, 4) is not None
        assert bench._step_s(engine, prompts, 3, 4) is None
    words = bench._cell("decode_3_rows_tokens_per_s", None)
    assert words == "so many don't fit into the memory at once"


def test_guesses_are_for_those_who_ask(capsys: Capture) -> None:
    """The bench's text repeats itself, which is guessed at once."""
    told = []
    for flags in ([], ["--draft-tokens", "2"]):
        assert main(["bench", "-m", "demo", "--json", *SMALL, *flags]) == 0
        told.append(json.loads(capsys.readouterr().out)["speculation"])
    assert told == ["off", "on"]


def test_no_prompt_begins_like_another() -> None:
    prompts = bench._Prompts(open_model("demo"))
    made = [prompts.text(12, 1).prompt for _ in range(60)]
    assert all(prompt is not None and len(prompt.token_ids) == 12 for prompt in made)
    assert len({prompt.token_ids for prompt in made if prompt is not None}) == 60
