"""Llama 4: messages -> Prompt. Pictures are fitted onto a canvas of square tiles, then a view of the whole follows.

Source: transformers `Llama4ImageProcessor`, `Llama4Processor`. PreparedImage.pixels is [tiles, 3, side, side] (tiles
row by row, the view of the whole last where there is more than one), layout is (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxvlm.errors import ModelError
from mlxvlm.messages import Message, Part
from mlxvlm.processors.base import turn_of_text
from mlxvlm.processors.family import FamilyProcessor, Layout, Pixels
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.transforms import (
    BFloat16Normalizer,
    Frames,
    Normalizer,
    cut,
    pad_bottom_right,
    positive,
    resample_of,
    resize,
    resize_both,
)

IMAGE = "<|image|>"  # a picture's place in the text, and the mark before the view of the whole
PATCH = "<|patch|>"  # one image feature
IMAGE_START, IMAGE_END = "<|image_start|>", "<|image_end|>"
TILE_X, TILE_Y = "<|tile_x_separator|>", "<|tile_y_separator|>"


@dataclass(frozen=True)
class ImageSettings:
    """preprocessor_config.json with the reference's defaults; sides in pixels."""

    tile: int = 336
    max_tiles: int = 16
    fill_canvas: bool = False
    resample: int = Image.Resampling.BILINEAR

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageSettings:
        size = config.get("size") or {"height": cls.tile, "width": cls.tile}
        if size["height"] != size["width"]:
            raise ModelError(f"the image processor's size {size} is not square")
        if not config.get("do_resize", True):
            raise ModelError("the image processor says do_resize false, but tiles need pictures of a fixed size")
        return cls(
            tile=positive(size["height"], "size"),
            max_tiles=positive(config.get("max_patches", cls.max_tiles), "max_patches"),
            fill_canvas=config.get("resize_to_max_canvas", cls.fill_canvas),
            resample=resample_of(config, cls.resample),
        )

    @cached_property
    def canvases(self) -> NDArray[np.int64]:
        """[canvases, 2]: (height, width) of each rectangle of at most max_tiles tiles.

        Source: `find_supported_resolutions`. Its order decides nothing: where two of equal area fit equally well, the
        canvas as high as the lower and as wide as the narrower one fits as well, and is smaller.
        """
        sides = range(1, self.max_tiles + 1)
        return np.array([(h, w) for h in sides for w in sides if h * w <= self.max_tiles]) * self.tile


