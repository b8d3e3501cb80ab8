"""LLaVA 1.5 and LLaVA-NeXT: messages -> Prompt. One square view of a picture, or one and tiles of a larger canvas.

Sources: transformers `LlavaProcessor`, `LlavaNextProcessor` and the PIL image processors of CLIP, SigLIP, LLaVA and
LLaVA-NeXT. PreparedImage.pixels is [frames, 3, side, side]: the whole view, then NeXT's tiles row by row. layout is ()
for LLaVA 1.5, else (rows, columns, trim_y, trim_x): the tiles, and how many patches of padding to take off the top and
the bottom, the left and the right of their joint grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mlxvlm.errors import ModelError
from mlxvlm.messages import Message, Part, TextPart
from mlxvlm.processors.base import turn_of_parts, turn_of_text, typed_markers
from mlxvlm.processors.family import FamilyProcessor, Layout, Pixels
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Frames,
    Normalizer,
    cut,
    floats,
    positive,
    resample_of,
    resize,
    resize_both,
)

# (height, width) in pixels; the reference's own list.
DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class Tower:
    """What the prompt must know of the vision tower: config.json with the reference's defaults."""

    image_size: int
    patch_size: int
    has_class_token: bool
    drops_first: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Tower:
        # Without any vision_config it is CLIP-L/14 at 336 pixels; with a partial one its class's defaults count.
        vision = config.get("vision_config")
        vision = {"image_size": 336, "patch_size": 14} if vision is None else vision
        is_clip = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        return cls(
            image_size=int(vision.get("image_size", 224)),
            patch_size=int(vision.get("patch_size", 32 if is_clip else 16)),
            has_class_token=is_clip,
            drops_first=config.get("vision_feature_select_strategy", "default") == "default",
        )

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        return self.grid**2 + self.has_class_token - self.drops_first


class View(Protocol):
    """How a picture becomes frames, and how many tokens they are."""

    def __call__(self, image: Image.Image) -> tuple[Frames, Layout]: ...

    def num_tokens(self, layout: Layout) -> int: ...


@dataclass(frozen=True)
class SingleView:
    """LLaVA 1.5: resize, centre crop. Sides in pixels, sizes (height, width)."""

    tower: Tower
    shortest_edge: int | None
    fixed_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    pad_color: tuple[int, ...] | None  # pad to a square with it first
    resample: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tower: Tower) -> SingleView:
        """preprocessor_config.json; raises ModelError when its pictures don't have the tower's size."""
        kind = str(config.get("image_processor_type", ""))
        is_siglip = kind.startswith("Siglip")
        size = config.get("size") or ({"height": 224, "width": 224} if is_siglip else {"shortest_edge": 224})
        # Old configs give one number for a short edge, and for both sides of a crop.
        size = {"shortest_edge": size} if isinstance(size, int) else size
        if not config.get("do_resize", True):
            size = {}
        does_crop = config.get("do_center_crop", not is_siglip)
        crop = _both_sides(config.get("crop_size") or 224) if does_crop else None
        fixed = _both_sides(size) if "height" in size and "width" in size else None
        expected = (tower.image_size, tower.image_size)
        if (crop or fixed) != expected:
            raise ModelError(f"the image processor makes pictures of {crop or size}, but the tower takes {expected}")
        shortest = size.get("shortest_edge")
        mean = floats(config.get("image_mean", CLIP_MEAN))
        # Only LLaVA's own image processor has this; LLaVA-NeXT's `do_pad` is about batches.
        pads = kind.startswith("LlavaImageProcessor") and config.get("do_pad", False)
        return cls(
            tower=tower,
            shortest_edge=None if shortest is None else positive(shortest, "size.shortest_edge"),
            fixed_size=fixed,
            crop=crop,
            pad_color=tuple(int(value * 255) for value in mean) if pads else None,
            resample=resample_of(config, Image.Resampling.BICUBIC),
        )

    def __call__(self, image: Image.Image) -> tuple[Frames, Layout]:
        if self.pad_color is not None:
            image = _pad(image, max(image.size), max(image.size), self.pad_color)
        if self.fixed_size is not None:
            image = resize(image, *self.fixed_size, self.resample)
        elif self.shortest_edge is not None:
            image = resize(image, *short_edge_size(image.height, image.width, self.shortest_edge), self.resample)
        if self.crop is not None:
            height, width = self.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            # What lies outside of a smaller picture is black, as in the reference.
            image = image.crop((left, top, left + width, top + height))
        return cut(image, 1, 1), ()

    def num_tokens(self, layout: Layout) -> int:
        return self.tower.tokens_per_frame


