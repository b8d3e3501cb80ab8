"""The engine beside the bare work of its model: decode steps, rows, second questions, stalls, padding, scheduling.

    python tools/bench_engine.py [--hidden 768] [--layers 8] [--tokens 48] [--mlx-vlm PYTHON] [--only decode ...]

A synthetic Idefics3 checkpoint (random float32 weights; tokenizer and processor of the demo model) in a temporary
folder. Ratios only: what they are compared to runs in turns with it. PYTHON is one that has mlx-vlm 0.7.10, which then
runs on the same checkpoint beside us. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bench_worker import Peer
from mlx.utils import tree_flatten
from PIL import Image

import mlxvlm
from mlxvlm.checkpoint.hub import DEMO, resolve
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.write import write_shards
from mlxvlm.engine.admission import Admission, Need, Sizes
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.engine.scheduler import Scheduler
from mlxvlm.engine.sequence import Phase
from mlxvlm.families import family_of
from mlxvlm.messages import user
from mlxvlm.models.base import KVSpec
from mlxvlm.processors.base import Prompt

CONTEXT = 8192
ROWS = 8
CHUNK = 256  # tokens
SIDE = 256  # pixels of a picture
LENGTH = 128  # tokens of a decoding row's prompt
TICKS = 2000
QUESTIONS = ("What is in this picture?", "How many shapes are there?")
Json = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What the figures are taken from."""

    folder: Path
    config: Json
    tokens: int
    start: Callable[..., Engine]  # with fields of EngineConfig
    peer: Peer | None