def best_canvas(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) of the canvas that takes a picture with the least enlarging, else with the least shrinking.

    Source: `get_best_fit`. Scales are compared for equality, so they are float32 as there.
    """
    canvases = settings.canvases
    scales = (canvases.astype(np.float32) / np.array([height, width], np.float32)).min(axis=1)
    enough = scales[scales >= 1]
    chosen = (enough.max() if settings.fill_canvas else enough.min()) if len(enough) else scales.max()
    equals = canvases[scales == chosen]
    best = equals[equals.prod(axis=1).argmin()]
    return int(best[0]), int(best[1])


def fitted_size(height: int, width: int, canvas: tuple[int, int], settings: ImageSettings) -> tuple[int, int]:
    """(height, width) of the picture on its canvas: aspect kept, and enlarged to no more than one tile.

    Source: `get_max_res_without_distortion` and its caller. A side bound by the canvas is a tensor there, and what
    is divided or multiplied with it is float32, not float64: a few large pictures come out one pixel smaller or larger.
    """
    sides = (height, width)
    wanted = canvas if settings.fill_canvas else tuple(max(side, settings.tile) for side in sides)
    targets = [min(pair) for pair in zip(wanted, canvas, strict=True)]
    kinds = [
        np.float32 if settings.fill_canvas or limit < want else np.float64
        for limit, want in zip(canvas, wanted, strict=True)
    ]
    scales = [kind(target) / kind(side) for kind, target, side in zip(kinds, targets, sides, strict=True)]
    # A float32 and a float64 are compared as float32.
    kind = np.float32 if np.float32 in kinds else np.float64
    tight = 1 if kind(scales[1]) < kind(scales[0]) else 0  # the axis that decides
    free = 1 - tight
    fitted = [0, 0]
    fitted[tight] = max(targets[tight], 1)
    fitted[free] = max(min(math.floor(kinds[tight](sides[free]) * scales[tight]), targets[free]), 1)
    return fitted[0], fitted[1]


class Llama4Processor(FamilyProcessor[ImageSettings]):
    """Messages to Prompt."""

    def __init__(self, files: ProcessorFiles) -> None:
        config = files.image_processor
        settings = ImageSettings.from_config(config)
        # The reference goes through bfloat16, as training did, only where it does both.
        does_both = config.get("do_rescale", True) and config.get("do_normalize", True)
        normalizer = BFloat16Normalizer if does_both else Normalizer
        super().__init__(files, IMAGE, settings, normalizer.from_config(config))
        self.tokens_per_tile = _tokens_per_tile(files, settings.tile)

    def find_image_token(self, files: ProcessorFiles) -> int:
        for token in (IMAGE, PATCH, IMAGE_START, IMAGE_END, TILE_X, TILE_Y):
            if files.tokenizer.token_id(token) is None:
                raise ModelError(f"the tokenizer has no token {token}")
        found = files.tokenizer.token_id(PATCH)
        assert found is not None
        declared = files.config.get("image_token_index", files.config.get("image_token_id", 200092))
        if declared != found:
            raise ModelError(f"config.json says image_token_index {declared}, but {PATCH} is token {found}")
        return found

    def turn(self, message: Message, parts: Sequence[Part]) -> dict[str, Any]:
        """Content always as one string, which the template prints as it is.

        Of a list it reads the first part of a system turn only, and in front of tools it prints the list's Python repr.
        """
        return turn_of_text(message, parts, IMAGE)

    def to_frames(self, image: Image.Image, settings: ImageSettings) -> tuple[Frames, Layout]:
        """RGB -> [tiles, 3, side, side], (rows, columns)."""
        canvas = best_canvas(image.height, image.width, settings)
        size = fitted_size(image.height, image.width, canvas, settings)
        side = settings.tile
        rows, columns = canvas[0] // side, canvas[1] // side
        tiles = rows * columns
        if tiles == 1:
            return cut(pad_bottom_right(resize(image, *size, settings.resample), *canvas), 1, 1), (1, 1)
        # The overview is the whole picture, squeezed into one tile without regard to its aspect.
        fitted, overview = resize_both(image, size, (side, side), settings.resample)
        frames = np.empty((tiles + 1, 3, side, side), np.uint8)
        # Padding is black before normalising, not zero after it.
        cut(pad_bottom_right(fitted, *canvas), rows, columns, frames[:-1])
        cut(overview, 1, 1, frames[-1:])
        return frames, (rows, columns)

    def num_placeholders(self, pixels: Pixels, layout: Layout) -> int:
        return len(pixels) * self.tokens_per_tile

    def expansion(self, pixels: Pixels, layout: Layout) -> str:
        """Source: `_prompt_split_image`."""
        rows, columns = layout
        tile = PATCH * self.tokens_per_tile
        row = TILE_X.join([tile] * columns) + TILE_Y
        return f"{IMAGE_START}{row * rows if rows * columns > 1 else ''}{IMAGE}{tile}{IMAGE_END}"


def _tokens_per_tile(files: ProcessorFiles, tile: int) -> int:
    """(tile // patch)^2 / shuffle^2, checked against the tower."""
    vision = files.config.get("vision_config") or {}
    side, patch = int(vision.get("image_size", 448)), int(vision.get("patch_size", 14))
    declared = int(files.processor.get("patch_size", 14))
    if (tile, declared) != (side, patch):
        raise ModelError(f"the processor cuts tiles of {tile} and patches of {declared}, the tower {side} and {patch}")
    ratio = float(files.processor.get("pixel_shuffle_ratio", 0.5))
    return (tile // patch) ** 2 // round(1 / ratio**2)


def build(files: ProcessorFiles) -> Llama4Processor:
    """The entry that families.py points to."""
    return Llama4Processor(files)
