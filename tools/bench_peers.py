"""The same work on the same files through mlx-vlm 0.7.10 and ours, in turns: medians and ratios, last line JSON.

    python tools/bench_peers.py --mlx-vlm PYTHON [--mistralrs PYTHON] [--only preprocess ...] [--family qwen2_vl ...]

PYTHON is one that has the other runtime; mistralrs 0.9.5 is timed in what its Python API tells. Each runtime is a
process of its own, one piece of work at a time; a ratio is ours / theirs, the median over rounds. What a runtime can't
do is null, with its reason. values_ratio: how many numbers ours makes of a picture for each of theirs. CPU, float32.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_checkpoints import CASES, write_checkpoint
from bench_worker import OFFLINE, Peer
from PIL import Image

TOOLS = Path(__file__).resolve().parent
SIZES = {"336": (336, 336), "1080p": (1920, 1080), "12MP": (4000, 3000), "112": (112, 112)}  # (width, height)
SMALL, LENGTH, TOKENS, ROWS = "336", 128, 32, 8
TINY = "112"  # of the cold run, whose subject is starting and not the tower
FIGURES = ("startup", "cold", "load", "preprocess", "vision", "prefill", "decode", "question", "threads", "mistralrs")
Json = dict[str, Any]
Timed = Callable[[], float]


def picture(folder: Path, size: str, seed: int = 0) -> str:
    """A file of noise under smooth shapes, so that no codec and no cache has it too easy."""
    path = folder / f"{size}-{seed}.png"
    if not path.exists():
        width, height = SIZES[size]
        coarse = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(path, compress_level=1)
    return str(path)


def in_turns(rounds: int, ours: Timed, theirs: Timed) -> Json:
    """Medians and the median ratio; the first round, which warms caches, is not counted."""
    columns: tuple[list[float], list[float]] = ([], [])
    reasons: Json = {}
    for number in range(rounds + 1):
        for name, work, column in (("ours", ours, columns[0]), ("theirs", theirs, columns[1])):
            if name in reasons:
                continue
            try:
                seconds = work()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                reasons[name] = str(error)[:160]
                continue
            if number:
                column.append(seconds)
    medians = [statistics.median(column) if column else None for column in columns]
    ratio = None
    if all(columns) and all(columns[1]):  # mistral.rs tells whole milliseconds, which may be none
        ratio = statistics.median(mine / other for mine, other in zip(*columns, strict=True))
    return {"ours_s": medians[0], "theirs_s": medians[1], "ratio": ratio, **({"why": reasons} if reasons else {})}


def process_s(command: Sequence[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | OFFLINE, timeout=300
    )
    return time.perf_counter() - begun


def startup(python: Path, rounds: int) -> Json:
    mine = {"import": ["-c", "import mlxvlm"], "help": ["-m", "mlxvlm", "--help"]}
    other = {"import": ["-c", "import mlx_vlm"], "help": ["-m", "mlx_vlm.generate", "--help"]}
    return {
        name: in_turns(
            rounds,
            partial(process_s, [sys.executable, *mine[name]]),
            partial(process_s, [str(python), *other[name]]),
        )
        for name in mine
    }


def cold(python: Path, folder: Path, image: str, rounds: int) -> Json:
    """A whole process: load, one picture, one token."""
    asked = ["--max-tokens", "1", "--image", image]
    mine = [sys.executable, "-m", "mlxvlm", "run", "-q", "-m", str(folder), *asked, "What is this?"]
    other = [str(python), "-m", "mlx_vlm.generate", "--model", str(folder), *asked, "--prompt", "What is this?"]
    return in_turns(rounds, partial(process_s, mine), partial(process_s, other))


def preprocess(family: str, python: Path, work: Path, args: argparse.Namespace) -> Json:
    folder = write_checkpoint(work / f"{family}-full", family, full_pictures=True)
    with_peers = (Peer(sys.executable, TOOLS / "bench_ours.py", folder), Peer(python, args.script, folder))
    found: Json = {}
    try:
        for size in SIZES:
            if size == TINY:
                continue
            image = picture(work, size)
            row = in_turns(args.rounds, *(partial(peer, "preprocess", image=image) for peer in with_peers))
            if row["ratio"] is not None:
                values = [peer("values", image=image) for peer in with_peers]
                row |= {"values_ratio": values[0] / values[1]}
            found[f"preprocess_{size}"] = row
        return found
    finally:
        for peer in with_peers:
            peer.close()


def beside_mistralrs(family: str, work: Path, args: argparse.Namespace) -> Json:
    """One row's steps, a prompt, and a question about a picture that was not asked about before."""
    folder = write_checkpoint(work / family, family, full_pictures=False)
    peers = (
        Peer(sys.executable, TOOLS / "bench_ours.py", folder),
        Peer(args.mistralrs, TOOLS / "bench_mistralrs.py", folder),
    )
    random = np.random.default_rng(0)

    def turns(name: str, draw: Callable[[int], Json]) -> Json:
        rounds = [iter([draw(number) for number in range(args.rounds + 1)]) for _ in peers]
        both = (lambda: peers[0](name, **next(rounds[0])), lambda: peers[1](name, **next(rounds[1])))
        return in_turns(args.rounds, *both)

    prompts = [random.integers(10, 120, 512).tolist() for _ in range(args.rounds + 1)]
    try:
        return {
            "mistralrs_decode_1": turns("step", lambda number: {"length": LENGTH, "tokens": TOKENS}),
            "mistralrs_prefill_512": turns("prefill", lambda number: {"ids": prompts[number]}),
            "mistralrs_question": turns(
                "question",
                lambda number: {"image": picture(work, SMALL, number), "text": "What is this?", "first": True},
            ),
        }
    finally:
        for peer in peers:
            peer.close()