def write_checkpoint(folder: Path, hidden: int, layers: int) -> None:
    """The demo's files with a larger decoder and tower."""
    demo = resolve(DEMO)
    config: Json = json.loads((demo / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "head_dim": 64,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "max_position_embeddings": CONTEXT,
    }
    config["vision_config"] |= {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    config["vision_config"] |= {"image_size": SIDE}
    for path in demo.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    tokens = (SIDE // config["vision_config"]["patch_size"] // config["scale_factor"]) ** 2
    changes: dict[str, Json] = {
        "preprocessor_config.json": {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}},
        "processor_config.json": {"image_seq_len": tokens},
    }
    for name, values in changes.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    model = family_of(config).build_model(config)
    shapes = [(name, array.shape) for name, array in tree_flatten(model.parameters())]
    write_shards(
        folder,
        (
            (name, 0.02 * mx.random.normal(shape, key=mx.random.key(number)))
            for number, (name, shape) in enumerate(shapes)
        ),
    )


def bare_step(config: Json, rows: int, length: int) -> Callable[[], float]:
    """Seconds of one decode step's matmuls and attention, nothing else: the floor of any runtime on this backend."""
    text = config["text_config"]
    hidden, inner, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    shapes = [(heads * head, hidden), (kv_heads * head, hidden), (kv_heads * head, hidden), (hidden, heads * head)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    layers = [[mx.random.normal(shape) for shape in shapes] for _ in range(text["num_hidden_layers"])]
    held = [mx.random.normal((rows, kv_heads, length, head)) for _ in range(2 * len(layers))]
    lm_head, x = mx.random.normal((text["vocab_size"], hidden)), mx.random.normal((rows, hidden))
    mx.eval(layers, held, lm_head, x)

    def run() -> float:
        begun = time.perf_counter()
        out = []
        for index, (q, k, v, o, gate, up, down) in enumerate(layers):
            queries = (x @ q.T).reshape(rows, heads, 1, head)
            keys, values = held[2 * index : 2 * index + 2]
            mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)
            out += [x @ k.T, x @ v.T, mixed.reshape(rows, -1) @ o.T, (x @ gate.T + x @ up.T) @ down.T]
        mx.eval(out, x @ lm_head.T)
        return time.perf_counter() - begun

    return run


def steps(engine: Engine, rows: int, tokens: int, length: int) -> float:
    """Seconds of a decode step with `rows` rows of about `length` tokens: the median gap of a stream's tokens."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    streams = [engine.submit(Request([user("a " * (length // 2) + str(row))], sampling)) for row in range(rows)]
    readers = [threading.Thread(target=stream.result) for stream in streams[1:]]
    for reader in readers:
        reader.start()
    times = [time.perf_counter() for _ in streams[0]]
    for reader in readers:
        reader.join()
    gaps = np.diff(times[len(times) // 3 :])
    return float(np.median(gaps))


def in_turns(times: int, *works: Callable[[], float]) -> list[float]:
    """The median of each, all of them run once before any is run again."""
    return [statistics.median(found) for found in zip(*([work() for work in works] for _ in range(times)), strict=True)]


def decode(bench: Bench) -> Json:
    found: Json = {}
    with bench.start() as engine:
        for rows in (1, ROWS):
            bare = bare_step(bench.config, rows, LENGTH + bench.tokens)
            works = [
                partial(steps, engine, rows, bench.tokens, LENGTH),
                lambda bare=bare: statistics.median(bare() for _ in range(20)),
            ]
            if bench.peer is not None:
                work = {"work": "step"} if rows == 1 else {"work": "rows", "rows": rows}
                works.append(partial(bench.peer, length=LENGTH, tokens=bench.tokens, **work))
            ours, floor, *theirs = in_turns(5, *works)
            found |= {f"step_over_bare_{rows}_rows": ours / floor, f"step_ms_{rows}_rows": 1000 * ours}
            for seconds in theirs:
                found[f"mlx_vlm_step_over_ours_{rows}_rows"] = seconds / ours
    found["throughput_8_rows_over_1"] = ROWS * found["step_ms_1_rows"] / found[f"step_ms_{ROWS}_rows"]
    return found


def prefill(bench: Bench) -> Json:
    """Up to the first token of 1,500 random tokens."""
    if bench.peer is None:
        return {}
    random = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    with bench.start(prefix_cache_bytes=0) as engine:

        def ours() -> float:
            ids = tuple(map(int, random.integers(10, 400, 1500)))
            return engine.generate(Request(sampling=sampling, prompt=Prompt(ids))).usage.prompt_s

        def theirs() -> float:
            assert bench.peer is not None
            return bench.peer("prefill", ids=random.integers(10, 400, 1500).tolist())

        seconds, peers = in_turns(5, ours, theirs)
    return {"prefill_tokens_per_s": 1500 / seconds, "mlx_vlm_prefill_over_ours": peers / seconds}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (256, 256, 3), np.uint8))


def second_question(bench: Bench) -> Json:
    """Time to first token of another question about a picture that was asked about, over the first question's."""
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    ours, theirs = [], []
    with bench.start() as engine:
        for seed in range(5):
            path = bench.folder / f"{seed}.png"
            picture(seed).save(path)
            requests = [Request([user(question, [path])], sampling) for question in QUESTIONS]
            ours.append([engine.generate(request).usage.time_to_first_token_s for request in requests])
            if bench.peer is not None:
                theirs.append(
                    [
                        bench.peer("question", image=str(path), text=question, first=not number)
                        for number, question in enumerate(QUESTIONS)
                    ]
                )
    first, second = (statistics.median(column) for column in zip(*ours, strict=True))
    found = {"second_question_over_first": second / first}
    if theirs:
        peers_first, peers_second = (statistics.median(column) for column in zip(*theirs, strict=True))
        found |= {
            "mlx_vlm_second_question_over_first": peers_second / peers_first,
            "mlx_vlm_first_question_over_ours": peers_first / first,
            "mlx_vlm_second_question_over_ours": peers_second / second,
        }
    return found


def stall(bench: Bench) -> Json:
    # Chunks of one size whether rows decode or not, and nothing remembered, so that both runs do the same work.
    with bench.start(prefill_chunk=CHUNK, prefill_chunk_while_decoding=CHUNK, prefix_cache_bytes=0) as engine:
        return longest_gap(engine)


def longest_gap(engine: Engine) -> Json:
    """The longest gap of a running stream while a 4k-token prompt and 4 pictures come in, over one unit's time.

    A unit is a chunk or a picture, whichever takes longer. The chunk's time is the mean over the same prompt alone; its
    last chunks look back at more and take longer.
    """
    words = "a " * 2000
    usage = engine.generate(Request([user(words)], SamplingParams(max_tokens=1))).usage
    chunk_s = usage.prompt_s / -(-usage.prompt_tokens // engine.config.prefill_chunk)
    one = SamplingParams(max_tokens=1)
    # A picture is a unit of its own; its prompt's chunk, which this includes, is short.
    picture_s = engine.generate(Request([user("What?", [picture(99)])], one)).usage.prompt_s
    unit_s = max(chunk_s, picture_s)
    requests = [Request([user(words)], one)]
    requests += [Request([user("What?", [picture(10 + seed)])], one) for seed in range(4)]
    readers: list[threading.Thread] = []
    running = engine.submit(Request([user("go on")], SamplingParams(max_tokens=2000, ignore_eos=True)))
    times: list[float] = []
    for index, _ in enumerate(running):
        times.append(time.perf_counter())
        if index == 20:
            readers = [threading.Thread(target=engine.submit(request).result) for request in requests]
            for reader in readers:
                reader.start()
        if readers and not any(reader.is_alive() for reader in readers):
            running.cancel()
            break
    gaps = np.diff(times)
    return {
        "longest_gap_ms": 1000 * float(gaps.max()),
        "chunk_ms": 1000 * chunk_s,
        "picture_ms": 1000 * picture_s,
        "longest_gap_over_unit": float(gaps.max()) / unit_s,
    }


def padding(bench: Bench) -> Json:
    """KV bytes of one row of 4,096 tokens and seven of 16, over the bytes of the tokens alone."""
    spec = KVSpec(num_kv_heads=2, head_dim=64)
    batch = KVBatch()
    for owner, length in enumerate([4096, *[16] * 7]):
        group = KVGroup.single([spec], owner)
        forward = KVPass([group], length)
        keys = mx.zeros((1, 2, length, 64))
        mx.eval(forward.layers[0].attend(keys, keys, keys, 1.0))
        forward.commit()
        batch.join(group)
    return {"padded_over_real": batch.nbytes / ((4096 + 7 * 16) * spec.bytes_per_token(mx.float32))}


def speculation(bench: Bench) -> Json:
    """A token's time with guesses over without: of an answer that goes round, and of one that never repeats itself."""
    # Random weights go round when greedy, and say anything when hot.
    answers: dict[str, Json] = {"repeating": {}, "never_repeating": {"temperature": 2.0, "seed": 1}}
    found: Json = {}
    with bench.start(speculation="on") as guessing, bench.start(speculation="off") as plain:
        for name, sampling in answers.items():
            request = Request([user("go on " * 20)], SamplingParams(max_tokens=200, ignore_eos=True, **sampling))
            ratios = []
            for _ in range(5):
                ours, theirs = (each.generate(request).usage for each in (guessing, plain))
                ratios.append(theirs.completion_tokens_per_s / ours.completion_tokens_per_s)
            found[f"token_over_plain_{name}"] = statistics.median(ratios)
            found[f"accepted_{name}"] = ours.accepted_tokens / ours.completion_tokens
    return found


class Row:
    """What the scheduler sees of a sequence."""

    def __init__(self, number: int, phase: Phase) -> None:
        self.id, self.phase = number, phase
        self.need = Need(1000, 0, 0)
        self.pixel_bytes = self.launched = 0
        self.max_tokens, self.longest, self.full = 1024, 8192, 8192
        self.work_left = 1000


def scheduling(bench: Bench) -> Json:
    """Microseconds that a tick's decisions take: one row ends, one that waits gets its place, one has a unit to do."""
    found: Json = {}
    for rows in (1, ROWS, 64):
        scheduler: Any = Scheduler(
            rows, Admission(1 << 50, 0, Sizes(100, 1, 4, 4, 61, 1, lambda prompt: 0, 2048, 1000))
        )
        running = [Row(number, Phase.DECODE) for number in range(rows - 1)] + [Row(rows, Phase.PREFILL)]
        for row in running:
            scheduler.add(row)
        scheduler.admit()
        spent = []
        for tick in range(TICKS):
            running.append(Row(rows + 1 + tick, running[0].phase))
            begun = time.perf_counter()
            scheduler.remove(running.pop(0))
            scheduler.add(running[-1])
            scheduler.grow()
            scheduler.admit()
            decoding, unit = scheduler.decoding, scheduler.next_unit()
            spent.append(time.perf_counter() - begun)
            assert len(decoding) + (unit is not None) == rows
        found[f"scheduler_us_{rows}_rows"] = 1e6 * statistics.median(spent)
    return found


FIGURES: dict[str, Callable[[Bench], Json]] = {
    "decode": decode,
    "prefill": prefill,
    "second_question": second_question,
    "stall": stall,
    "padding": padding,
    "speculation": speculation,
    "scheduling": scheduling,
}


def measure(folder: Path, args: argparse.Namespace) -> Json:
    write_checkpoint(folder, args.hidden, args.layers)
    source = open_model(str(folder))
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)

    def start(**settings: Any) -> Engine:
        build = partial(source.build, LoadOptions("float32"))
        return Engine(build, source.processor, replace(config, **settings))

    peer = None if args.mlx_vlm is None else Peer(args.mlx_vlm, Path(__file__).with_name("bench_mlx_vlm.py"), folder)
    try:
        bench = Bench(folder, source.config, args.tokens, start, peer)
        found: Json = {}
        for name in args.only or FIGURES:
            found |= FIGURES[name](bench)
        return found
    finally:
        if peer is not None:
            peer.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--mlx-vlm", type=Path, metavar="PYTHON", help="a Python that has mlx-vlm 0.7.10")
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME", help=f"of {', '.join(FIGURES)}")
    args = parser.parse_args(argv)
    mx.disable_compile()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    for name, value in found.items():
        print(f"{name:<36} {value:8.3f}")
    print(json.dumps({"mlxvlm": mlxvlm.__version__, "device": str(mx.default_device()), **found}))


if __name__ == "__main__":
    main()
