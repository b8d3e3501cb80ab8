"""`mlxvlm run` as a person and as a script uses it."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlxvlm.cli import main
from tests.golden import GOLDENS

MODEL = str(GOLDENS / "idefics3_split")
PICTURE = str(GOLDENS / "images" / "wide.png")
Capture = pytest.CaptureFixture[str]


def run(*argv: str) -> int:
    return main(["run", "-m", MODEL, "--max-tokens", "8", *argv])


def test_the_answer_goes_to_stdout_and_figures_to_stderr(capsys: Capture) -> None:
    assert run("--image", PICTURE, "Tell me.") == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert out.strip()
    line = err.strip().splitlines()[-1]
    for part in ("prompt ", " tok/s | completion 8 tokens", "first token ", "peak memory "):
        assert part in line


def test_json_is_one_object_that_says_the_same(capsys: Capture) -> None:
    assert run("--image", PICTURE, "Tell me.") == 0
    text = capsys.readouterr().out
    assert run("--image", PICTURE, "Tell me.", "--json") == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["text"].rstrip("\n") == text.rstrip("\n")
    assert answer["finish_reason"] == "length"
    assert answer["completion_tokens"] == 8
    assert answer["image_tokens"] > 0
    assert answer["prompt_tokens"] > answer["image_tokens"]
    assert answer["peak_memory_bytes"] > 0
    assert err == ""


def test_quiet(capsys: Capture) -> None:
    assert run("-q", "Tell me.") == 0
    assert capsys.readouterr().err == ""


def test_a_cut_answer_says_so(capsys: Capture) -> None:
    assert run("Tell me.") == 0
    assert "--max-tokens" in capsys.readouterr().err


def test_the_prompt_may_come_from_a_pipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("Tell me.", "--json") == 0
    spoken = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me."))
    assert run("-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == spoken["text"]


def test_a_system_message_changes_the_prompt(capsys: Capture) -> None:
    assert run("Tell me.", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert run("Tell me.", "--json", "--system", "Be brief.") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > plain["prompt_tokens"]


def test_a_seed_repeats(capsys: Capture) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert run("Tell me.", "--json", "--temperature", "3", "--top-p", "0.99", "--seed", seed) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_several_images_keep_their_order(capsys: Capture) -> None:
    other = str(GOLDENS / "images" / "tall.png")
    texts = []
    for images in ((PICTURE, other), (other, PICTURE)):
        assert run("--image", images[0], "--image", images[1], "Which?", "--json") == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["image_tokens"] == texts[1]["image_tokens"]
    assert texts[0]["text"] != texts[1]["text"]


def test_a_chat_template_can_be_given(capsys: Capture, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'][-1]['text'] }}")
    assert run("Tell me.", "--json", "--chat-template", str(template)) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] < 12


def truncated(path: Path, data: bytes) -> str:
    path.write_bytes(data[: len(data) // 2])
    return str(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(out, kind)
    return out.getvalue()


def bad_image(kind: str, folder: Path) -> str:
    if kind == "missing":
        return str(folder / "nothing.png")
    if kind == "no image":
        (folder / "notes.txt").write_text("hello")
        return str(folder / "notes.txt")
    if kind in ("PNG", "JPEG"):
        return truncated(folder / f"cut.{kind.lower()}", encoded(kind))
    if kind == "huge":
        (folder / "huge.png").write_bytes(png_header(100_000, 100_000))
        return str(folder / "huge.png")
    if kind == "base64":
        return "data:image/png;base64,@@@@"
    return "http://127.0.0.1:9/picture.png"


@pytest.mark.parametrize("kind", ["missing", "no image", "PNG", "JPEG", "huge", "base64", "URL"])
def test_bad_images(kind: str, capsys: Capture, tmp_path: Path) -> None:
    assert run("--image", bad_image(kind, tmp_path), "Tell me.") == 3
    expect_one_line(capsys)


def expect_one_line(capsys: Capture, *words: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mlxvlm: error: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(MODEL, folder / "model"))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def other_type(model: Path) -> None:
    edit_config(model, lambda config: config.update(model_type="mamba"))


def edit_config(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


def cut_shard(model: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_shard(model: Path) -> None:
    (model / "model-00001-of-00002.safetensors").unlink()


def wrong_shape(model: Path) -> None:
    edit_config(model, lambda config: config["text_config"].update(intermediate_size=64))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, ["no model"]),
        (other_type, ["mamba", "idefics3", "smolvlm"]),
        (cut_shard, ["model-00002-of-00002.safetensors"]),
        (lose_shard, ["model-00001-of-00002.safetensors"]),
        (wrong_shape, ["gate_proj.weight (32, 32) instead of (64, 32)"]),
    ],
)
def test_bad_models(damage: Callable[[Path], None], words: list[str], capsys: Capture, tmp_path: Path) -> None:
    model = copied(tmp_path)
    damage(model)
    assert main(["run", "-m", str(model), "hello"]) == 4
    expect_one_line(capsys, *words)


def test_no_such_model(capsys: Capture) -> None:
    assert main(["run", "-m", "./nowhere", "hello"]) == 4
    expect_one_line(capsys, "nowhere")


def test_a_template_that_raises(capsys: Capture, tmp_path: Path) -> None:
    template = tmp_path / "no.jinja"
    template.write_text("{{ raise_exception('only on Sundays') }}")
    assert run("--chat-template", str(template), "hello") == 3
    expect_one_line(capsys, "only on Sundays")


def test_a_prompt_longer_than_the_context(capsys: Capture, tmp_path: Path) -> None:
    model = copied(tmp_path)
    edit_config(model, lambda config: config["text_config"].update(max_position_embeddings=20))
    assert main(["run", "-m", str(model), "word " * 50]) == 3
    expect_one_line(capsys, "context is 20")


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_message(text: str, capsys: Capture) -> None:
    assert run(text) == 3
    expect_one_line(capsys, "empty")


def test_no_prompt(capsys: Capture) -> None:
    assert run("--image", PICTURE) == 2
    expect_one_line(capsys, "no prompt", "mlxvlm chat")


@pytest.mark.parametrize(
    "flags", [["--temperature", "-1"], ["--top-p", "2"], ["--max-tokens", "0"], ["--min-p", "nan"]]
)
def test_parameters_out_of_range(flags: list[str], capsys: Capture) -> None:
    assert run("hello", *flags) == 2
    expect_one_line(capsys)


@pytest.mark.parametrize("argv", [["run"], ["run", "-m", "demo", "--temperature", "hot", "x"]])
def test_usage_errors(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_prompt_without_quotes(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "-m", "demo", "what", "is", "this"])
    assert end.value.code == 2
    assert "the prompt is more than one word: put it in quotes" in capsys.readouterr().err


def test_the_templates_space_is_not_shown(capsys: Capture) -> None:
    assert main(["run", "-m", "demo", "Hello!"]) == 0
    assert capsys.readouterr().out == "Hello! Show me a picture and ask me about it.\n"


def test_debug_shows_where(capsys: Capture) -> None:
    assert main(["--debug", "run", "-m", "./nowhere", "hello"]) == 4
    assert "Traceback" in capsys.readouterr().err


def shell(command: str) -> subprocess.CompletedProcess[str]:
    script = command.replace("MLXVLM", f"{sys.executable} -m mlxvlm").replace("MODEL", MODEL)
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", ["run -m MODEL hi >/dev/full", "doctor >/dev/full"])
def test_a_full_disk_is_an_internal_error_of_one_line(command: str) -> None:
    done = shell(f"MLXVLM {command}")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("mlxvlm: error: OSError:")
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


@pytest.mark.parametrize(("streams", "code"), [("- <&-", 3), ("hi >&-", 0), ("hi 2>&-", 0)])
def test_closed_streams(streams: str, code: int) -> None:
    done = shell(f"MLXVLM run -m MODEL --max-tokens 3 {streams}")
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_a_terminal_that_can_not_show_a_character() -> None:
    done = shell("PYTHONIOENCODING=ascii MLXVLM run -m MODEL hi --temperature 3 --seed 1 --max-tokens 60")
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_a_defect_is_one_line_and_its_own_exit_code(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("of ours\nin two lines")

    monkeypatch.setattr("mlxvlm.checkpoint.load.open_model", broken)
    assert run("hello") == 5
    expect_one_line(capsys, "ZeroDivisionError: of ours in two lines")


def test_the_first_ctrl_c_never_tears_an_answer() -> None:
    """At whatever piece it comes, the loop ends with a last piece."""
    from mlxvlm.cli.run import _consume
    from mlxvlm.engine.request import Delta, Usage
    from mlxvlm.engine.stream import Stream

    usage = Usage(1, 1, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for place in range(3):
        stream = Stream(lambda: None)
        for delta in (Delta("a", (1,)), Delta("b", (2,)), Delta("c", (3,), (), "stop", usage)):
            stream.put(delta)
        shown: list[str] = []

        def show(text: str, shown: list[str] = shown, place: int = place) -> None:
            if len(shown) == place:
                signal.raise_signal(signal.SIGINT)
            shown.append(text)

        completion, code = _consume(stream, show)
        assert (completion.text, code, shown) == ("abc", 130, ["a", "b", "c"])


def test_both_outputs_tell_the_same_first_token_time(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxvlm.processors.idefics3 import Idefics3Processor

    prepare = Idefics3Processor.__call__

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(Idefics3Processor, "__call__", slow)
    assert run("hello", "--json") == 0
    assert json.loads(capsys.readouterr().out)["time_to_first_token_s"] >= 0.3
    assert run("hello") == 0
    seconds = re.search(r"first token ([\d.]+) s", capsys.readouterr().err)
    assert seconds
    assert float(seconds[1]) >= 0.3


# Says on stderr that it has the first token, and can be interrupted.
BEGUN = """
import sys, mlxvlm.cli, mlxvlm.engine.stream as engine
read = engine.Stream._read
engine.Stream._read = lambda *given: (print("begun", file=sys.stderr, flush=True), read(*given))[1]
sys.exit(mlxvlm.cli.main(sys.argv[1:]))
"""


def endless(folder: Path, *argv: str, script: str = "") -> subprocess.Popen[bytes]:
    """A child that writes until it is stopped: no stop token, and a context that takes minutes to fill."""
    model = copied(folder)
    (model / "generation_config.json").write_text("{}")

    def forget_the_end(config: dict[str, Any]) -> None:
        config["text_config"].pop("eos_token_id")
        config["text_config"]["max_position_embeddings"] = 10**6

    edit_config(model, forget_the_end)
    program = [sys.executable, *(["-c", script] if script else ["-m", "mlxvlm"])]
    command = [*program, "run", "-m", str(model), "--max-tokens", "1000000", "hello", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_with_what_was_produced(times: int, tmp_path: Path) -> None:
    child = endless(tmp_path)
    assert child.stdout is not None
    first = child.stdout.read(20)
    for _ in range(times):
        child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err
    if times == 1:
        assert (first + out).endswith(b"\n")
        assert b"completion" in err


def test_ctrl_c_with_json_prints_the_object(tmp_path: Path) -> None:
    child = endless(tmp_path, "--json", script=BEGUN)
    assert child.stderr is not None and child.stderr.readline() == b"begun\n"  # noqa: PT018 - the object comes last
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert json.loads(out)["finish_reason"] == "cancelled"
    assert b"Traceback" not in err


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    child = endless(tmp_path, "-q")
    assert child.stdout is not None
    child.stdout.read(5)
    child.stdout.close()
    assert child.wait(timeout=60) == 141
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()