def computing(family: str, python: Path, work: Path, args: argparse.Namespace) -> Json:
    """Loading, vision, prefill, decode and a second question, of which --only asks."""
    folder = write_checkpoint(work / family, family, full_pictures=False)
    peers = (Peer(sys.executable, TOOLS / "bench_ours.py", folder), Peer(python, args.script, folder))
    random = np.random.default_rng(0)
    # mllama's figure is of a picture of four tiles; Idefics3 makes 17 frames of any.
    image = picture(work, "1080p" if family == "mllama" else SMALL)

    def turns(name: str, **arguments: Any) -> Json:
        return in_turns(args.rounds, *(partial(peer, name, **arguments) for peer in peers))

    def prefills() -> Json:
        # Both read the same random tokens; no round reads those of another, as caches would answer.
        prompts = [[random.integers(10, 120, 512).tolist() for _ in range(args.rounds + 1)]] * 2
        left = [iter(rounds) for rounds in prompts]
        works = (lambda: peers[0]("prefill", ids=next(left[0])), lambda: peers[1]("prefill", ids=next(left[1])))
        return in_turns(args.rounds, *works)

    found: Json = {}
    try:
        if "load" in args.only:
            found["load"] = turns("load")
        if "vision" in args.only:
            found["vision"] = turns("vision", image=image)
            if family == "llama4":
                found["unfold"] = turns("unfold", frames=1)
        if "prefill" in args.only:
            found["prefill_512"] = prefills()
        if "decode" in args.only:
            found["decode_1"] = turns("step", length=LENGTH, tokens=TOKENS)
            found[f"decode_{ROWS}"] = turns("rows", length=LENGTH, tokens=TOKENS, rows=ROWS)
            found["decode_picture"] = turns("picture_step", image=image, tokens=TOKENS)
        if "threads" in args.only:
            for rows in (1, ROWS):
                found |= threads(peers, rows, args.rounds)
        if "question" in args.only:
            found |= questions(peers, work, args.rounds)
    finally:
        for peer in peers:
            peer.close()
    return found


