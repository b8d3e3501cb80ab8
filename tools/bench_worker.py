"""A process that does pieces of work on request, so that two runtimes can be measured in turns. Standard library only.

One JSON line [name, arguments] goes in, one line of the result comes out; what can't be done comes out as its reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULT = "RESULT "
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # a local folder needs no hub


class Peer:
    """The other process; one piece of work at a time, so that no two run at once."""

    def __init__(self, python: Path | str, script: Path, folder: Path) -> None:
        command = [str(python), str(script), str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | OFFLINE
        )

    def __call__(self, work: str, **arguments: Any) -> Any:
        """Its result, often seconds. Raises RuntimeError with the reason why there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([work, arguments]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(RESULT):
                answer = json.loads(line.removeprefix(RESULT))
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]
        raise RuntimeError(f"the process of {work} has ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(work: Any) -> None:
    """In the other process: methods of `work` by name, until there is no more input."""
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"result": getattr(work, name)(**arguments)}
        except Exception as error:  # noqa: BLE001 - what another runtime raises is the result
            traceback.print_exc(file=sys.stderr)
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(RESULT + json.dumps(answer), flush=True)


def least(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the quickest of several runs: what others do on the machine only ever adds."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def by_thread(work: Callable[[int], Any], few: int, many: int) -> list[float]:
    """Seconds a token: by the clock, and CPU time of the busiest thread and the next. Linux only.

    work: of so many tokens; what it does before the first cancels out.
    """

    def spent(tokens: int) -> list[float]:
        before, begun = _thread_s(), time.perf_counter()
        work(tokens)
        wall, after = time.perf_counter() - begun, _thread_s()
        return [wall, *sorted((seconds - before.get(name, 0.0) for name, seconds in after.items()), reverse=True)[:2]]

    spent(few)  # warms up
    return [(long - short) / (many - few) for short, long in zip(spent(few), spent(many), strict=True)]


def _thread_s() -> dict[str, float]:
    """CPU seconds of each thread of this process."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def median_gap(times: list[float]) -> float:
    """Between a stream's tokens, the first third left out."""
    late = times[len(times) // 3 :]
    gaps = sorted(after - before for before, after in pairwise(late))
    return gaps[len(gaps) // 2]
