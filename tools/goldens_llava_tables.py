"""Writes what transformers makes of picture sizes for LLaVA-NeXT: canvas, fitted size and number of tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from goldens_json import write_json
from goldens_tables import image_sizes
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

# "image size, patch size" -> canvases: the published ones, and an asymmetrical list.
SETTINGS = {
    "336 14": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "40 8": [[40, 80], [80, 40], [80, 80], [40, 120], [120, 80], [40, 200]],
}


def number_of_tokens(height: int, width: int, side: int, patch: int, canvases: list[list[int]]) -> int:
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = patch, 1
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=canvases)
    return int(processor._get_number_of_features(height, width, side, side)) - 1  # without the class token


def size_table() -> dict[str, object]:
    sizes = image_sizes(120)
    results = {}
    for name, canvases in SETTINGS.items():
        side, patch = map(int, name.split())
        rows = []
        for width, height in sizes:
            canvas = select_best_resolution((height, width), canvases)
            blank = np.broadcast_to(np.uint8(0), (3, height, width))
            fitted = get_patch_output_size(blank, canvas, input_data_format="channels_first")
            rows.append([*canvas, *fitted, number_of_tokens(height, width, side, patch, canvases)])
        results[name] = rows
    return {"sizes": sizes, "canvases": SETTINGS, "settings": results}


def write_tables(out: Path) -> None:
    write_json(out / "llava_sizes.json", size_table(), compact_below=1)
