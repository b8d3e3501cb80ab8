"""How far bfloat16 takes logits from float32: ours beside transformers' own, with the same weights and pixels.

    PYTHONPATH=. python tools/compare_bfloat16.py [FOLDER ...]

FOLDER: golden cases as tools/make_goldens.py writes them; tests/goldens without any. The truth is transformers in
float32 with weights rounded to bfloat16, so that only arithmetic differs. A line for each case: median, root mean
square, 99th percentile and maximum of the absolute error over all positions and tokens; the last line is JSON. Needs
the `goldens` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import goldens_mllama  # noqa: F401 - the authors' masking, with which mllama's goldens are made
import mlx.core as mx
import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from mlxvlm.checkpoint.load import LoadOptions
from mlxvlm.engine.kv_cache import KVGroup, KVPass
from tests.golden import GOLDENS, Case, cases

HALF = torch.bfloat16
COLUMNS = ("median", "rms", "p99", "max")
Logits = list[np.ndarray]


def slow_gather_mm(rows: mx.array, stack: mx.array, *, rhs_indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """Each row [1, D] by its own matrix: MLX's CPU backend has mx.gather_mm for float32 only."""
    return rows @ stack[rhs_indices]


def reference_inputs(case: Case, scenario: str) -> dict[str, torch.Tensor] | None:
    """What transformers' processor gave, as the golden holds it; None where it holds no pixels."""
    entry = case.expected(scenario)
    inputs = {}
    for name, shape in entry["fields"].items():
        found = case.arrays.get(f"{scenario}/{name}")
        if name == "pixel_values":
            found = case.pixels(scenario)
            if found is None:
                return None
        elif name in entry.get("all_ones", ()):
            found = np.ones(shape, np.int64)
        elif name == "mm_token_type_ids":
            found = case.arrays[f"{scenario}/input_ids"] == case.open().processor.image_token_id
        elif found is None:
            return None
        tensor = torch.from_numpy(np.ascontiguousarray(found)).reshape(shape)
        inputs[name] = tensor if tensor.is_floating_point() else tensor.long()
    return inputs


def reference_model(case: Case, dtype: torch.dtype) -> Any:
    """transformers' model with weights rounded to bfloat16 that computes in `dtype`."""
    model = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(HALF).to(dtype))
    return model


def reference_logits(case: Case, scenarios: list[str], dtype: torch.dtype) -> Logits:
    model, found = reference_model(case, dtype), []
    for scenario in scenarios:
        inputs = reference_inputs(case, scenario)
        assert inputs is not None
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.no_grad():
            found.append(model(**inputs, use_cache=False).logits[0].float().numpy())
    return found


def our_logits(case: Case, scenarios: list[str]) -> Logits:
    source = case.open()
    model, found = source.build(LoadOptions("bfloat16"), lambda done, total: None), []
    for scenario in scenarios:
        prompt = source.processor(case.messages(scenario), case.template)
        if not case.is_resampled_by_pillow:
            prompt = case.with_golden_pixels(scenario, prompt)
        inputs = model.embed_prompt(prompt, model.encode_images(prompt.images) if prompt.images else [])
        forward = KVPass([KVGroup.single(model.kv_specs, 0)], len(prompt.token_ids))
        found.append(np.array(model.logits(model(inputs, forward.layers))[0].astype(mx.float32)))
    return found


def statistics(found: Logits, truth: Logits) -> dict[str, float]:
    error = np.concatenate([np.abs(ours - theirs).ravel() for ours, theirs in zip(found, truth, strict=True)])
    rms = np.sqrt((error.astype(np.float64) ** 2).mean())
    values = (np.median(error), rms, np.quantile(error, 0.99), error.max())
    return {name: float(f"{value:.3g}") for name, value in zip(COLUMNS, values, strict=True)}


def compare(case: Case) -> dict[str, Any]:
    scenarios = [name for name in case.scenarios if reference_inputs(case, name) is not None]
    truth = reference_logits(case, scenarios, torch.float32)
    theirs = statistics(reference_logits(case, scenarios, HALF), truth)
    ours = statistics(our_logits(case, scenarios), truth)
    ratios = {name: round(ours[name] / theirs[name], 2) for name in COLUMNS}
    spread = float(f"{np.concatenate([logits.ravel() for logits in truth]).std():.3g}")
    return {"case": case.name, "scenarios": len(scenarios), "std": spread, "ours": ours, "theirs": theirs} | {
        "ratio": ratios
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*", default=[GOLDENS])
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mx.gather_mm = slow_gather_mm
    results = []
    for case in (case for folder in args.folder for case in cases(folder)):
        is_copy = "same_as" in json.loads((case.folder / "golden.json").read_text())
        if is_copy or (args.case and case.name not in args.case):
            continue
        results.append(compare(case))
        row = results[-1]
        numbers = "  ".join(
            f"{name} {row['ours'][name]:.3g} / {row['theirs'][name]:.3g} = {row['ratio'][name]}" for name in COLUMNS
        )
        print(f"{case.name:<20} {numbers}", flush=True)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
