"""Runs a checkpoint through transformers and writes what came out: golden.json and golden.npz.

Knows no family: a family module gives the processor, this one everything that all of them share.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from goldens_json import write_json
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.image_processing_backends import PilBackend

NEW_TOKENS = 24
LEAST_MARGIN, LEAST_ARGMAX_MARGIN = 1e-3, 1e-4
# Random float32 digits do not compress. Steps of 2^-16 (error 8e-6) are far below any gate on logits, and
# 2^-14 (3e-5) is enough for the many full rows, where a zero byte for each number saves the most.
FINE, COARSE = 2.0**16, 2.0**14

Arrays = dict[str, np.ndarray]
Prepared = tuple[str, bool, Any]  # rendered prompt, whether to add special tokens to it, the model's inputs
LoadProcessor = Callable[[Path], Any]


@dataclass
class Golden:
    """One checkpoint's results; `head` describes the case, `scenarios` and `arrays` hold the values."""

    head: dict[str, Any]
    scenarios: dict[str, dict[str, Any]] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    @property
    def least_margin(self) -> float:
        return min(entry["greedy_min_margin"] for entry in self.scenarios.values())

    @property
    def clear(self) -> bool:
        """No top-1 is nearly a tie, so that float noise cannot turn one over."""
        closest = min(entry["argmax_min_margin"] for entry in self.scenarios.values())
        return self.least_margin >= LEAST_MARGIN and closest >= LEAST_ARGMAX_MARGIN


def load_model(folder: Path) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def fill_parameters(model: torch.nn.Module, seed: int, scale: Callable[[str, torch.Size], float]) -> None:
    """Draws every parameter from its own stream, so that one more layer does not change the others.

    `scale` gives a parameter's standard deviation; norm weights lie around 1.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stream = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = stream.standard_normal(tuple(parameter.shape)) * scale(name, parameter.shape)
            if "norm" in name and name.endswith("weight"):
                values += 1.0
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def save_loaded(case: Any, source: Path, folder: Path) -> None:
    """As transformers saves what it has loaded: its tensors lie in another order than a new model's."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=case.dtype)
    model.save_pretrained(folder, max_shard_size=getattr(case, "shard", "5GB"))


def share_weights(source: Path, folder: Path) -> None:
    """Weight files with the very bytes of another case become links to it, as in a hub cache."""
    for path in folder.glob("*.safetensors"):
        twin = source / path.name
        if twin.exists() and twin.read_bytes() == path.read_bytes():
            path.unlink()
            path.symlink_to(os.path.join("..", source.name, path.name))


def inputs_for(case: Any, processor: Any, chat: list[dict[str, Any]], images: dict[str, Path]) -> Prepared:
    parts = [part for message in chat for part in message["content"] if part["type"] == "image"]
    opened = [ImageOps.exif_transpose(Image.open(images[part["image"]])) for part in parts]
    messages = [{"role": message["role"], "content": content_of(case, message)} for message in chat]
    variables = getattr(case, "template_variables", {})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)
    bos = processor.tokenizer.bos_token
    add_special_tokens = not (bos and prompt.startswith(bos))
    given = {"images": [opened]} if opened else {}
    inputs = processor(text=[prompt], return_tensors="pt", add_special_tokens=add_special_tokens, **given)
    floats = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    return prompt, add_special_tokens, floats


def content_of(case: Any, message: dict[str, Any]) -> Any:
    """Parts, or the text alone of a system turn where the case's template takes nothing else."""
    if message["role"] == "system" and getattr(case, "plain_system", False):
        return "".join(part["text"] for part in message["content"])
    return [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]


def greedy(model: Any, processor: Any, inputs: Any) -> tuple[list[int], float]:
    """Ids of a greedy continuation that ignores EOS, and the smallest gap between its best two logits."""
    pad = processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(pad_token_id=pad)  # else its EOS is used all the same
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = model.generate(**inputs, generation_config=config)
    ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids, margin(torch.stack([step[0] for step in out.logits]))


def margin(logits: torch.Tensor) -> float:
    """The smallest gap between the best two of a row, to three digits."""
    best = logits.topk(2, dim=-1).values
    return float(f"{float((best[:, 0] - best[:, 1]).min()):.3g}")


def rounded(values: torch.Tensor, steps: float = FINE) -> np.ndarray:
    return (np.round(values.double().numpy() * steps) / steps).astype(np.float32)


def pixel_table(case: Any, processor: Any) -> np.ndarray:
    """What the processor makes of each of the 256 pixel values, for each kind of channel; 0 for blank tiles."""
    image = processor.image_processor
    if not isinstance(image, PilBackend):  # then its own arithmetic, which may have its own precision
        levels = torch.arange(256, dtype=torch.uint8).expand(1, len(image.image_mean), 1, 256)
        settings = (True, image.rescale_factor, True, image.image_mean, image.image_std)
        return image.rescale_and_normalize(levels, *settings)[0, 0, 0].float().numpy()
    levels = (np.arange(256).astype(np.float64) * image.rescale_factor).astype(np.float32)
    kinds = dict.fromkeys(zip(image.image_mean, image.image_std, strict=True))
    tables = [(levels - np.float32(mean)) / np.float32(std) for mean, std in kinds]
    blank = [np.zeros(1, np.float32)] if getattr(case, "blank_tiles", False) else []
    return np.concatenate([*tables, *blank]).astype(np.float32)


def pixel_codes(pixels: torch.Tensor, table: np.ndarray) -> np.ndarray:
    values = pixels.numpy()
    order = np.argsort(table, kind="stable")
    codes = order[np.searchsorted(table[order], values).clip(max=len(table) - 1)]
    codes = codes.astype(np.uint8 if len(table) <= 256 else np.uint16)
    if not np.array_equal(table[codes], values):
        raise AssertionError("the pixel values are no indices into the table")
    return codes


