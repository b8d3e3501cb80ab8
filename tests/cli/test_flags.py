"""What the flags of the commands lead to."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mlxvlm
from mlxvlm import runner
from mlxvlm.cli import main, progress
from mlxvlm.engine import device
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.detokenizer import Detokenizer
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.engine.stream import Stream
from tests.checkpoint.wide import write_wide
from tests.golden import GOLDENS

MODEL = str(GOLDENS / "idefics3_split")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def run(*argv: str, model: str = MODEL) -> int:
    return main(["run", "-m", model, "--max-tokens", "8", "--json", "Tell me.", *argv])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answered(capsys: Capture, *argv: str) -> dict[str, Any]:
    assert run(*argv) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_dtype(dtype: str, monkeypatch: Patch) -> None:
    from mlxvlm.checkpoint.bind import bind

    asked: list[str] = []

    def spy(model: Any, weights: Any, dtype: str, *rest: Any) -> None:
        asked.append(dtype)
        bind(model, weights, dtype, *rest)

    monkeypatch.setattr("mlxvlm.checkpoint.build.bind", spy)
    assert run("--dtype", dtype) == 0
    assert asked == [dtype]


@pytest.mark.parametrize(("flags", "revision"), [([], None), (["--revision", "v2"], "v2")])
def test_revision(flags: list[str], revision: str | None, monkeypatch: Patch) -> None:
    asked: list[tuple[str, str | None]] = []

    def spy(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return Path(MODEL)

    monkeypatch.setattr("mlxvlm.checkpoint.load.resolve", spy)
    assert run(*flags, model="someone/model") == 0
    assert asked == [("someone/model", revision)]


def test_stop_ends_the_answer_before_the_first_of_its_texts(capsys: Capture) -> None:
    whole = answered(capsys)["text"]
    late, early = whole[-3:], whole[2:5]
    for flags in (["--stop", early], ["--stop", late, "--stop", early], ["--stop", early, "--stop", late]):
        found = answered(capsys, *flags)
        assert (found["text"], found["finish_reason"]) == (whole[: whole.index(early)], "stop")


@pytest.fixture
def asked(monkeypatch: Patch) -> list[SamplingParams]:
    """The sampling of each request that reaches an engine."""
    found: list[SamplingParams] = []
    submit = Engine.submit

    def spy(self: Engine, request: Request) -> Stream:
        found.append(request.sampling or self.config.sampling)
        return submit(self, request)

    monkeypatch.setattr(Engine, "submit", spy)
    return found


@pytest.fixture
def sampled_model(tmp_path: Path) -> str:
    """A checkpoint that wants to be sampled."""
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    wishes = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1}
    wishes |= {"min_p": 0.125, "typical_p": 0.875}
    (model / "generation_config.json").write_text(json.dumps(wishes))
    return str(model)


def test_a_checkpoints_own_sampling(sampled_model: str, asked: list[SamplingParams]) -> None:
    wanted = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.125, typical_p=0.875, repetition_penalty=1.1)
    with mlxvlm.load(sampled_model) as engine:
        assert engine.config.sampling == wanted
    assert run(model=sampled_model) == 0
    assert run() == 0
    assert [(s.temperature, s.top_p, s.top_k, s.repetition_penalty) for s in asked] == [
        (0.7, 0.9, 5, 1.1),
        (0.0, 1.0, 0, 1.0),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("top_p", 0.5),
        ("top_k", 0),
        ("min_p", 0.25),
        ("typical_p", 0.5),
        ("xtc_probability", 0.5),
        ("xtc_threshold", 0.25),
        ("dry_multiplier", 0.75),
        ("dry_base", 1.5),
        ("dry_allowed_length", 3),
        ("repetition_penalty", 1.5),
        ("frequency_penalty", 0.5),
        ("presence_penalty", 0.75),
        ("seed", 3),
        ("max_tokens", 2),
    ],
)
def test_a_flag_goes_before_the_checkpoints_wish(
    name: str, value: float, sampled_model: str, asked: list[SamplingParams]
) -> None:
    assert run(model=sampled_model) == 0
    assert run(f"--{name.replace('_', '-')}", str(value), model=sampled_model) == 0
    plain, changed = (vars_of(sampling) for sampling in asked)
    assert plain[name] != value
    assert changed == {**plain, name: value}


def vars_of(sampling: SamplingParams) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_escape_sequences_do_not_reach_a_terminal(kind: Callable[[], io.StringIO], monkeypatch: Patch) -> None:
    out = kind()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(Detokenizer, "feed", lambda self, token_id: "\x1b[31m\té\x7f\r\n")
    monkeypatch.setattr(Detokenizer, "flush", lambda self: "")
    assert main(["run", "-m", MODEL, "--max-tokens", "1", "-q", "hello"]) == 0
    assert out.getvalue() == ("␛[31m\té␡␍\n" if out.isatty() else "\x1b[31m\té\x7f\r\n")


@pytest.mark.parametrize("bad", ["image", "template"])
def test_bad_input_is_found_before_weights_are_read(
    bad: str, capsys: Capture, monkeypatch: Patch, tmp_path: Path
) -> None:
    def reached(folder: Path) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("mlxvlm.checkpoint.build.read_weights", reached)
    assert run() == 5
    template = tmp_path / "bad.jinja"
    template.write_text("{{ raise_exception('no') }}")
    assert run(*(["--image", "nowhere.png"] if bad == "image" else ["--chat-template", str(template)])) == 3
    assert "weights were read" not in capsys.readouterr().err.splitlines()[-1]


def test_loading_is_reported_to_the_bar(monkeypatch: Patch) -> None:
    seen: list[tuple[int, int]] = []

    @contextmanager
    def bar(title: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr("mlxvlm.cli.run.byte_bar", bar)
    assert run() == 0
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def drawn(err: io.StringIO, monkeypatch: Patch) -> str:
    monkeypatch.setattr(sys, "stderr", err)
    with progress.byte_bar("loading") as show:
        show(250_000, 2_000_000)
        time.sleep(0.15)  # tqdm draws ten times a second at most
        show(500_000, 2_000_000)
        return err.getvalue()


def test_the_bar_shows_how_far_it_is(monkeypatch: Patch) -> None:
    monkeypatch.setattr(progress, "_DELAY_S", 0)
    text = drawn(Terminal(), monkeypatch).split("\r")[-1]
    for part in ("loading", "25%", "500k/2.00M"):
        assert part in text


def test_short_work_and_pipes_have_no_bar(monkeypatch: Patch) -> None:
    assert drawn(Terminal(), monkeypatch) == ""
    monkeypatch.setattr(progress, "_DELAY_S", 0)
    assert drawn(io.StringIO(), monkeypatch) == ""


def doctor(memory: int, working_set: int, capsys: Capture, monkeypatch: Patch) -> str:
    """What `doctor` says of MODEL on such a machine."""
    machine = device.DeviceReport("fake", True, "0", memory, working_set)
    monkeypatch.setattr(device, "report", lambda: machine)
    assert main(["doctor", "-m", MODEL]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "working_set", "words"),
    [
        (10 * 10**9, 7 * 10**9, "10.00 GB, 7.00 GB of it for models"),
        (10 * 10**9, 0, "10.00 GB, 8.00 GB of it for models"),
    ],
)
def test_doctor_tells_usable_memory(
    memory: int, working_set: int, words: str, capsys: Capture, monkeypatch: Patch
) -> None:
    out = doctor(memory, working_set, capsys, monkeypatch)
    assert words in out
    assert ": fits" in out
    assert "does not fit" not in out


def test_doctor_tells_what_does_not_fit(capsys: Capture, monkeypatch: Patch) -> None:
    out = doctor(10 * 10**9, 1000, capsys, monkeypatch)
    assert ": does not fit" in out
    assert ": fits" not in out


def test_max_memory(capsys: Capture, monkeypatch: Patch) -> None:
    assert run("--max-memory", "4") == 0
    assert run("--max-memory", "0.00001") == 4
    assert "quantise the model (--isq), or raise the budget (--max-memory)" in capsys.readouterr().err
    assert run("--max-memory", "0") == 2
    assert "--max-memory is a number of gigabytes above 0, not 0" in capsys.readouterr().err


def test_kv_flags(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    built: list[EngineConfig] = []

    class Spy(Engine):
        def __init__(self, build: Any, processor: Any, config: EngineConfig, *rest: Any) -> None:
            built.append(config)
            super().__init__(build, processor, config, *rest)

    monkeypatch.setattr(runner, "Engine", Spy)
    model = str(write_wide(tmp_path, "idefics3"))
    assert run(model=model) == 0
    assert run("--kv-bits", "4", "--kv-group-size", "32", "--context-shift", model=model) == 0
    mlxvlm.load(model, kv_bits=8, context_shift=True).close()
    found = [(config.kv_bits, config.kv_group_size, config.context_shift) for config in built]
    assert found == [(None, 64, False), (4, 32, True), (8, 64, True)]
    assert run("--kv-bits", "8") == 4
    assert "heads have 16 values" in capsys.readouterr().err
    assert run("--kv-bits", "8", "--kv-group-size", "48") == 2
    assert "kv_group_size must be one of (32, 64, 128), not 48" in capsys.readouterr().err
