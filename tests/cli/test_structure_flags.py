"""Flags of `run` beyond plain numbers: grammars, biases, breakers, timeouts, the prefix cache."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mlxvlm
from mlxvlm.cli import main
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import Grammar
from mlxvlm.engine.request import Request
from mlxvlm.engine.stream import Stream

SCHEMA = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 2}
LARK = 'start: "one" | "two"'
Capture = pytest.CaptureFixture[str]


def run(*argv: str) -> int:
    return main(["run", "-m", "demo", "--max-tokens", "40", "--json", "Tell me.", *argv])


def answered(capsys: Capture, *argv: str) -> dict[str, Any]:
    assert run(*argv) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: Capture, *argv: str) -> str:
    """The error line; nothing comes before it."""
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("mlxvlm: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that reach an engine."""
    found: list[Request] = []
    submit = Engine.submit

    def spy(self: Engine, request: Request) -> Stream:
        found.append(request)
        return submit(self, request)

    monkeypatch.setattr(Engine, "submit", spy)
    return found


def test_json_schema(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    for value in (str(path), json.dumps(SCHEMA)):
        texts = json.loads(answered(capsys, "--json-schema", value)["text"])
        assert len(texts) == 2
        assert set(texts) <= {"red", "blue"}


def test_regex_and_grammar(capsys: Capture, tmp_path: Path) -> None:
    assert re.fullmatch("(red|blue) [a-z]{3}", answered(capsys, "--regex", "(red|blue) [a-z]{3}")["text"])
    path = tmp_path / "one.lark"
    path.write_text(LARK)
    for value in (str(path), LARK):
        assert answered(capsys, "--grammar", value)["text"] in ("one", "two")


def test_json_object(asked: list[Request], capsys: Capture) -> None:
    assert answered(capsys, "--json-object")["text"].startswith("{")
    answered(capsys)
    assert [request.sampling and request.sampling.grammar for request in asked] == [Grammar("json_object"), None]


def test_biases_and_breakers(asked: list[Request], capsys: Capture) -> None:
    answered(capsys, "--logit-bias", "7=100", "--logit-bias", "9=-1.5", "--dry-sequence-breaker", "\n\n")
    answered(capsys)
    given, plain = (request.sampling for request in asked)
    assert given is not None
    assert plain is not None
    assert given.logit_bias == {7: 100.0, 9: -1.5}
    assert (plain.logit_bias, given.dry_sequence_breakers) == ({}, ("\n\n",))
    assert plain.dry_sequence_breakers == ("\n", ":", '"', "*")


def test_a_timeout_ends_an_answer_with_what_there_is(asked: list[Request], capsys: Capture) -> None:
    assert answered(capsys, "--timeout", "100")["finish_reason"] == "stop"
    assert answered(capsys, "--timeout", "0.00001")["finish_reason"] == "timeout"
    assert [request.timeout_s for request in asked] == [100.0, 0.00001]
    assert main(["run", "-m", "demo", "--timeout", "0.00001", "hello"]) == 0
    assert "(cut after 1e-05 s: see --timeout)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--json-schema", "nowhere.json"], "--json-schema: nowhere.json: No such file"),
        (["--json-schema", "{x"], "--json-schema is no JSON"),
        (["--json-schema", "{" * 5000], "--json-schema is no JSON"),
        (["--grammar", "nowhere.lark"], "--grammar: nowhere.lark: No such file"),
        (["--grammar", "x" * 5000], "File name too long"),
        (["--grammar", "."], "--grammar: .: Is a directory"),
        (["--logit-bias", "3"], "--logit-bias takes ID=VALUE like 42=-100, not '3'"),
        (["--logit-bias", "a=1"], "--logit-bias takes ID=VALUE"),
        (["--logit-bias", "3=nan"], "a value of logit_bias must be a number from -100 to 100"),
        (["--seed", "-1"], "seed must be a whole number from 0 to 18446744073709551615, not -1"),
        (["--timeout", "0"], "--timeout is a number of seconds above 0, not 0"),
        (["--timeout", "nan"], "--timeout is a number of seconds above 0, not nan"),
        (["--timeout", "inf"], "--timeout is a number of seconds above 0, not inf"),
        (["--typical-p", "1.5"], "typical_p must be a number from 0 to 1"),
        (["--dry-allowed-length", "0"], "dry_allowed_length must be a whole number of at least 1"),
        (["--prefix-cache-size", "1"], "give it with --prefix-cache DIR"),
        (["--prefix-cache", "x", "--prefix-cache-size", "0"], "--prefix-cache-size is a number of gigabytes above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_weights_are_read(
    flags: list[str], words: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(folder: Path) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("mlxvlm.checkpoint.build.read_weights", reached)
    assert words in refused(capsys, *flags)


def test_a_folder_that_can_not_be_made(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "the prefix cache can't be kept in" in refused(capsys, "--prefix-cache", str(tmp_path / "file" / "cache"))


def test_ids_beyond_the_vocabulary(capsys: Capture) -> None:
    assert "logit_bias must be a whole number from 0 to 511" in refused(capsys, "--logit-bias", "99999=1")


def test_one_structure_at_a_time(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as error:
        run("--regex", "a", "--json-object")
    assert error.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "usage: mlxvlm run [options] -m MODEL [prompt]",
        "mlxvlm run: error: argument --json-object: not allowed with argument --regex",
    ]


LONG = "You are a patient teacher of small children. " * 8


def test_a_prompt_is_kept_for_the_next_run(capsys: Capture, tmp_path: Path) -> None:
    flags = ["--system", LONG, "--prefix-cache", str(tmp_path / "new" / "cache")]
    first, second = (answered(capsys, *flags) for _ in range(2))
    plain = answered(capsys, "--system", LONG)
    assert first["text"] == second["text"] == plain["text"]
    assert (first["cached_tokens"], plain["cached_tokens"]) == (0, 0)
    assert second["cached_tokens"] >= 64
    assert answered(capsys, *flags, "--isq", "8")["cached_tokens"] == 0, "another model's keys and values"
    held = len(list((tmp_path / "new" / "cache").iterdir()))
    assert answered(capsys, *flags, "--prefix-cache-size", "0.00000001")["cached_tokens"] == 0
    assert held > len(list((tmp_path / "new" / "cache").iterdir()))


def test_json_tells_all_seconds(capsys: Capture) -> None:
    found = answered(capsys)
    parts = found["prepare_s"] + found["prompt_s"] + found["completion_s"]
    assert 0 < parts <= found["total_s"] + 1e-3
    assert found["time_to_first_token_s"] >= found["prompt_s"] > 0


def test_figures_tell_what_was_kept(capsys: Capture, tmp_path: Path) -> None:
    for words in (" tokens, ", " kept), "):
        assert main(["run", "-m", "demo", "--system", LONG, "--prefix-cache", str(tmp_path), "hello"]) == 0
        assert words in capsys.readouterr().err


def test_python_takes_the_same_options(tmp_path: Path) -> None:
    sampling = mlxvlm.SamplingParams(max_tokens=3)
    question = mlxvlm.Request([mlxvlm.system(LONG), mlxvlm.user("hello")], sampling)
    cached = []
    for _ in range(2):
        with mlxvlm.load("demo", prefix_cache_dir=tmp_path, max_rows=3) as engine:
            assert engine.config.max_rows == 3
            assert engine.config.model_id
            cached += [engine.generate(question).usage.cached_tokens for _ in range(2)]
    assert cached[0] == 0
    assert min(cached[1:]) > 0
