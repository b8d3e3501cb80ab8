"""CPU seconds of starting up: `import mlxvlm` and `mlxvlm --help`, beside an empty Python. Last line is JSON.

    python tools/bench_startup.py [--runs 15]

Whole processes, alternating, user + system time as the operating system counts it; medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import": [sys.executable, "-c", "import mlxvlm"],
    "help": [sys.executable, "-m", "mlxvlm", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        cpu_seconds(command)  # fills the byte-code and file caches
    for _ in range(runs):
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(command))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"{name:<8} {value:.3f} s  ({low:.3f} to {high:.3f}), {value / medians['python']:.2f} x empty Python")
    print(json.dumps({f"{name}_cpu_s": round(value, 4) for name, value in medians.items()}))


if __name__ == "__main__":
    main()
