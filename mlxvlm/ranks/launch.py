"""`--shards N`: further processes of this command on this machine, each a rank. Knows processes, not models."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from mlxvlm.errors import RanksError, UsageError
from mlxvlm.ranks.place import RANK, RING_HOSTS, find_place

MAX_SHARDS = 16  # each is a process with its own Python and MLX
_LOOPBACK = "127.0.0.1"
_END_S = 10.0  # for processes that were told to end
_STOP_S = 2.0  # for those that were not, and are asked by a signal
PARENT_FLAG = "--shard-of"


class Shards(NamedTuple):
    """See Member. check: raises RanksError when a process has ended."""

    check: Callable[[], None]
    connected: Callable[[], None]


@contextmanager
def shards(count: int, argv: Sequence[str]) -> Iterator[Shards]:
    """Makes this process rank 0 of `count`, the others run the same words; they end with the block.

    Raises UsageError, and RanksError where one ended badly.
    """
    if any(name in os.environ for name in (RANK, RING_HOSTS)):
        raise UsageError(f"--shards starts ranks on this machine, but {RANK} says that this is one: leave it out")
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="mlxvlm-ranks-")
        hosts = Path(stack.enter_context(folder)) / "hosts.json"
        hosts.write_text(json.dumps([[f"{_LOOPBACK}:{port}"] for port in _free_ports(count)]))
        variables = {RING_HOSTS: str(hosts), RANK: "0"}
        stack.callback(lambda: [os.environ.pop(name, None) for name in variables])
        os.environ.update(variables)
        place = find_place(os.environ)
        assert place is not None
        processes = [_Shard(place.name(index), index, argv, stack) for index in range(1, count)]

        def check() -> None:
            for each in processes:
                if (status := each.process.poll()) is not None:
                    raise RanksError(f"{each.name} ended with status {status}; what it said stands before this")

        have_met = threading.Event()

        def connected() -> None:
            have_met.set()
            folder.cleanup()  # here and not only at the end, which a loss does not wait for

        yield Shards(check, connected)
        until = time.monotonic() + _END_S
        # Before they have met nobody tells the others that this was all: they are stopped.
        told = processes if have_met.is_set() else []
        statuses = {each.name: each.status(until - time.monotonic()) for each in told}
    bad = [name for name, status in statuses.items() if status != 0]
    if bad:
        raise RanksError(f"{', '.join(bad)} did not end well, though rank 0 was done")


class _Shard:
    """One further process. What it says on stderr comes out here, with its number before each line."""

    def __init__(self, name: str, index: int, argv: Sequence[str], stack: ExitStack) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlxvlm", *_marked(argv)],
            env={**os.environ, RANK: str(index)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for rank 0, which ends the others
        )
        assert self.process.stderr is not None
        passing = threading.Thread(target=_pass_on, args=(self.process.stderr, index), daemon=True)
        passing.start()
        stack.callback(self._stop, passing)

    def status(self, timeout_s: float) -> int | None:
        """When it has ended, None where it does not in time."""
        try:
            return self.process.wait(max(timeout_s, 0))
        except subprocess.TimeoutExpired:
            return None

    def _stop(self, passing: threading.Thread) -> None:
        for end in (self.process.terminate, self.process.kill):
            if self.process.poll() is None:
                end()
                self.status(_STOP_S)
        passing.join(_STOP_S)


def _marked(argv: Sequence[str]) -> list[str]:
    """The command's words, with whose shard it is among its flags."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [*argv[:end], PARENT_FLAG, str(os.getpid()), *argv[end:]]


def _pass_on(lines: IO[bytes], index: int) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(f"rank {index}: {line.decode(errors='replace')}")
            sys.stderr.flush()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server((_LOOPBACK, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in taken]
