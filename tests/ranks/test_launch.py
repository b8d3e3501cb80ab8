"""--shards, mlx.launch and load() under it: who answers, who follows, and who is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mlxvlm.cli import main
from mlxvlm.errors import RanksError, UsageError
from mlxvlm.ranks import launch
from tests.ranks.processes import PICTURE, Process, alone, gone, ranks

QUESTION = ("-i", PICTURE, "What is this?")
ANSWER = "A pink heart on a gray background.\n"


def test_shards_answer_as_one_process(tmp_path: Path) -> None:
    with alone(tmp_path, "run", "-m", "demo", "-q", "--shards", "2", *QUESTION) as process:
        assert process.status() == 0
        assert process.said == ANSWER
        assert process.shards() == []


def test_ranks_that_end_well_have_nothing_to_say(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, ("run", "-m", "demo", "-q", *QUESTION)) as started:
        assert [each.status() for each in started] == [0, 0]
        assert started[0].said == ANSWER
        lines = started[1].said.splitlines()
        assert lines[0] == "mlxvlm: rank 1 of 2 (127.0.0.1) waits for the others"
        assert lines[1].startswith("mlxvlm: rank 1 of 2 (127.0.0.1) has its share, ")
        assert len(lines) == 2


def test_ranks_whose_addresses_nobody_knows(tmp_path: Path) -> None:
    faults = dict.fromkeys(range(2), "no-addresses")
    with ranks(tmp_path, 2, ("run", "-m", "demo", "-q", *QUESTION), faults) as started:
        assert [each.status() for each in started] == [0, 0], started[0].said
        assert started[0].said == ANSWER


def test_load_under_mlx_launch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import mlxvlm\n"
        "with mlxvlm.load('demo') as engine:\n"
        f"    print(engine.generate('What is this?', images=[{PICTURE!r}]).text.strip())\n"
    )
    launcher = "import sys; from mlx._distributed_utils.launch import main; main()"
    words = ["-c", launcher, "--backend", "ring", "-n", "2", "--", sys.executable, str(script)]
    process = Process(words, tmp_path / "log.txt", PYTHONPATH=str(Path(__file__).parents[2]))
    assert process.status() == 0
    assert process.said == ANSWER


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    with alone(tmp_path, "serve", "-m", "demo", "--port", "0", "--shards", "2") as process:
        process.wait_for("mlxvlm: demo at ")
        assert len(process.shards()) == 1
        process.popen.send_signal(signal.SIGINT)
        assert process.status() == 0
        assert process.shards() == []
        assert process.errors == []


def test_ctrl_c_that_all_ranks_get(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, ("serve", "-m", "demo", "--port", "0")) as started:
        started[0].wait_for("mlxvlm: demo at ")
        for each in reversed(started):
            each.popen.send_signal(signal.SIGINT)
        assert [each.status() for each in started] == [0, 0], started[1].said
        assert started[0].errors == started[1].errors == []


def test_no_folder_is_left_by_a_loss(tmp_path: Path) -> None:
    (folder := tmp_path / "temporary").mkdir()
    words = ("-m", "mlxvlm", "serve", "-m", "demo", "--port", "0", "--shards", "2")
    process = Process(words, tmp_path / "log.txt", TMPDIR=str(folder))
    try:
        process.wait_for("mlxvlm: demo at ")
        os.kill(process.shards()[0], signal.SIGKILL)
        assert process.status() == 1
        assert list(folder.iterdir()) == []
    finally:
        process.end()


def test_ctrl_c_while_they_load(tmp_path: Path) -> None:
    with alone(tmp_path, "run", "-m", "demo", "--shards", "2", "hello") as process:
        while not process.shards():
            assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGINT)
        # Python ends itself by the signal where that met one of its imports; a shell calls both 130.
        assert process.status() in (130, -signal.SIGINT), process.said
        assert gone(process)


@pytest.mark.parametrize("pause_s", [0.0, 0.3, 0.6])
def test_ctrl_c_while_a_server_starts(pause_s: float, tmp_path: Path) -> None:
    """Whatever it is at: meeting, loading, or done with both."""
    with alone(tmp_path, "serve", "-m", "demo", "--port", "0", "--shards", "2") as process:
        while not process.shards():
            assert process.popen.poll() is None
        time.sleep(pause_s)
        process.popen.send_signal(signal.SIGINT)
        assert process.status() in (0, 130, -signal.SIGINT), process.said
        assert process.errors == []
        assert gone(process)


@pytest.mark.parametrize(("count", "fault", "at"), [(3, "greeting", 0), (2, "slow-connection", 0), (2, "slow-load", 1)])
def test_ctrl_c_before_all_have_their_share(count: int, fault: str, at: int, tmp_path: Path) -> None:
    """While one is still missing, while MLX connects them, while another one loads."""
    words = ("serve", "-m", "demo", "--port", "0")
    with ranks(tmp_path, count, words, {at: fault}, present=(0, 1)) as started:
        started[at].wait_for(f"AT {fault}")
        started[0].popen.send_signal(signal.SIGINT)
        assert [each.status() for each in started] == [0, 0], (started[0].said, started[1].said)
        assert started[0].errors == started[1].errors == []


def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    with alone(tmp_path, "serve", "-m", "demo", "--port", "0", "--shards", "2") as process:
        process.wait_for("mlxvlm: demo at ")
        process.popen.kill()
        process.popen.wait()
        assert gone(process)


def test_a_shard_that_fails_ends_all(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with alone(tmp_path, "run", "-m", missing, "--shards", "2", "hello") as process:
        assert process.status() == 4
        assert process.shards() == []


def test_a_shards_words_have_its_number(capfd: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        with launch.shards(2, ["models", "--no-such-flag"]) as started:
            for _ in iter(int, 1):
                started.check()

    with pytest.raises(RanksError, match=r"rank 1 of 2 \(127.0.0.1\) ended with status 2; what it said"):
        failing()
    assert "rank 1: mlxvlm: error: unrecognized arguments: --no-such-flag" in capfd.readouterr().err


def test_a_shard_that_does_not_end_well_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_marked", list)
    with (
        pytest.raises(RanksError, match=r"rank 1 of 2 \(127.0.0.1\) did not end well, though rank 0 was done"),
        launch.shards(2, ["no-such-command"]) as started,
    ):
        started.connected()
    with launch.shards(2, ["--version"]) as started:
        started.connected()
    assert threading.active_count() < 50


def test_where_the_mark_stands() -> None:
    assert launch._marked(["run", "-m", "demo"])[:4] == ["run", "-m", "demo", "--shard-of"]
    assert launch._marked(["run", "--", "-x"])[1] == "--shard-of"
    assert launch._marked(["run", "--", "-x"])[3:] == ["--", "-x"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "--shards", "0"], "--shards is a number from 1 to 16"),
        (["run", "--shards", "17"], "--shards is a number from 1 to 16"),
        (["run", "--shards", "2", "--rank-timeout", "0"], "--rank-timeout is a number of seconds"),
        (["run", "--shards", "2", "--draft-model", "demo"], "can't have a draft model"),
        (["chat", "--shards", "2", "--prefix-cache", "cache"], "can't keep prompts in files"),
        (["serve", "-m", "other=demo", "--shards", "2"], "several ranks run one model together"),
        (["serve", "--idle-unload", "9", "--shards", "2"], "leave --idle-unload out"),
    ],
)
def test_what_ranks_can_not_do(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = words
    prompt = ["hello"] if command == "run" else []
    assert main([command, "-m", "demo", *rest, *prompt]) == 2
    assert text in capsys.readouterr().err


def test_shards_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(UsageError, match="but MLX_RANK says that this is one"), launch.shards(2, []):
        pass


def test_one_shard_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", "demo", "-q", "--shards", "1", *QUESTION]) == 0
    assert capsys.readouterr().out == ANSWER
