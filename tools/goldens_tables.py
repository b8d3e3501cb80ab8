"""Tables of pure arithmetic, computed by transformers' own code: positions and image sizes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from goldens_json import write_json
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

LARGEST_GRID = 40
# (longest_edge, max_image_size, splitting): two published settings, and one odd one beyond the 4096 cap.
SETTINGS = ((1456, 364, True), (2048, 512, True), (4999, 333, False))
PHOTOS = (
    (640, 480), (800, 600), (1024, 768), (1280, 720), (1280, 960), (1600, 1200), (1920, 1080),
    (1920, 1200), (2048, 1536), (2560, 1440), (3000, 2000), (3024, 4032), (3264, 2448), (3840, 2160),
    (4000, 3000), (4032, 3024), (4624, 3468), (5000, 3333), (1170, 2532), (1080, 2340), (224, 224),
    (256, 256), (336, 336), (364, 364), (384, 384), (512, 512), (728, 364), (364, 728), (1456, 1456),
    (2048, 2048), (1456, 364), (512, 2048),
)  # fmt: skip
EXTREMES = (
    (1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (2, 4999), (4999, 2), (3, 1000), (1000, 3), (7, 5), (5, 7),
    (20, 15), (15, 20), (4000, 10), (10, 4000), (5000, 5000), (4999, 5000), (5000, 4999), (1457, 1456),
    (1455, 1456), (365, 364), (364, 365), (363, 364), (511, 512), (513, 512), (2047, 2048), (2049, 2048),
)  # fmt: skip


def position_row(embeddings: Idefics3VisionEmbeddings, real: int) -> list[int]:
    """Bucket of each of `real` rows of patches, out of the layer's own forward pass."""
    side = embeddings.num_patches_per_side
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, :real] = True
    ids = embeddings(torch.zeros(1, 1, side, side), mask)[0, :, 0].reshape(side, side)
    return [int(value) // side for value in ids[:real, 0].tolist()]


def id_embeddings(side: int) -> Idefics3VisionEmbeddings:
    """A layer of patch size 1 whose output is the position id itself."""
    plain = {"hidden_size": 1, "num_attention_heads": 1, "num_channels": 1, "patch_size": 1}
    embeddings = Idefics3VisionEmbeddings(Idefics3VisionConfig(image_size=side, **plain))
    embeddings.position_embedding.weight.data = torch.arange(side * side, dtype=torch.float32)[:, None]
    embeddings.patch_embedding.weight.data.zero_()
    embeddings.patch_embedding.bias.data.zero_()
    return embeddings


def position_table() -> dict[str, Any]:
    full, differing = {}, []
    with torch.no_grad():
        for side in range(1, LARGEST_GRID + 1):
            embeddings = id_embeddings(side)
            for real in range(1, side + 1):
                row = position_row(embeddings, real)
                if row != [i * side // real for i in range(real)]:
                    differing.append([side, real, row])
                if real == side:
                    full[str(side)] = row
    return {"full": full, "differs_from_floor": differing}


class SizeBackend(PilBackend):
    """Takes the place of the pixel work: an image is only its shape."""

    def resize(self, image: np.ndarray, size: SizeDict, **_: Any) -> np.ndarray:
        return blank(size.height, size.width)


class SizesOnly(Idefics3ImageProcessorPil, SizeBackend):
    """The reference's own arithmetic above, `SizeBackend` below."""


def blank(height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), (3, height, width))  # no memory behind it


def sizes_of(processor: SizesOnly, size: tuple[int, int], setting: tuple[int, int, bool]) -> list[int]:
    """[first h, first w, h, w, rows, cols, frames]: after the first resize, before tiling, and the tiles."""
    longest, tile, splitting = setting
    first = processor.resize(blank(size[1], size[0]), SizeDict(longest_edge=longest))
    if not splitting:
        return [*first.shape[1:], tile, tile, 0, 0, 1]
    last = processor.resize_for_vision_encoder(first, tile)
    frames, rows, cols = processor.split_images(last, {"longest_edge": tile})
    return [*first.shape[1:], *last.shape[1:], rows, cols, len(frames)]


def image_sizes(count: int = 190) -> list[tuple[int, int]]:
    """Published sizes, extreme ones, and random ones of all scales (log-uniform sides)."""
    stream = np.random.default_rng(7)
    sides = np.exp(stream.uniform(0, np.log(5000), size=(count, 2))).round().astype(int)
    drawn = [(int(width), int(height)) for width, height in sides]
    return list(dict.fromkeys([*PHOTOS, *EXTREMES, *drawn]))[:count]


def size_table() -> dict[str, Any]:
    processor, sizes = SizesOnly(), image_sizes()
    results = {
        f"{longest} {tile} {'split' if splitting else 'whole'}": [
            sizes_of(processor, size, (longest, tile, splitting)) for size in sizes
        ]
        for longest, tile, splitting in SETTINGS
    }
    return {"sizes": sizes, "settings": results}


# (step, min_pixels, max_pixels) of `smart_resize`: published, its own defaults, and a small odd one.
BUDGETS = ((28, 3136, 12845056), (28, 3136, 1003520), (6, 100, 2000))
# Halves of steps: Python rounds them to even.
TIES = (*((14 * a, 14 * b) for a in (1, 3, 5, 7, 9) for b in (1, 3, 5, 7, 9)), (1, 200), (200, 1), (29, 28))
# Runs of text and (rows, columns) of merged patches.
LAYOUTS: tuple[tuple[int | tuple[int, int], ...], ...] = (
    (3, (2, 3), 3), (1, (1, 1), 1), (2, (5, 1), 1, (1, 5), 4), (4, (3, 3), 2, (2, 4), 1, (4, 2), 6),
)  # fmt: skip


def fitted_table() -> dict[str, Any]:
    """Budget -> [h, w] of each size that `smart_resize` accepts, null for one that it refuses."""
    sizes = [*TIES, *image_sizes(120)]
    results = {
        " ".join(map(str, budget)): [
            None if max(size) > 200 * min(size) else smart_resize(size[1], size[0], *budget) for size in sizes
        ]
        for budget in BUDGETS
    }
    return {"sizes": sizes, "budgets": results}


def mrope_table() -> list[dict[str, Any]]:
    """Positions [3][L] and delta of each layout."""
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    model.get_vision_position_ids = partial(Qwen2VLModel.get_vision_position_ids, model)
    results = []
    for layout in LAYOUTS:
        kinds = [kind for run in layout for kind in ([0] * run if isinstance(run, int) else [1] * run[0] * run[1])]
        grids = torch.tensor([(1, 2 * run[0], 2 * run[1]) for run in layout if not isinstance(run, int)])
        ids = torch.zeros(1, len(kinds), dtype=torch.int64)
        positions, delta = Qwen2VLModel.get_rope_index(model, ids, torch.tensor([kinds]), grids)
        results.append({"layout": layout, "positions": positions[:, 0].tolist(), "delta": int(delta)})
    return results


def write_tables(out: Path) -> None:
    write_json(out / "position_ids.json", position_table(), compact_below=0)
    write_json(out / "sizes.json", size_table(), compact_below=1)
    write_json(out / "fitted_sizes.json", fitted_table(), compact_below=1)
    (out / "mrope_positions.json").write_text(json.dumps(mrope_table(), separators=(",", ":")) + "\n")
