"""Trains mlxvlm's embedded demo model from scratch on one CPU thread, exports it and measures the export.

    python tools/train_demo.py --out mlxvlm/demo                  # train, export, evaluate
    python tools/train_demo.py --evaluate mlxvlm/demo             # measure an exported folder
    python tools/train_demo.py --evaluate mlxvlm/demo --goldens tests/goldens/demo

The last line of an evaluation is one JSON object. Development only: needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from demo_eval import evaluate, quiet, write_goldens
from demo_fit import Plan, Student, Teacher, fit, pretrain_vision
from demo_model import build_model, build_tokenizer, export
from demo_pack import Packer


def train(out: Path, seed: int, share: float) -> None:
    """One run from scratch. `out` appears only when everything in it is complete."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    packer, plan = Packer(tokenizer), Plan().scaled(share)
    model, teacher = build_model(tokenizer), Teacher()
    student = Student(model, packer)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size} parameters, {plan}", flush=True)
    pretrain_vision(student, teacher, plan, seed)
    fit(student, teacher, packer, plan, seed)
    draft = out.with_name(out.name + ".new")
    export(model, tokenizer, draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
    print(f"exported to {out}, {time.process_time():.0f}s of CPU so far", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="train and export to this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1.0, help="share of the full number of steps, for trials")
    parser.add_argument("--evaluate", type=Path, help="measure this folder instead of training")
    parser.add_argument("--pictures", type=int, default=500, help="held-out pictures of the evaluation")
    parser.add_argument("--goldens", type=Path, help="write golden answers of the evaluated folder here")
    args = parser.parse_args()
    if (args.out is None) == (args.evaluate is None):
        parser.error("give either --out or --evaluate")
    torch.set_num_threads(1)
    quiet()
    if args.out:
        train(args.out, args.seed, args.steps)
    folder = args.out or args.evaluate
    if args.goldens:
        print(f"goldens: {write_goldens(folder, args.goldens)} right")
    else:
        print(json.dumps(evaluate(folder, args.pictures)))


if __name__ == "__main__":
    main()