@dataclass(frozen=True)
class AnyRes:
    """LLaVA-NeXT: the whole picture squeezed into a square, then tiles of it on the best of some canvases."""

    tower: Tower
    pinpoints: tuple[tuple[int, int], ...]  # canvases, (height, width)
    resample: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tower: Tower, pinpoints: Any) -> AnyRes:
        """preprocessor_config.json; `pinpoints` is the model's list, for where that has none."""
        size = config.get("size") or {"shortest_edge": 224}
        side = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
        crop = _both_sides(config.get("crop_size") or 224)
        if side != tower.image_size or crop != (side, side):
            raise ModelError(
                f"the image processor makes tiles of {crop} from {size}, the tower takes {tower.image_size}"
            )
        chosen = config.get("image_grid_pinpoints") or pinpoints or DEFAULT_PINPOINTS
        canvases = tuple((int(height), int(width)) for height, width in chosen)
        if any(length % side or length < side for canvas in canvases for length in canvas):
            raise ModelError(f"image_grid_pinpoints {canvases} are no multiples of the tile's {side} pixels")
        return cls(tower, canvases, resample_of(config, Image.Resampling.BICUBIC))

    def __call__(self, image: Image.Image) -> tuple[Frames, Layout]:
        side = self.tower.image_size
        canvas = best_canvas(image.height, image.width, self.pinpoints)
        size = fitted_size(image.height, image.width, *canvas)
        fitted, whole = resize_both(image, size, (side, side), self.resample)
        rows, columns = canvas[0] // side, canvas[1] // side
        frames = np.empty((1 + rows * columns, 3, side, side), np.uint8)
        cut(whole, 1, 1, frames[:1])
        cut(_pad(fitted, *canvas), rows, columns, frames[1:])
        grid = rows * self.tower.grid, columns * self.tower.grid
        trims = padding_patches(image.height, image.width, *grid)
        return frames, (rows, columns, *trims)

    def num_tokens(self, layout: Layout) -> int:
        rows, columns, trim_y, trim_x = layout
        height = rows * self.tower.grid - 2 * trim_y
        width = columns * self.tower.grid - 2 * trim_x
        return self.tower.tokens_per_frame + height * (width + 1)  # a newline after each row


def short_edge_size(height: int, width: int, shortest_edge: int) -> tuple[int, int]:
    """(height, width) with the short edge at `shortest_edge`. Source: `get_resize_output_image_size`."""
    longest = int(shortest_edge * max(height, width) / min(height, width))
    return (shortest_edge, longest) if height <= width else (longest, shortest_edge)


def best_canvas(height: int, width: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that keeps most of a picture's own pixels, then wastes least, then comes first.

    Source: `select_best_resolution`.
    """

    def score(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(canvases, key=score)


def fitted_size(height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[int, int]:
    """(height, width) of a picture that fills a canvas one way. Source: `get_patch_output_size`."""
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_y), canvas_width)


def padding_patches(height: int, width: int, grid_height: int, grid_width: int) -> tuple[int, int]:
    """(trim_y, trim_x): patches at each edge of a canvas's grid that hold padding only.

    Its rounding is the reference's and not that of the pixels; trained weights saw it. Source: `unpad_image`.
    """
    if width / height > grid_width / grid_height:
        return (grid_height - int(round(height * (grid_width / width), 7))) // 2, 0
    return 0, (grid_width - int(round(width * (grid_height / height), 7))) // 2


def _pad(image: Image.Image, height: int, width: int, color: tuple[int, ...] = (0, 0, 0)) -> Image.Image:
    """Centred on a canvas; of an odd rest the larger half goes right and below."""
    if image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height), color)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _both_sides(size: Any) -> tuple[int, int]:
    """(height, width) of a setting that may be one number."""
    sides = {"height": size, "width": size} if isinstance(size, int) else size
    return positive(sides["height"], "height"), positive(sides["width"], "width")


class LlavaProcessor(FamilyProcessor[View]):
    """Messages to Prompt for both model types."""

    def __init__(self, files: ProcessorFiles) -> None:
        config = files.image_processor
        is_siglip = str(config.get("image_processor_type", "")).startswith("Siglip")
        mean, std = (0.5, 0.5) if is_siglip else (CLIP_MEAN, CLIP_STD)
        marker = str(files.processor.get("image_token", "<image>"))
        super().__init__(files, marker, _view_of(files), Normalizer.from_config(config, mean, std))

    def find_image_token(self, files: ProcessorFiles) -> int:
        found = files.tokenizer.add_special(self.marker)
        declared = files.config.get("image_token_index", files.config.get("image_token_id", 32000))
        if declared != found:
            raise ModelError(f"the tokenizer's {self.marker} is {found}, config.json's {declared}")
        return found

    def turn(self, message: Message, parts: Sequence[Part]) -> dict[str, Any]:
        """Content always as parts where it is no string: these templates drop plain strings silently.

        Of system and assistant turns some print the first part only, so their text is one part. Pictures are printed
        in front of the text wherever they stand, so text with markers that the user typed goes in as it is.
        """
        if self.template.takes_strings:
            return turn_of_text(message, parts, self.marker)
        if message.images and typed_markers(message, self.marker):
            parts = [part for part in message.parts if isinstance(part, TextPart)]
        if message.role != "user":
            parts = [*([TextPart(message.text)] if message.text else []), *message.images]
        return turn_of_parts(message, parts)

    def to_frames(self, image: Image.Image, settings: View) -> tuple[Frames, Layout]:
        return settings(image)

    def num_placeholders(self, pixels: Pixels, layout: Layout) -> int:
        return self.settings.num_tokens(layout)


def _view_of(files: ProcessorFiles) -> View:
    tower = Tower.from_config(files.config)
    if files.config.get("model_type") == "llava_next":
        return AnyRes.from_config(files.image_processor, tower, files.config.get("image_grid_pinpoints"))
    return SingleView.from_config(files.image_processor, tower)


def build(files: ProcessorFiles) -> LlavaProcessor:
    """The entry that families.py points to."""
    return LlavaProcessor(files)
