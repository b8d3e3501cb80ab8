"""Llama 3.2 Vision: messages -> Prompt. Pictures are fitted into the canvas of tiles that changes them least.

Source: transformers `MllamaImageProcessorPil`, `MllamaProcessor`. PreparedImage.pixels is [max tiles, 3, side, side],
tiles row by row, those that the picture does not fill exactly 0; layout is (rows, columns); span is one token: the
decoder looks at pictures through cross-attention, nothing is expanded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mlxvlm.errors import ModelError
from mlxvlm.messages import Message, Part
from mlxvlm.processors.base import turn_of_parts, turn_of_text
from mlxvlm.processors.family import FamilyProcessor, Layout, Pixels
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.transforms import (
    Frames,
    Normalizer,
    cut,
    pad_bottom_right,
    positive,
    resample_of,
    resize,
)

IMAGE = "<|image|>"

Arrangement = tuple[int, int]  # (rows, columns) of tiles


def arrangements(max_tiles: int) -> list[Arrangement]:
    """All (rows, columns) of at most `max_tiles` tiles, in the order that the tower's tables have.

    Source: `get_all_supported_aspect_ratios`; its names say width first, its callers take height first.
    """
    sides = range(1, max_tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]


def best_arrangement(height: int, width: int, tile: int, max_tiles: int) -> Arrangement:
    """The canvas that enlarges least, or shrinks least if none enlarges; the smallest of equals.

    Source: `get_optimal_tiled_canvas`.
    """
    scales = {shape: min(shape[0] * tile / height, shape[1] * tile / width) for shape in arrangements(max_tiles)}
    enlarging = [scale for scale in scales.values() if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales.values())
    return min((shape for shape in scales if scales[shape] == chosen), key=math.prod)


def fitted_size(height: int, width: int, canvas: tuple[int, int], tile: int) -> tuple[int, int]:
    """(height, width) inside `canvas` with the aspect kept; a picture below one tile grows to it.

    Source: `get_image_size_fit_to_canvas`.
    """
    target_height = min(max(height, tile), canvas[0])
    target_width = min(max(width, tile), canvas[1])
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * scale_height) or 1, target_width)


@dataclass(frozen=True)
class ImageSettings:
    """preprocessor_config.json with the reference's defaults; tile in pixels."""

    tile: int = 224
    max_tiles: int = 4
    resample: int = Image.Resampling.BILINEAR

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageSettings:
        size = config.get("size") or {"height": cls.tile, "width": cls.tile}
        if not size.get("height") or size["height"] != size.get("width"):
            raise ModelError(f"the image processor's size {size} is no square of height and width")
        if not (config.get("do_resize", True) and config.get("do_pad", True)):
            raise ModelError("the image processor's do_resize and do_pad must be true: the tower takes whole tiles")
        return cls(
            tile=positive(size["height"], "size"),
            max_tiles=positive(config.get("max_image_tiles", cls.max_tiles), "max_image_tiles"),
            resample=resample_of(config, cls.resample),
        )


class MllamaProcessor(FamilyProcessor[ImageSettings]):
    """Messages to Prompt."""

    def __init__(self, files: ProcessorFiles) -> None:
        config = files.image_processor
        settings = ImageSettings.from_config(config)
        _check_tower(settings, files.config.get("vision_config") or {})
        super().__init__(files, IMAGE, settings, Normalizer.from_config(config))

    def find_image_token(self, files: ProcessorFiles) -> int:
        return files.tokenizer.add_special(IMAGE)

    def turn(self, message: Message, parts: Sequence[Part]) -> dict[str, Any]:
        """Content as parts only where there is a picture.

        Of a system turn, a tool's answer and a first turn beside tools the template prints whatever it is given, so a
        list would put its own source text into the prompt.
        """
        if self.template.takes_strings or not message.images:
            return turn_of_text(message, parts, IMAGE)
        return turn_of_parts(message, parts)

    def render(self, turns: Sequence[tuple[Message, Sequence[Part]]], variables: Mapping[str, Any] | None) -> str:
        """With tools the template prints the first user turn as it is, so it is text even where it has pictures."""
        rendered = [self.turn(message, parts) for message, parts in turns]
        first = 1 if turns[0][0].role == "system" else 0
        if variables and variables.get("tools") and first < len(turns):
            rendered[first] = turn_of_text(*turns[first], IMAGE)
        return self.template.render(rendered, variables)

    def to_frames(self, image: Image.Image, settings: ImageSettings) -> tuple[Frames, Layout]:
        """RGB -> [tiles, 3, side, side], (rows, columns)."""
        tile = settings.tile
        rows, columns = best_arrangement(image.height, image.width, tile, settings.max_tiles)
        canvas = rows * tile, columns * tile
        size = fitted_size(image.height, image.width, canvas, tile)
        # Padded before it is normalised: the margin is a normalised black, which is not 0.
        padded = pad_bottom_right(resize(image, *size, settings.resample), *canvas)
        return cut(padded, rows, columns), (rows, columns)

    def to_pixels(self, frames: Frames, settings: ImageSettings) -> Pixels:
        """[max tiles, 3, side, side], tiles that the picture does not fill exactly 0."""
        pixels = np.zeros((settings.max_tiles, *frames.shape[1:]), np.float32)
        self.normalize(frames, pixels[: len(frames)])
        return pixels

    def num_placeholders(self, pixels: Pixels, layout: Layout) -> int:
        return 1  # the decoder looks at pictures through cross-attention


def _check_tower(settings: ImageSettings, vision: Mapping[str, Any]) -> None:
    """The tiles must be those that the tower has positions for."""
    tower = (vision.get("image_size") or 448, vision.get("max_num_tiles") or 4)
    if tower != (settings.tile, settings.max_tiles):
        raise ModelError(
            f"preprocessor_config.json makes up to {settings.max_tiles} tiles of {settings.tile} pixels, "
            f"but the vision tower takes {tower[1]} of {tower[0]}"
        )
    known = vision.get("supported_aspect_ratios")
    if known and [tuple(shape) for shape in known] != arrangements(settings.max_tiles):
        raise ModelError(f"the vision tower's supported_aspect_ratios {known} are not those of its images")


def build(files: ProcessorFiles) -> MllamaProcessor:
    """The entry that families.py points to."""
    return MllamaProcessor(files)
