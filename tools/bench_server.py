"""Our server beside mlx-vlm's on one checkpoint, and beside our engine without HTTP: 1, 8 and 32 clients.

    python tools/bench_server.py [--hidden 512] [--layers 6] [--tokens 32] [--rounds 3] [--mlx-vlm PYTHON]

A synthetic Idefics3 checkpoint (tools/bench_engine.py) in a temporary folder. Each server, the engine and the clients
are processes of their own; what is compared runs in turns, nothing at once. PYTHON is one that has mlx-vlm 0.7.10.
Clients stream; a first token is the first piece of text, an inter-token time the gap between two pieces. The last line
is JSON: medians of the rounds, ratios, shares of CPU time, and the load of the machine before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

CLIENTS = (1, 8, 32)
ROWS = 32  # of each server
REPEATS = 3  # requests of one client, one after another
WORDS = "go on and on about shapes of any color "
START_S = 180.0
Json = dict[str, Any]


def prompt_of(client: int, repeat: int) -> str:
    """None begins as another does, so that nothing kept between requests helps."""
    return f"{client} {repeat} {time.time_ns()} " + WORDS


async def ask(port: int, model: str, prompt: str, tokens: int) -> tuple[list[float], int]:
    """When the request was sent and each piece of text came, and how many tokens the server counted."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    times, count = [time.perf_counter()], 0
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    # Servers write whole events, so lines of chunked framing lie between them.
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if any(choice["delta"].get("content") for choice in event.get("choices") or ()):
            times.append(time.perf_counter())
        usage = event.get("usage") or {}
        count = usage.get("completion_tokens") or usage.get("output_tokens") or count
    writer.close()
    return times, count


async def clients(port: int, model: str, number: int, tokens: int) -> Json:
    async def one(client: int) -> list[tuple[list[float], int]]:
        return [await ask(port, model, prompt_of(client, repeat), tokens) for repeat in range(REPEATS)]

    begun = time.perf_counter()
    found = [each for answers in await asyncio.gather(*map(one, range(number))) for each in answers]
    seconds = time.perf_counter() - begun
    first = sorted(times[1] - times[0] for times, _ in found)
    gaps = sorted(after - before for times, _ in found for before, after in pairwise(times[1:]))
    return {
        "requests_per_s": len(found) / seconds,
        "tokens_per_s": sum(count for _, count in found) / seconds,
        "tokens": sum(count for _, count in found),
        "first_token_ms_p50": 1000 * quantile(first, 0.5),
        "first_token_ms_p95": 1000 * quantile(first, 0.95),
        "inter_token_ms_p50": 1000 * quantile(gaps, 0.5),
        "inter_token_ms_p95": 1000 * quantile(gaps, 0.95),
        "inter_token_ms_p99": 1000 * quantile(gaps, 0.99),
        "seconds": seconds,
        "client_cpu_s": time.process_time(),
    }


def quantile(ordered: list[float], part: float) -> float:
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def serve_engine(folder: str) -> None:
    """The engine without HTTP: one JSON line of figures for each JSON line [clients, tokens]."""
    import mlxvlm
    from mlxvlm.engine.params import SamplingParams
    from mlxvlm.engine.request import Request
    from mlxvlm.messages import user

    with mlxvlm.load(folder, max_rows=ROWS) as engine:
        for line in sys.stdin:
            number, tokens = json.loads(line)
            counts: list[int] = []

            def one(client: int, tokens: int = tokens, counts: list[int] = counts) -> None:
                for repeat in range(REPEATS):
                    request = Request([user(prompt_of(client, repeat))], SamplingParams(max_tokens=tokens))
                    counts.append(len(engine.submit(request).result().token_ids))

            threads = [threading.Thread(target=one, args=(client,)) for client in range(number)]
            begun, cpu = time.perf_counter(), time.process_time()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - begun
            spent = time.process_time() - cpu
            print(json.dumps({"tokens_per_s": sum(counts) / seconds, "seconds": seconds, "cpu_s": spent}), flush=True)


