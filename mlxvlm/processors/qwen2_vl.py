"""Qwen2-VL: messages -> Prompt. A picture keeps its shape and becomes as many patches as its size asks for.

Source: transformers `Qwen2VLImageProcessorPil`, `Qwen2VLProcessor`. PreparedImage.pixels is [patches, 3, side, side] in
the tower's order (see `to_patches`), layout is (rows, columns) of patches. The reference repeats every patch for the
frames of a video's time step; here the model does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mlxvlm.errors import ContextLengthError, ImageError, InputError, ModelError
from mlxvlm.messages import ImageOptions, Message, Part
from mlxvlm.processors.base import place_images
from mlxvlm.processors.family import FamilyProcessor, Layout, Pixels
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Frames,
    Normalizer,
    resample_of,
    resize,
)

MAX_PIXELS = 10**12  # that a request may name; what is really made is bounded by the context
MAX_ASPECT_RATIO = 200  # long side / short side; the reference refuses more
IMAGE = "<|image_pad|>"
WRAPPED_IMAGE = f"<|vision_start|>{IMAGE}<|vision_end|>"  # what the template writes for a picture


@dataclass(frozen=True)
class ImageSettings:
    """preprocessor_config.json with the reference's defaults; patch in pixels, merge in patches a side."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch: int = 14
    merge: int = 2
    do_resize: bool = True
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch", "merge"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"the image processor's {name} is {value!r}, no positive number")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageSettings:
        return cls(
            min_pixels=_pixel_limit(config, "min_pixels", "shortest_edge", cls.min_pixels),
            max_pixels=_pixel_limit(config, "max_pixels", "longest_edge", cls.max_pixels),
            patch=config.get("patch_size", cls.patch),
            merge=config.get("merge_size", cls.merge),
            do_resize=config.get("do_resize", True),
            resample=resample_of(config, cls.resample),
        )

    def bounded(self, options: ImageOptions) -> ImageSettings:
        """With a request's own bounds. Raises InputError for bounds that can't be."""
        bounds = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
        given: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
        for name, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_PIXELS:
                raise InputError(f"{name} is {value!r:.20}; it is a number of pixels, from 1 to {MAX_PIXELS}")
        changed = replace(self, **given)
        if given and changed.min_pixels > changed.max_pixels:
            raise InputError(
                f"min_pixels {changed.min_pixels} is more than max_pixels {changed.max_pixels}: give both, in order"
            )
        return changed

    @property
    def step(self) -> int:
        """Both sides of a picture are multiples of this many pixels: the side of one placeholder's square."""
        return self.patch * self.merge


def _pixel_limit(config: Mapping[str, Any], name: str, edge: str, default: int) -> int:
    """A count of pixels from any age of config; transformers 5 writes it as an "edge" of `size`."""
    size = config.get("size") or {}
    candidates = (config.get(name), size.get(edge), size.get(name), default)
    return next(value for value in candidates if value is not None)


def fitted_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) in whole steps, nearly of the same shape, and of min_pixels to max_pixels in all.

    Source: `smart_resize`, its rounding of halves to even included. Raises ImageError for an extreme shape.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"an image of {width} x {height} pixels is too long: one side may be {MAX_ASPECT_RATIO} times the other"
        )
    step = settings.step
    fitted = round(height / step) * step, round(width / step) * step
    area = fitted[0] * fitted[1]
    if area > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        return max(step, math.floor(height / shrink / step) * step), max(step, math.floor(width / shrink / step) * step)
    if area < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        return math.ceil(height * grow / step) * step, math.ceil(width * grow / step) * step
    return fitted


def to_patches(image: Image.Image, patch: int, merge: int) -> Frames:
    """RGB -> [P, 3, patch, patch], block by block of merge x merge patches, so that a block's stand together."""
    rows, columns = image.height // (patch * merge), image.width // (patch * merge)
    blocks = np.asarray(image).reshape(rows, merge, patch, columns, merge, patch, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows, columns, merge, merge, 3, patch, patch]
    return np.ascontiguousarray(patches).reshape(-1, 3, patch, patch)


class Qwen2VLProcessor(FamilyProcessor[ImageSettings]):
    """Messages to Prompt."""

    def __init__(self, files: ProcessorFiles) -> None:
        config = files.image_processor
        settings = ImageSettings.from_config(config)
        super().__init__(files, IMAGE, settings, Normalizer.from_config(config, CLIP_MEAN, CLIP_STD))
        _check_tower(files.config.get("vision_config") or {}, settings)

    def find_image_token(self, files: ProcessorFiles) -> int:
        found = files.tokenizer.token_id(IMAGE)
        declared = files.config.get("image_token_id", found)
        if found is None or found != declared:
            raise ModelError(f"the tokenizer's id of {IMAGE} is {found}, config.json says {declared}")
        return found

    @property
    def written_marker(self) -> str:
        return WRAPPED_IMAGE

    def adapted(self, options: ImageOptions) -> ImageSettings:
        return self.settings.bounded(options)

    def place(self, message: Message) -> Sequence[Part]:
        # A marker typed with its brackets stands for the whole of what the template writes.
        return place_images(message, WRAPPED_IMAGE if WRAPPED_IMAGE in message.text else IMAGE)

    def to_frames(self, image: Image.Image, settings: ImageSettings) -> tuple[Frames, Layout]:
        """RGB -> [patches, 3, side, side], (rows, columns) of patches."""
        if settings.do_resize:
            size = fitted_size(image.height, image.width, settings)
            self._check_room(size, settings)
            image = resize(image, *size, settings.resample)
        if image.height % settings.step or image.width % settings.step:
            raise ImageError(
                f"the image is {image.width} x {image.height} pixels, and this model, which is set to resize nothing, "
                f"takes multiples of {settings.step}"
            )
        frames = to_patches(image, settings.patch, settings.merge)
        return frames, (image.height // settings.patch, image.width // settings.patch)

    def _check_room(self, size: tuple[int, int], settings: ImageSettings) -> None:
        """Before a picture is blown up: requests may ask for any size."""
        count = size[0] * size[1] // settings.step**2
        if count >= self.max_context:
            raise ContextLengthError(
                f"an image resized to {size[1]} x {size[0]} pixels takes {count} tokens, but the model's context is "
                f"{self.max_context}: lower min_pixels or max_pixels"
            )

    def num_placeholders(self, pixels: Pixels, layout: Layout) -> int:
        return len(pixels) // self.settings.merge**2


def _check_tower(vision: Mapping[str, Any], settings: ImageSettings) -> None:
    """Patches must be those of the tower, or the model would fail on the first picture."""
    tower = (vision.get("patch_size", ImageSettings.patch), vision.get("spatial_merge_size", ImageSettings.merge))
    if tower != (settings.patch, settings.merge):
        raise ModelError(
            f"the image processor cuts patches of {settings.patch} pixels and merges {settings.merge} a side, "
            f"but the vision tower has {tower[0]} and {tower[1]}"
        )


def build(files: ProcessorFiles) -> Qwen2VLProcessor:
    """The entry that families.py points to."""
    return Qwen2VLProcessor(files)
