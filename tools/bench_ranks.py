"""What ranks on loopback do in a decode step and a prefill chunk, against the cost model of docs/scale.md.

    python tools/bench_ranks.py [--ranks 2] [--hidden 512] [--layers 6] [--tokens 64] [--steps 100] [--rounds 8]

A synthetic Idefics3 checkpoint in float32 over MLX's ring. Collectives are counted where rank 0 builds its graphs.
Predicted is what one rank takes for its share, all ranks computing at once and nothing sent, and messages x (latency +
bytes / bandwidth), of sums of two sizes timed on their own; untold is without rank 0's messages, all ranks knowing what
comes. Ranks share this machine's cores, and waiting ranks poll: a speed-up can't be seen here, only whether the sum is
right, and only where nothing else runs; so all times are the least. Last line JSON; a ratio is measured / predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import mlx.core as mx
from bench_checkpoints import write_checkpoint
from scale_cost import Message, Shape, fitted, recorded, seconds

import mlxvlm
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.engine.rows import Rows
from mlxvlm.models.base import RowState
from mlxvlm.models.shares import Rank, Share
from mlxvlm.ranks.launch import _free_ports
from mlxvlm.ranks.place import Member, find_place
from mlxvlm.ranks.roles import Lead, take_part
from mlxvlm.ranks.shard import Shard

CHAIN = 20  # sums one after the other, as in a step
REPEATS = 10
TERMS = {"the bench": "ranks"}


def silent(done: int, total: int) -> None:
    pass


def timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class Run:
    """A row whose prompt is filled in chunks, then decodes; each once before it counts."""

    def __init__(self, rows: Rows, model: Any, args: argparse.Namespace) -> None:
        self.rows, self.chunk_tokens = rows, args.tokens
        rows.begin(0)
        ids = mx.zeros((1, args.tokens * (args.rounds + 1)), mx.uint32)
        rows.keep(0, model.embed_tokens(ids, [RowState()]))
        self.chunks = [self.chunk(number) for number in range(args.rounds + 1)][1:]
        rows.join(0)
        self.steps = [timed(self.step) for _ in range(args.steps + 1)][1:]

    def chunk(self, number: int) -> float:
        start = number * self.chunk_tokens
        return timed(lambda: self.rows.fill(0, start, start + self.chunk_tokens))

    def step(self) -> None:
        self.rows.order()
        mx.eval(self.rows.run(mx.zeros((1, 1), mx.uint32)))
        self.rows.commit()

    @property
    def times(self) -> dict[str, Sequence[float]]:
        return {"step": self.steps, "chunk": self.chunks}


def collective_s(nbytes: int, count: int) -> dict[str, float]:
    """Seconds of a sum and of a gathering, all `count` ranks at it."""
    group = mx.distributed.init()
    given = mx.zeros((nbytes // 4,), mx.float32)
    ways: dict[str, Callable[[mx.array], mx.array]] = {
        "sum": lambda array: mx.distributed.all_sum(array, group=group),
        "gather": lambda array: mx.distributed.all_gather(array, group=group)[: given.size],
    }

    def chain(way: Callable[[mx.array], mx.array]) -> None:
        each = given
        for _ in range(CHAIN):
            each = way(each)
        mx.eval(each)

    return {name: min(timed(lambda: chain(way)) for _ in range(REPEATS)) / CHAIN for name, way in ways.items()}  # noqa: B023


def rank_main(folder: Path, args: argparse.Namespace) -> None:
    """One rank: all of it together, then collectives and computing on their own."""
    source, place = open_model(str(folder)), find_place(os.environ)
    assert place is not None
    member, found = Member(place), {}

    def build(progress: Any, share: Share | None = None) -> Any:
        return source.build(LoadOptions("float32"), progress, share)

    if not member.follows:
        lead = Lead(member, build, TERMS)
        shard: Any = lead.build(silent)
        rows = lead.rows(shard, shard.kv_specs)
        with recorded() as messages:
            run = Run(rows, shard, args)
        found |= {"real": run.times, "messages": messages}
        lead.close()
    else:
        with suppress(SystemExit):
            take_part(member, build, TERMS, None, (None, 64))
    group = mx.distributed.init()
    text = source.config["text_config"]
    shape = Shape(text["num_hidden_layers"], text["hidden_size"], text["vocab_size"], True, 4)
    small, logits = shape.step(1, place.count)[0], shape.step(1, place.count)[-1]
    large = shape.chunk(args.tokens)[0]
    found["alone"] = {each.nbytes: collective_s(each.nbytes, place.count) for each in (small, large, logits)}
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))
    rank = Rank(place.index, place.count)
    shard = Shard(build(silent, Share(rank, lambda part: mx.distributed.all_sum(part))), rank, group)
    found["untold"] = Run(Rows(shard, shard.kv_specs), shard, args).times
    with recorded(alone=place.count):
        shard = Shard(build(silent, Share(rank, lambda part: mx.distributed.all_sum(part))), rank, group)
        found["share"] = Run(Rows(shard, shard.kv_specs), shard, args).times
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))  # so that all compute as long as any does
    if not member.follows:
        whole = build(silent)
        found["one"] = Run(Rows(whole, whole.kv_specs), whole, args).times  # when the others are gone
        print(json.dumps(report(found, shape, place.count, args)))


def split(messages: Sequence[Message], args: argparse.Namespace) -> dict[str, list[Message]]:
    """Of one chunk, and of one step. As graphs are built: the last layer's two sums of a chunk are never evaluated."""
    chunks = args.rounds + 1
    steps = args.steps + 1
    hidden = Counter(message for message in messages)
    by_size = {message: count / chunks for message, count in hidden.items() if count % chunks == 0}
    large = max(by_size, key=lambda message: message.nbytes if message.kind == "sum" else 0)
    rest = [(message, count) for message, count in hidden.items() if message != large]
    built = int(hidden[large] / chunks)
    return {
        "chunk": [large] * (built - 2),
        "step": [message for message, count in rest for _ in range(count // steps)],
    }


def report(found: Mapping[str, Any], shape: Shape, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """All figures; times in ms."""
    counted = split(found["messages"], args)
    formulas = {"step": shape.step(1, count), "chunk": shape.chunk(args.tokens)}
    ends = sorted(
        (each.nbytes, found["alone"][each.nbytes]["sum"]) for each in (formulas["step"][0], formulas["chunk"][0])
    )
    link = fitted("loopback", count, ends[0], ends[-1])
    figures: dict[str, Any] = {"mlxvlm": mlxvlm.__version__, "ranks": count, "load": os.getloadavg()[0]}
    figures |= {"latency_us": 1e6 * link.step_s, "bandwidth_gb_s": link.bandwidth / 1e9}
    figures["alone_us"] = {
        size: {kind: 1e6 * each for kind, each in kinds.items()} for size, kinds in found["alone"].items()
    }
    for name in ("step", "chunk"):
        sent = counted[name]
        least = {who: min(found[who][name]) for who in ("one", "share", "untold", "real")}
        predicted = least["share"] + seconds(sent, link, count)
        figures[name] = {
            "messages": len(sent),
            "bytes": sum(each.nbytes for each in sent),
            "is_formula": Counter(map(astuple, sent)) == Counter(map(astuple, formulas[name])),
            "one_rank_ms": 1e3 * least["one"],
            "share_ms": 1e3 * least["share"],
            "sent_ms": 1e3 * (predicted - least["share"]),
            "predicted_ms": 1e3 * predicted,
            "untold_ms": 1e3 * least["untold"],
            "measured_ms": 1e3 * least["real"],
            "median_ms": 1e3 * statistics.median(found["real"][name]),
            "ratio": least["real"] / predicted,
        }
    return figures


def started(folder: Path, argv: Sequence[str], count: int, stack: ExitStack) -> list[subprocess.Popen[str]]:
    """The ranks, as processes."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
    processes = []
    for index in range(count):
        process = subprocess.Popen(
            [sys.executable, __file__, *argv, "--rank-in", str(folder)],
            env={**os.environ, "MLX_RANK": str(index), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
            text=True,
        )
        stack.callback(process.kill)
        processes.append(process)
    return processes


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512, help="heads are 64 wide (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="of a prefill chunk (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="that are timed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="chunks that are timed (default: %(default)s)")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    mx.disable_compile()
    if args.rank_in:
        rank_main(args.rank_in / "model", args)
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        heads = args.hidden // 64
        text = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
        text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 16 * args.hidden}
        write_checkpoint(folder / "model", "idefics3", full_pictures=True, **text)
        processes = started(folder, argv, args.ranks, stack)
        said, _ = processes[0].communicate()
    figures = json.loads(said.splitlines()[-1])
    for kind in ("step", "chunk"):
        for key, value in figures[kind].items():
            print(
                f"{kind:<6} {key:<14} {value:>12.3f}"
                if isinstance(value, float)
                else f"{kind:<6} {key:<14} {value:>12}"
            )
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
