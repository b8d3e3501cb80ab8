"""The engine beside the bare work of its model: decode steps, rows, second questions, stalls, padding, scheduling.

    python tools/bench_engine.py [--hidden 768] [--layers 8] [--tokens 48]

A synthetic Idefics3 checkpoint (random float32 weights; tokenizer and processor of the demo model) in a temporary
folder. Ratios only: what they are compared to runs in the same process, in turns. The last line is JSON.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

import mlxvlm
from mlxvlm.checkpoint.hub import DEMO, resolve
from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.checkpoint.write import write_shards
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.kv_cache import KVBatch, KVGroup, KVPass
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Request
from mlxvlm.families import family_of
from mlxvlm.messages import user
from mlxvlm.models.base import KVSpec

CONTEXT = 8192
ROWS = 8
CHUNK = 256  # tokens
SIDE = 256  # pixels of a picture
Json = dict[str, Any]


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


def decode(engine: Engine, config: Json, tokens: int) -> Json:
    found: Json = {}
    for rows in (1, ROWS):
        length = 128
        bare = bare_step(config, rows, length + tokens)
        ours, floor = [], []
        for _ in range(5):
            ours.append(steps(engine, rows, tokens, length))
            floor.append(statistics.median(bare() for _ in range(20)))
        found[f"step_over_bare_{rows}_rows"] = statistics.median(ours) / statistics.median(floor)
        found[f"step_ms_{rows}_rows"] = 1000 * statistics.median(ours)
    found["throughput_8_rows_over_1"] = ROWS * found["step_ms_1_rows"] / found[f"step_ms_{ROWS}_rows"]
    return found


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (256, 256, 3), np.uint8))


def second_question(engine: Engine) -> Json:
    """Time to first token of another question about a picture that was asked about, over the first question's."""
    ratios = []
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    for seed in range(5):
        image = picture(seed)
        times = [
            engine.generate(Request([user(question, [image])], sampling)).usage.time_to_first_token_s
            for question in ("What is in this picture?", "How many shapes are there?")
        ]
        ratios.append(times[1] / times[0])
    return {"second_question_over_first": statistics.median(ratios)}


def stall(engine: Engine) -> Json:
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


def padding() -> Json:
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


def speculation(engine: Engine, plain: Engine) -> Json:
    """A token's time with guesses over without: of an answer that goes round, and of one that never repeats itself."""
    # Random weights go round when greedy, and say anything when hot.
    answers = {"repeating": {}, "never_repeating": {"temperature": 2.0, "seed": 1}}
    found: Json = {}
    for name, sampling in answers.items():
        request = Request([user("go on " * 20)], SamplingParams(max_tokens=200, ignore_eos=True, **sampling))
        ratios = []
        for _ in range(5):
            ours, theirs = (each.generate(request).usage for each in (engine, plain))
            ratios.append(theirs.completion_tokens_per_s / ours.completion_tokens_per_s)
        found[f"token_over_plain_{name}"] = statistics.median(ratios)
        found[f"accepted_{name}"] = ours.accepted_tokens / ours.completion_tokens
    return found


def measure(folder: Path, args: argparse.Namespace) -> Json:
    write_checkpoint(folder, args.hidden, args.layers)
    source = open_model(str(folder))
    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)

    def build(progress: Any) -> Any:
        return source.build(LoadOptions("float32"), progress)

    with Engine(build, source.processor, config) as engine:
        found = decode(engine, source.config, args.tokens)
        found |= second_question(engine)
        with Engine(build, source.processor, replace(config, speculation="on")) as guessing:
            found |= speculation(guessing, engine)
    # Chunks of one size whether rows decode or not, and nothing remembered, so that both runs do the same work.
    even = replace(config, prefill_chunk=CHUNK, prefill_chunk_while_decoding=CHUNK, prefix_cache_bytes=0)
    with Engine(build, source.processor, even) as engine:
        found |= stall(engine)
    return found | padding()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args(argv)
    mx.disable_compile()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    for name, value in found.items():
        print(f"{name:<32} {value:8.3f}")
    print(json.dumps({"mlxvlm": mlxvlm.__version__, "device": str(mx.default_device()), **found}))


if __name__ == "__main__":
    main()