def run_scenario(model: Any, processor: Any, prepared: Prepared, full: bool) -> tuple[dict[str, Any], Arrays]:
    prompt, add_special_tokens, inputs = prepared
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]
        ids, closest = greedy(model, processor, inputs)
    masks = [key for key in inputs if key.endswith("mask") and bool((inputs[key] == 1).all())]
    entry = {
        "prompt": prompt,
        "add_special_tokens": add_special_tokens,
        "fields": {key: list(value.shape) for key, value in inputs.items()},
        "all_ones": masks,
        "seq_len": inputs["input_ids"].shape[1],
        "greedy": ids,
        "greedy_text": processor.tokenizer.decode(ids, skip_special_tokens=True),
        "greedy_min_margin": closest,
        "argmax_min_margin": margin(logits),
    }
    arrays: Arrays = {
        key: value.numpy().astype(np.int32)
        for key, value in inputs.items()
        if key not in (*masks, "mm_token_type_ids", "pixel_values")
    }
    arrays["logits_last"] = rounded(logits[-1])
    arrays["argmax"] = logits.argmax(-1).numpy().astype(np.int16)
    arrays["lse"] = rounded(torch.logsumexp(logits, -1))
    if full:
        arrays["logits"] = rounded(logits, COARSE)
    return entry, arrays


def put_pixels(golden: Golden, name: str, used: list[str], pixels: torch.Tensor) -> None:
    """A scenario of its own: its codes. Else the names of the scenarios whose pixels these are, checked."""
    table = golden.arrays["pixel_table"]
    if used == [name]:
        golden.arrays[f"{name}/pixel_values"] = pixel_codes(pixels, table)
        return
    # Behind the batch, or at once where the first axis is that of pictures or patches.
    axis = 1 if pixels.ndim > 2 and len(used) > len(pixels) else 0
    parts = [table[golden.arrays[f"{other}/pixel_values"]] for other in used]
    if any(part.shape[1:] != pixels.shape[1:] for part in parts) and axis == 0:
        return  # pictures of different tile counts, padded to the largest: stored one by one already
    joined = np.concatenate(parts, axis)
    if not np.array_equal(joined, pixels.numpy()):
        raise AssertionError(f"{name}: the pixels are not those of {used}")
    golden.scenarios[name]["pixels"] = {"of": used, "axis": axis}


def run_case(case: Any, folder: Path, load_processor: LoadProcessor, scenarios: dict[str, Any], images: Path) -> Golden:
    """Loads the checkpoint in `folder` and runs the case's scenarios."""
    model, processor = load_model(folder), load_processor(folder)
    golden = Golden(describe(case, folder, model, processor) | {"batch": scenarios["batch"]})
    golden.arrays["pixel_table"] = pixel_table(case, processor)
    paths = {name: images / file for name, file in scenarios["images"].items()}
    for name, chat in scenarios["scenarios"].items():
        if name in case.skipped:
            continue
        prepared = inputs_for(case, processor, chat, paths)
        golden.scenarios[name], arrays = run_scenario(model, processor, prepared, name in case.full_logits)
        golden.arrays |= {f"{name}/{key}": value for key, value in arrays.items()}
        used = [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]
        if used and set(used) <= set(case.pixels):
            put_pixels(golden, name, [f"one_{image}" for image in used], prepared[2]["pixel_values"])
    return golden


def describe(case: Any, folder: Path, model: Any, processor: Any) -> dict[str, Any]:
    return {
        "case": folder.name,
        "stored_dtype": stored_dtype(folder),
        "hf_model_class": type(model).__name__,
        "hf_image_processor": type(processor.image_processor).__name__,
        "hf_tokenizer": type(processor.tokenizer).__name__,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "new_tokens": NEW_TOKENS,
        "eos": json.loads((folder / "generation_config.json").read_text())["eos_token_id"],
        "template_kwargs": getattr(case, "template_variables", {}),
    }


def stored_dtype(folder: Path) -> str:
    """The type of the first tensor, read from the file's own header."""
    with sorted(folder.glob("*.safetensors"))[0].open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return next(names[entry["dtype"]] for key, entry in header.items() if key != "__metadata__")


def write_golden(golden: Golden, folder: Path) -> None:
    write_json(folder / "golden.json", golden.head | {"scenarios": golden.scenarios}, compact_below=2)
    with zipfile.ZipFile(folder / "golden.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, values in golden.arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(values), allow_pickle=False)
            # A ZipInfo made from the name alone has a fixed date: equal arrays give an equal file.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue(), compresslevel=9)


def differences(first: Golden, second: Golden, tolerance: float = 0.0) -> list[str]:
    """Where two results differ; with a tolerance for floats, their margins may differ too."""
    found = [] if first.scenarios.keys() == second.scenarios.keys() else ["scenarios"]
    for name in first.scenarios.keys() & second.scenarios.keys():
        for key, value in first.scenarios[name].items():
            loose = tolerance > 0 and key.endswith("min_margin")
            if not loose and value != second.scenarios[name].get(key):
                found.append(f"{name}: {key}")
    for name, values in first.arrays.items():
        other = second.arrays.get(name, np.empty(0))
        if other.shape != values.shape or not np.allclose(other, values, rtol=0, atol=tolerance):
            found.append(name)
    return sorted(found)


def read_golden(folder: Path) -> Golden:
    head = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    with np.load(folder / "golden.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    return Golden(head, head.pop("scenarios"), arrays)
