"""mistral.rs's words: architectures, and its old order of flags."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mlxvlm.cli import main, parser
from mlxvlm.cli.old_commands import hint
from tests.golden import GOLDENS

Capture = pytest.CaptureFixture[str]
QWEN = str(GOLDENS / "qwen2_vl_tied")


# The commands of its pages, behind the program's name.
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("-i --isq Q4K vision-plain -m a/b -a vllama", "chat --isq Q4K -m a/b"),
        ("--port 1234 --isq Q4K vision-plain -m a/b -a vllama", "serve -p 1234 --isq Q4K -m a/b"),
        ("-i vision-plain -m Qwen/Qwen2-VL-2B-Instruct -a vllama", "chat -m Qwen/Qwen2-VL-2B-Instruct"),
        ("-i vision-plain -m a/b -a vllama --from-uqff c/d/e-q4k.uqff", "chat -m a/b --from-uqff c/d/e-q4k.uqff"),
        ("-i --isq 4 vision-plain -m a/b", "chat --isq 4 -m a/b"),
        (
            "--port 1234  --isq 4 --chat-template ./chat_templates/vicuna.json vision-plain -m /root/llava",
            "serve -p 1234 --isq 4 --chat-template ./chat_templates/vicuna.json -m /root/llava",
        ),
        ("chat vision-plain -m a/b", "chat -m a/b"),
        ("run vision-plain -m a/b -a llava_next", "chat -m a/b"),
        (
            "--port=80 --serve-ip 0.0.0.0 --max-seqs 4 plain -m 'a b' -d bf16",
            "serve -p 80 --host 0.0.0.0 --max-rows 4 -m 'a b' --dtype bfloat16",
        ),
    ],
)
def test_a_command_in_the_old_order_is_translated(theirs: str, ours: str, capsys: Capture) -> None:
    assert main(shlex.split(theirs)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"mlxvlm: error: this is mistral.rs's old order of words; here it is: mlxvlm {ours}"
    parser().parse_args(shlex.split(ours))


@pytest.mark.parametrize("words", ["run vision", "run multimodal", "chat vision"])
def test_a_conversation_has_its_own_command(words: str, capsys: Capture) -> None:
    assert main([*words.split(), "--isq", "4", "-m", "HuggingFaceM4/Idefics3-8B-Llama3"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("another command here: mlxvlm chat --isq 4 -m HuggingFaceM4/Idefics3-8B-Llama3")


def test_what_has_no_counterpart_is_named() -> None:
    found = (
        hint(shlex.split("-i --cpu --prefix-cache-n 4 --max-seqs 2 vision-plain -m a/b -i imatrix.dat -e 512")) or ""
    )
    command, lost = found.removesuffix(", which nothing here corresponds to)").split(" (without ")
    assert command.endswith("here it is: mlxvlm chat -m a/b")
    assert lost == "--cpu, --prefix-cache-n, --max-seqs, -i, -e"


@pytest.mark.parametrize(
    "ours",
    [
        "",
        "chat -m demo --system plain",
        "run plain -m demo",
        "run -m demo vision-plain",
        "run vision -i photo.jpg -m demo",
        "run vision --image=photo.jpg -m demo",
        "serve vision-plain -p 1 -m demo",
        "quantize -m plain --isq 4 -o out",
        "-m demo",
        "''",
    ],
)
def test_our_own_commands_are_let_be(ours: str) -> None:
    assert hint(shlex.split(ours)) is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["caht", "-m", "demo"], "there is no command caht: did you mean chat?"),
        (["xyzzy"], "there is no command xyzzy: there are run, chat, serve"),
        (["-m", "demo", "hello"], "a command comes first: run, chat, serve"),
        ([""], "there is no command : there are run"),
    ],
)
def test_what_is_no_command(argv: list[str], words: str, capsys: Capture) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)


def test_no_command_at_all_shows_what_there_is(capsys: Capture) -> None:
    assert main([]) == 2
    assert "mlxvlm chat -m" in capsys.readouterr().err


def ask(*flags: str, model: str = QWEN) -> int:
    return main(["run", "-m", model, "-q", "--max-tokens", "1", "hello", *flags])


@pytest.mark.parametrize("name", ["qwen2vl", "Qwen2VL", "QWEN2VL"])
def test_the_right_architecture_changes_nothing(name: str, capsys: Capture) -> None:
    assert ask() == ask("-a", name) == 0
    plain, named = capsys.readouterr().out.splitlines()
    assert plain == named


def test_mistral_rs_writes_it_in_two_ways() -> None:
    assert ask("--arch", "llava_next", model=str(GOLDENS / "llava_next_tiles")) == 0
    assert ask("--arch", "llava-next", model=str(GOLDENS / "llava_next_tiles")) == 0
    assert main(["run", "-m", "demo", "-a", "idefics3", "hello"]) == 0


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_wrong_architecture(command: str, capsys: Capture) -> None:
    assert main([command, "-m", QWEN, "-a", "vllama", *(["hello"] if command == "run" else [])]) == 2
    assert f"--arch stands for mllama, but {QWEN} is qwen2_vl: leave --arch out" in capsys.readouterr().err


def test_an_unknown_architecture(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        ask("-a", "phi3v")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "there is no architecture 'phi3v': there are llava_next, llava, vllama, qwen2vl, idefics3, llama4" in err


def test_serve(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxvlm.server.request_log.configure_logging", lambda as_json: None)
    assert main(["serve", "-m", QWEN, "-p", "0", "-a", "vllama"]) == 2
    assert "leave --arch out" in capsys.readouterr().err
    file = tmp_path / "server.toml"
    file.write_text(f'port = 0\n[models.small]\nmodel = "{QWEN}"\narch = "llama4"\n')
    assert main(["serve", "--config", str(file)]) == 2
    assert "--arch stands for llama4" in capsys.readouterr().err
