"""Ranks as processes of this machine, what they say, and whether any is left. The demo model, which is small."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlxvlm.ranks.launch import _free_ports

PATIENCE_S = 120.0  # of a test for what should take a few seconds: the machine may be busy
PICTURE = str(Path(__file__).parents[2] / "examples/pictures/pink-heart.png")
VARIABLES = ("MLX_RANK", "MLX_HOSTFILE")


class Process:
    """A command whose output goes to a file."""

    def __init__(self, words: Sequence[str], log: Path, **variables: str) -> None:
        self.log = log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str) -> re.Match[str]:
        """Until it has said that."""
        until = time.monotonic() + PATIENCE_S
        while (found := re.search(words, self.said)) is None:
            assert self.popen.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.02)
        return found

    def status(self) -> int:
        """Its exit status."""
        return self.popen.wait(PATIENCE_S)

    def end(self) -> None:
        """Whatever it is at."""
        self.popen.send_signal(signal.SIGCONT)
        self.popen.kill()
        self.popen.wait()

    @property
    def errors(self) -> list[str]:
        """What it says went wrong, without what MLX has to say of it, in pieces that others come between."""
        return re.findall(r"mlxvlm: error: .*", self.said)

    def shards(self) -> list[int]:
        """The living processes that it has started with --shards."""
        listed = subprocess.run(["ps", "-axww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True)
        mine = re.compile(rf"--shard-of {self.popen.pid}\b")
        rows = [line.split(None, 2) for line in listed.stdout.splitlines() if mine.search(line)]
        return [int(pid) for pid, stat, _ in rows if not stat.startswith("Z")]


@contextmanager
def ranks(
    folder: Path, count: int, words: Sequence[str], faults: dict[int, str] | None = None, present: Sequence[int] = ()
) -> Iterator[list[Process]]:
    """Processes of one command, each a rank of a ring; with the faults of tests.ranks.faulty, and only some of them."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
    started = []
    try:
        for index in present or range(count):
            fault = (faults or {}).get(index)
            command = ["-m", "mlxvlm"] if fault is None else ["-m", "tests.ranks.faulty", fault]
            log = folder / f"rank-{index}.txt"
            started.append(Process([*command, *words], log, MLX_RANK=str(index), MLX_HOSTFILE=str(hosts)))
        yield started
    finally:
        for each in started:
            each.end()


@contextmanager
def alone(folder: Path, *words: str) -> Iterator[Process]:
    """One process of the command."""
    process = Process(["-m", "mlxvlm", *words], folder / "alone.txt")
    try:
        yield process
    finally:
        left = process.shards()
        process.end()
        for pid in left:
            os.kill(pid, signal.SIGKILL)


def gone(process: Process) -> bool:
    """Whether all that it has started ends by itself."""
    until = time.monotonic() + PATIENCE_S
    while process.shards():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
