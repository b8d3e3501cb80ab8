"""Where `run` takes its sampling from: the checkpoint, then the flags."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlxvlm.cli import main
from tests.golden import GOLDENS


def text_of(capsys: pytest.CaptureFixture[str], model: Path, *flags: str) -> str:
    assert main(["run", "-m", str(model), "--json", "--max-tokens", "12", "--seed", "1", "hello", *flags]) == 0
    text: str = json.loads(capsys.readouterr().out)["text"]
    return text


def test_the_checkpoints_own_settings_and_flags_over_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    greedy = GOLDENS / "idefics3_split"
    sampled = Path(shutil.copytree(greedy, tmp_path / "model"))
    path = sampled / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 4.0}))
    plain = text_of(capsys, greedy)
    hot = text_of(capsys, sampled)
    assert hot != plain
    assert hot == text_of(capsys, greedy, "--temperature", "4")
    assert text_of(capsys, sampled, "--temperature", "0") == plain


def test_a_stop_string_ends_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    model = GOLDENS / "idefics3_split"
    whole = text_of(capsys, model)
    assert text_of(capsys, model, "--stop", whole[3]) == whole[: whole.index(whole[3])]
