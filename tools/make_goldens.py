"""Makes tests/goldens: tiny random checkpoints and what transformers computes with them.

    python tools/make_goldens.py [--out tests/goldens] [--case NAME ...] [--check]

Needs the `goldens` extra; its torchvision only for Llama 4, and for all cases at once. Everything comes from fixed
seeds: a second run gives the same files.
A new family: a module with CASES, build, load_processor, resave, share_weights and, for arithmetic that deserves
a table of its own, write_tables; named in FAMILIES.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import goldens_idefics3
import goldens_llama4
import goldens_llava
import goldens_llava_tables
import goldens_mllama
import goldens_names
import goldens_qwen2_vl
import goldens_tables
import torch
from goldens_json import read_json, write_json
from goldens_pictures import write_scenarios
from goldens_reference import (
    Golden,
    differences,
    read_golden,
    run_case,
    write_golden,
)

FAMILIES: tuple[ModuleType, ...] = (
    goldens_idefics3,
    goldens_llama4,
    goldens_llava,
    goldens_mllama,
    goldens_qwen2_vl,
)
SEEDS_TRIED = 60
CHECK_TOLERANCE = 5e-5  # another processor may round otherwise; full logits are stored in steps of 6e-5
ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "goldens")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--check", action="store_true", help="write nothing: run what is there and compare")
    return parser.parse_args()


def replace(made: Path, target: Path) -> None:
    """Puts a finished folder into place in one step, so that nobody reads half of one."""
    staged = target.with_name(f".{target.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(made, staged, symlinks=True)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)


def search(family: ModuleType, case: Any, folder: Path, scenarios: dict[str, Any], images: Path) -> Golden:
    """Tries seeds until no scenario has a near tie."""
    for seed in range(case.seed, case.seed + SEEDS_TRIED):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        family.build(case, seed, folder)
        golden = run_case(case, folder, family.load_processor, scenarios, images)
        print(f"{case.name}: seed {seed}, smallest margin {golden.least_margin:.2g}", flush=True)
        if golden.clear:
            return golden
    raise SystemExit(f"{case.name}: every seed tried has near ties")


def make_case(family: ModuleType, case: Any, out: Path, scenarios: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / case.name
        golden = search(family, case, folder, scenarios, out / "images")
        write_golden(golden, folder)
        if case.resaved:
            again = Path(temporary) / case.resaved
            make_resaved(family, case, golden, again, scenarios, out / "images")
        replace(folder, out / case.name)
        if case.resaved:
            replace(again, out / case.resaved)


def make_resaved(
    family: ModuleType, case: Any, golden: Golden, folder: Path, scenarios: dict[str, Any], images: Path
) -> None:
    source = folder.parent / case.name
    folder.mkdir()
    family.resave(case, source, folder)
    found = differences(golden, run_case(case, folder, family.load_processor, scenarios, images))
    if found:
        raise SystemExit(f"{folder.name} differs from {case.name}: {found}")
    family.share_weights(source, folder)
    write_json(folder / "golden.json", {"case": folder.name, "same_as": case.name})


def check(out: Path, cases: list[tuple[ModuleType, Any]], scenarios: dict[str, Any]) -> bool:
    good = True
    for family, case in cases:
        stored = read_golden(out / case.name)
        for name in filter(None, (case.name, case.resaved)):
            fresh = run_case(case, out / name, family.load_processor, scenarios, out / "images")
            found = differences(stored, fresh, tolerance=CHECK_TOLERANCE)
            print(f"{name}: {found or 'as stored'}")
            good = good and not found
    return good


def main() -> int:
    torch.set_num_threads(1)
    options = arguments()
    every = [(family, case) for family in FAMILIES for case in family.CASES]
    unknown = set(options.case or ()) - {case.name for _, case in every}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    chosen = [(family, case) for family, case in every if not options.case or case.name in options.case]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.check:
        return 0 if check(options.out, chosen, read_json(options.out / "scenarios.json")) else 1
    scenarios = write_scenarios(options.out)
    for family, case in chosen:
        make_case(family, case, options.out, scenarios)
    if not options.case:
        import goldens_llama4_sizes  # needs torchvision, which single cases of other families do not

        for module in (goldens_tables, goldens_llama4_sizes, goldens_llava_tables, goldens_names, *FAMILIES):
            if hasattr(module, "write_tables"):
                module.write_tables(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
