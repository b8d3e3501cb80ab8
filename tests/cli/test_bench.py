"""`mlxvlm bench`, with the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlxvlm.checkpoint.load import open_model
from mlxvlm.cli import bench, main

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
    assert picture["time_to_first_token_s"] >= picture["vision_and_prefill_s"] > 0


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


@pytest.mark.parametrize("flag", ["--tokens", "--batch", "--prompt-tokens", "--image-size", "--repeat"])
def test_numbers_that_can_not_be(flag: str, capsys: Capture) -> None:
    assert main(["bench", "-m", "demo", flag, "0"]) == 2
    assert f"{flag} takes numbers from 1" in capsys.readouterr().err


def test_no_prompt_begins_like_another() -> None:
    prompts = bench._Prompts(open_model("demo"))
    made = [prompts.text(12, 1).prompt for _ in range(60)]
    assert all(prompt is not None and len(prompt.token_ids) == 12 for prompt in made)
    assert len({prompt.token_ids for prompt in made if prompt is not None}) == 60
