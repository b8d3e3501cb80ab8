"""What quantisation costs the demo model: right answers, and answers that are the full model's token for token.

    python tools/isq_accuracy.py [--pictures 100] [--types 8@32 4 ...]

Two questions about each of the pictures that training never saw, greedy. A row a type; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import mlx.core as mx
from demo_data import HELD_OUT_SEEDS, Mix, ask_one, make_row
from mlx.utils import tree_flatten

from mlxvlm.checkpoint.load import LoadOptions, open_model
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.engine import Engine
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.request import Completion, Request
from mlxvlm.messages import user

TYPES = ("8@32", "8", "6", "5", "4@32", "4", "3@32", "3", "2@32", "mxfp8", "nvfp4", "mxfp4")
MAX_TOKENS = 48


def questions(num_pictures: int, each: int = 2) -> list[tuple[Any, str, str]]:
    """(picture, question, answer)."""
    found = []
    for index in range(num_pictures):
        rng = random.Random(HELD_OUT_SEEDS[index])
        row = make_row(rng, Mix(num_branches=1), "single")
        turns = [ask_one(rng, row.pictures[0].scene, Mix()) for _ in range(each)]
        found += [(row.pictures[0].image, turn.question, turn.answer) for turn in turns]
    return found


def ask(options: LoadOptions, items: list[tuple[Any, str, str]]) -> tuple[list[Completion], int]:
    """Answers, and the bytes of the model."""
    source = open_model("demo")
    sizes: list[int] = []

    def build(progress: Any) -> Any:
        model = source.build(options, progress)
        sizes.append(sum(array.nbytes for _, array in tree_flatten(model.parameters())))
        return model

    config = EngineConfig(source.max_context, source.defaults.eos_token_ids)
    with Engine(build, source.processor, config) as engine:
        sampling = SamplingParams(max_tokens=MAX_TOKENS)
        streams = [engine.submit(Request([user(question, [image])], sampling)) for image, question, _ in items]
        return [stream.result() for stream in streams], sizes[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--types", nargs="+", default=TYPES)
    args = parser.parse_args()
    mx.disable_compile()
    items = questions(args.pictures)
    full, full_bytes = ask(LoadOptions("float32"), items)
    rights = [answer.text.strip() == item[2] for answer, item in zip(full, items, strict=True)]
    rows = [{"type": "float32", "right": sum(rights), "same_tokens": len(items), "kept": 1.0, "bytes": full_bytes}]
    for kind in args.types:
        answers, size = ask(LoadOptions("float32", kind), items)
        right = [answer.text.strip() == item[2] for answer, item in zip(answers, items, strict=True)]
        same = sum(a.token_ids == b.token_ids for a, b in zip(answers, full, strict=True))
        # Of what the full model gets right.
        kept = sum(now for now, before in zip(right, rights, strict=True) if before) / sum(rights)
        rows.append({"type": kind, "right": sum(right), "same_tokens": same, "kept": kept, "bytes": size})
    for row in rows:
        print(f"{row['type']:<8} right {row['right']:>4} of {len(items)}, same tokens {row['same_tokens']:>4}, "
              f"{row['bytes'] / full_bytes:.3f} of the size")  # fmt: skip
    print(json.dumps({"questions": len(items), "rows": rows}))


if __name__ == "__main__":
    main()