@dataclass(frozen=True)
class Server:
    """A server in another process."""

    process: subprocess.Popen[bytes]
    port: int
    model: str

    def measure(self, number: int, tokens: int) -> Json:
        command = [sys.executable, __file__, "--client", str(self.port), self.model, str(number), str(tokens)]
        before = cpu_s(self.process.pid)
        found: Json = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return {**found, "cpu_s": cpu_s(self.process.pid) - before}

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError where it does not."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"{self.process.args!r} does not answer")


def cpu_s(pid: int) -> float:
    """CPU seconds of a running process."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    text = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    minutes, _, seconds = text.strip().rpartition(":")
    return 60 * int(minutes) + float(seconds)


def started(stack: ExitStack, command: list[str], port: int, model: str) -> Server:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    server = Server(process, port, model)
    server.wait()
    return server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def compare(folder: str, args: argparse.Namespace) -> Json:
    engine = subprocess.Popen(
        [sys.executable, __file__, "--engine", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert engine.stdin is not None
    assert engine.stdout is not None
    with ExitStack() as stack:
        stack.callback(engine.wait)
        stack.callback(engine.stdin.close)
        ports = free_port(), free_port()
        ours = [sys.executable, "-m", "mlxvlm", "serve", "-m", folder, "-p", str(ports[0]), "--max-rows", str(ROWS)]
        servers = {"ours": started(stack, ours, ports[0], "default")}
        if args.mlx_vlm:
            theirs = [str(args.mlx_vlm), "-m", "mlx_vlm.server", "--model", folder, "--host", "127.0.0.1"]
            theirs += ["--port", str(ports[1]), "--max-num-seqs", str(ROWS), "--log-level", "ERROR"]
            servers["mlx_vlm"] = started(stack, theirs, ports[1], folder)
        runs: dict[tuple[str, int], list[Json]] = {}
        for turn in range(args.rounds + 1):  # the first warms up
            for number in CLIENTS:
                engine.stdin.write(f"[{number}, {args.tokens}]\n")
                engine.stdin.flush()
                found = {"engine": json.loads(engine.stdout.readline())}
                found |= {name: server.measure(number, args.tokens) for name, server in servers.items()}
                for name, each in found.items():
                    runs.setdefault((name, number), [])
                    runs[name, number] += [each] * (turn > 0)
    return figures(runs)


def figures(runs: dict[tuple[str, int], list[Json]]) -> Json:
    found: Json = {}
    for (name, number), each in runs.items():
        found[f"{name}_{number}"] = {key: round(statistics.median(run[key] for run in each), 3) for key in each[0]}
    for number in CLIENTS:
        engine, ours = runs["engine", number], runs["ours", number]
        pairs = list(zip(engine, ours, strict=True))
        found[f"http_over_engine_{number}"] = ratio([(one["tokens_per_s"], two["tokens_per_s"]) for one, two in pairs])
        cpu = [(one["cpu_s"] + one["client_cpu_s"], one["client_cpu_s"]) for one in ours]
        found[f"client_share_of_cpu_{number}"] = ratio([(share, whole) for whole, share in cpu])
        found[f"server_cpu_over_engine_{number}"] = ratio([(two["cpu_s"], one["cpu_s"]) for one, two in pairs])
        theirs = runs.get(("mlx_vlm", number))
        if theirs:
            for key in ("requests_per_s", "tokens_per_s", "first_token_ms_p50", "inter_token_ms_p50"):
                values = [(one[key], two[key]) for one, two in zip(ours, theirs, strict=True)]
                found[f"ours_over_mlx_vlm_{key}_{number}"] = ratio(values)
    return found


def ratio(pairs: list[tuple[float, float]]) -> float:
    return round(statistics.median(one / two for one, two in pairs), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("--hidden", 512), ("--layers", 6), ("--tokens", 32), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--mlx-vlm", type=Path, metavar="PYTHON", help="a Python that has mlx-vlm 0.7.10")
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        port, model, number, tokens = args.client
        print(json.dumps(asyncio.run(clients(int(port), model, int(number), int(tokens)))))
    elif args.engine:
        serve_engine(args.engine)
    else:
        from bench_engine import write_checkpoint

        load = os.getloadavg()
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), args.hidden, args.layers)
            found = compare(folder, args)
        for name, value in found.items():
            print(f"{name:<44} {value}")
        print(json.dumps({**found, "load_before": load, "load_after": os.getloadavg()}))


if __name__ == "__main__":
    main()
