"""Idefics3 and SmolVLM: messages -> Prompt. Pictures are scaled up and cut into square tiles, then a global view.

Source: transformers `Idefics3ImageProcessorPil`, `Idefics3Processor` and their SmolVLM twins. PreparedImage.pixels is
[frames, 3, side, side] (tiles row by row, the global view last), layout is (rows, columns), (0, 0) when not split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mlxvlm.errors import ModelError
from mlxvlm.processors.family import FamilyProcessor, Layout, Pixels
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.transforms import (
    Frames,
    Normalizer,
    cut,
    positive,
    resample_of,
    resize,
)

MAX_SIDE = 4096  # pixels; the reference's absolute maximum
IMAGE = "<image>"
DEFAULT_IMAGE_TOKEN_ID = 128257  # Idefics3Config's and SmolVLMConfig's
FAKE = "<fake_token_around_image>"
GLOBAL = "<global-img>"
END_OF_UTTERANCE = "<end_of_utterance>"

# transformers' own for SmolVLM2 checkpoints, whose repositories may carry an older, unusable one or none.
DEFAULT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class ImageSettings:
    """preprocessor_config.json with the reference's defaults; sides in pixels."""

    longest_edge: int | None = 4 * 364
    fixed_size: tuple[int, int] | None = None  # (height, width), where `size` names both instead
    tile: int = 364
    do_resize: bool = True
    do_split: bool = True
    resample: int = Image.Resampling.LANCZOS.value  # a number as in configs, so that it reads the same in digests

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageSettings:
        size = config.get("size") or {"longest_edge": cls.longest_edge}
        fixed = (
            (positive(size["height"], "height"), positive(size["width"], "width"))
            if "height" in size and "width" in size
            else None
        )
        longest = size.get("longest_edge")
        if longest is None and fixed is None:
            raise ModelError(f"the image processor's size {size} names neither longest_edge nor height and width")
        tile = (config.get("max_image_size") or {}).get("longest_edge", cls.tile)
        return cls(
            longest_edge=None if longest is None else positive(longest, "size.longest_edge"),
            fixed_size=fixed,
            tile=positive(tile, "max_image_size.longest_edge"),
            do_resize=config.get("do_resize", True),
            do_split=config.get("do_image_splitting", True),
            resample=resample_of(config, cls.resample),
        )


def scaled_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) with the long edge at `longest_edge`, up or down, capped at MAX_SIDE.

    Source: `get_resize_output_image_size`, its two truncations and its rounding up to even included.
    """
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > MAX_SIDE:
        width, height = MAX_SIDE, int(MAX_SIDE / aspect)
    elif height > width and height > MAX_SIDE:
        width, height = int(MAX_SIDE * aspect), MAX_SIDE
    return max(height, 1), max(width, 1)


def tiled_size(height: int, width: int, tile: int) -> tuple[int, int]:
    """(height, width) enlarged to multiples of `tile`. Source: `resize_for_vision_encoder`."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return height, width


class Idefics3Processor(FamilyProcessor[ImageSettings]):
    """Messages to Prompt for both model types."""

    def __init__(self, files: ProcessorFiles) -> None:
        config = files.image_processor
        for token in (FAKE, IMAGE, END_OF_UTTERANCE):
            files.tokenizer.add_special(token)
        settings = ImageSettings.from_config(config)
        super().__init__(files, IMAGE, settings, Normalizer.from_config(config), DEFAULT_TEMPLATE)
        self.tokens_per_frame = _tokens_per_frame(files, settings.tile)

    def find_image_token(self, files: ProcessorFiles) -> int:
        found = files.tokenizer.add_special(IMAGE)
        declared = files.config.get("image_token_id", DEFAULT_IMAGE_TOKEN_ID)
        if declared != found:
            raise ModelError(
                f"config.json says image_token_id {declared}, but the tokenizer's {IMAGE} is token {found}"
            )
        return found

    def to_frames(self, image: Image.Image, settings: ImageSettings) -> tuple[Frames, Layout]:
        """RGB -> [frames, 3, side, side], (rows, columns)."""
        if settings.do_resize:
            size = settings.fixed_size
            if settings.longest_edge is not None:
                size = scaled_size(image.height, image.width, settings.longest_edge)
            assert size is not None
            image = resize(image, *size, settings.resample)
        side = settings.tile
        if not settings.do_split:
            return cut(resize(image, side, side, settings.resample), 1, 1), (0, 0)
        image = resize(image, *tiled_size(image.height, image.width, side), settings.resample)
        rows, columns = image.height // side, image.width // side
        if rows * columns == 1:
            return cut(image, 1, 1), (0, 0)
        frames = np.empty((rows * columns + 1, 3, side, side), np.uint8)
        cut(image, rows, columns, frames[:-1])
        cut(resize(image, side, side, settings.resample), 1, 1, frames[-1:])
        return frames, (rows, columns)

    def num_placeholders(self, pixels: Pixels, layout: Layout) -> int:
        return len(pixels) * self.tokens_per_frame

    def expansion(self, pixels: Pixels, layout: Layout) -> str:
        """Source: `replace_image_token`."""
        rows, columns = layout
        frame = IMAGE * self.tokens_per_frame
        overview = f"{FAKE}{GLOBAL}{frame}{FAKE}"
        if not rows:
            return overview
        lines = [
            "".join(f"{FAKE}<row_{row + 1}_col_{column + 1}>{frame}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(lines) + "\n" + overview


def _tokens_per_frame(files: ProcessorFiles, tile: int) -> int:
    """processor_config's image_seq_len, checked against the tower: (image // patch)^2 / scale^2."""
    vision = files.config.get("vision_config") or {}
    side, patch = int(vision.get("image_size", 224)), int(vision.get("patch_size", 32))
    grid = side // patch
    # A rest of less than a patch is cut off by the tower.
    if tile // patch != grid:
        raise ModelError(
            f"the image processor's tiles of {tile} pixels are {tile // patch} patches a side, "
            f"but the vision tower takes {grid} (of image_size {side})"
        )
    expected = grid**2 // int(files.config.get("scale_factor", 2)) ** 2
    declared = files.processor.get("image_seq_len", expected)
    if declared != expected:
        raise ModelError(f"processor_config.json says image_seq_len {declared}, but the vision tower gives {expected}")
    return int(declared)


def build(files: ProcessorFiles) -> Idefics3Processor:
    """The entry that families.py points to."""
    return Idefics3Processor(files)
