"""A table of pure arithmetic: canvas and size of pictures, computed by transformers' own Llama 4 image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from goldens_json import write_json
from goldens_tables import EXTREMES, PHOTOS
from transformers.image_utils import SizeDict
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

# (tile, max_patches, resize_to_max_canvas): the published setting, and two odd ones.
SETTINGS = ((336, 16, False), (336, 16, True), (20, 7, False))
# Here a scale in float64 alone would give another height or width.
FLOAT32 = ((4163, 4163), (5175, 5175), (2518, 2518), (2096, 1572), (4275, 4275))


class SizesOnly(Llama4ImageProcessor):
    """The reference's own arithmetic; an image is only its shape."""

    def resize(self, image: torch.Tensor, size: SizeDict, **_: Any) -> torch.Tensor:
        self.resized.append((int(size.height), int(size.width)))
        return blank(*self.resized[-1])

    def rescale_and_normalize(self, images: torch.Tensor, *_: Any) -> torch.Tensor:
        return images


def blank(height: int, width: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8).expand(1, 3, height, width)  # no memory behind it


def sizes_of(size: tuple[int, int], setting: tuple[int, int, bool]) -> list[int]:
    """[rows, columns, h, w]: the canvas in tiles, and the picture on it."""
    tile, max_tiles, fill = setting
    processor = SizesOnly(size={"height": tile, "width": tile}, max_patches=max_tiles, resize_to_max_canvas=fill)
    processor.resized = []
    width, height = size
    out = processor(blank(height, width)[0], return_tensors="pt", input_data_format="channels_first")
    return [*out["aspect_ratios"][0].tolist(), *processor.resized[0]]


def write_tables(out: Path) -> None:
    sizes = [*PHOTOS, *EXTREMES[:20], *FLOAT32, (672, 336), (2000, 2000), (400, 1600), (337, 336), (1344, 1345)]
    settings = {
        f"{tile} {max_tiles} {'fill' if fill else 'fit'}": [sizes_of(size, (tile, max_tiles, fill)) for size in sizes]
        for tile, max_tiles, fill in SETTINGS
    }
    write_json(out / "llama4_sizes.json", {"sizes": sizes, "settings": settings}, compact_below=1)