def threads(peers: Sequence[Peer], rows: int, rounds: int) -> Json:
    """A decode step by the clock, and CPU time of the thread that computes and of the one that asks for it."""
    names = [f"threads_{rows}_{name}" for name in ("wall", "computing", "asking")]
    try:
        both = [
            [peer("threads", length=8 if rows == 1 else LENGTH, rows=rows) for peer in peers] for _ in range(rounds)
        ]
    except RuntimeError as error:  # Linux alone tells threads' time
        none = {"ours_s": None, "theirs_s": None, "ratio": None, "why": {"threads": str(error)}}
        return dict.fromkeys(names, none)
    found = {}
    for place, name in enumerate(names):
        ours, theirs = (statistics.median(turn[which][place] for turn in both) for which in range(2))
        found[name] = {"ours_s": ours, "theirs_s": theirs, "ratio": ours / theirs}
    return found


def questions(peers: Sequence[Peer], work: Path, rounds: int) -> Json:
    """The first and the second question about a picture, and what part of its own first a second one takes."""
    asked: list[list[float]] = [[], []]

    def both(number: int) -> float:
        """Seconds of the second."""
        image = picture(work, SMALL, len(asked[number]))
        texts = ("What is in this picture?", "How many shapes are there?")
        first, second = (peers[number]("question", image=image, text=text, first=text is texts[0]) for text in texts)
        asked[number].append(first)
        return float(second)

    row = in_turns(rounds, partial(both, 0), partial(both, 1))
    firsts = [statistics.median(seconds[1:]) if len(seconds) > 1 else None for seconds in asked]
    for name, first in zip(("ours", "theirs"), firsts, strict=True):
        seconds = row[f"{name}_s"]
        row[f"{name}_over_first"] = seconds / first if first and seconds else None
    ratio = firsts[0] / firsts[1] if firsts[0] and firsts[1] else None
    why = {"why": row["why"]} if "why" in row else {}
    return {
        "question_first": {"ours_s": firsts[0], "theirs_s": firsts[1], "ratio": ratio} | why,
        "question_second": row,
    }


def show(name: str, row: Json) -> None:
    cells = [f"{1000 * row[key]:10.1f}" if row[key] is not None else f"{'-':>10}" for key in ("ours_s", "theirs_s")]
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
    why = "; ".join(f"{who}: {reason}" for who, reason in row.get("why", {}).items())
    own = "  ".join(
        f"{key} {row[key]:.3f}" for key in ("ours_over_first", "theirs_over_first", "values_ratio") if row.get(key)
    )
    print(f"{name:<32}{cells[0]}{cells[1]}  {ratio:>7}  {own}{why}", flush=True)


def measure(args: argparse.Namespace, work: Path) -> Json:
    found: Json = {}
    print(f"{'':<32}{'ours ms':>10}{'theirs ms':>10}    ratio  (load {os.getloadavg()[0]:.1f})")

    def keep(rows: Json, prefix: str = "") -> None:
        for name, row in rows.items():
            found[prefix + name] = row
            show(prefix + name, row)

    if "startup" in args.only:
        keep(startup(args.mlx_vlm, args.rounds))
    if "cold" in args.only:
        folder = write_checkpoint(work / "cold", "qwen2_vl", full_pictures=False)
        keep({"cold_run": cold(args.mlx_vlm, folder, picture(work, TINY), args.rounds)})
    for family in args.family:
        if "preprocess" in args.only:
            keep(preprocess(family, args.mlx_vlm, work, args), f"{family}_")
        if {"load", "vision", "prefill", "decode", "question", "threads"} & set(args.only):
            keep(computing(family, args.mlx_vlm, work, args), f"{family}_")
        if "mistralrs" in args.only and args.mistralrs is not None:
            keep(beside_mistralrs(family, work, args), f"{family}_")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx-vlm", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--mistralrs", type=Path, metavar="PYTHON")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--family", nargs="+", choices=CASES, default=tuple(CASES), metavar="FAMILY")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds takes numbers from 1")
    for python in (args.mlx_vlm, args.mistralrs):
        if python is not None and not os.access(python, os.X_OK):
            parser.error(f"{python} is no Python that can be run")
    args.script = TOOLS / "bench_mlx_vlm.py"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(json.dumps({"load": os.getloadavg(), "device": "CPU, float32", **found}))


if __name__ == "__main__":
    main()
