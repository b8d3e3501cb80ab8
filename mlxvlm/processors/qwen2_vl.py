"""Qwen2-VL: messages -> Prompt. A picture keeps its shape and becomes as many patches as its size asks for.

Source: transformers `Qwen2VLImageProcessorPil`, `Qwen2VLProcessor`. PreparedImage.pixels is [patches, 3, side, side] in
the tower's order (see `to_patches`), layout is (rows, columns) of patches. The reference repeats every patch for the
frames of a video's time step; here the model does that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxvlm.errors import ImageError, ModelError
from mlxvlm.messages import ImagePart, Message
from mlxvlm.processors.base import (
    PreparedImage,
    Prompt,
    check_messages,
    expand_placeholders,
    place_images,
    placeholder_spans,
    turn_maker,
)
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.images import load_image
from mlxvlm.processors.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    RESCALE_FACTOR,
    Normalizer,
    floats,
    resample_of,
    resize,
)

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


def to_patches(pixels: NDArray[np.float32], patch: int, merge: int) -> NDArray[np.float32]:
    """[C, H, W] -> [P, C, patch, patch], block by block of merge x merge patches, so that a block's stand together."""
    channels, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    blocks = pixels.reshape(channels, rows, merge, patch, columns, merge, patch)
    patches = blocks.transpose(1, 4, 2, 5, 0, 3, 6)  # [rows, columns, merge, merge, C, patch, patch]
    return np.ascontiguousarray(patches).reshape(-1, channels, patch, patch)


class Qwen2VLProcessor:
    """Messages to Prompt. Thread-safe: holds settings only."""

    def __init__(self, files: ProcessorFiles) -> None:
        config = files.image_processor
        self.tokenizer = files.tokenizer
        self.template = files.template()
        self.settings = ImageSettings.from_config(config)
        self.normalize = Normalizer(
            mean=floats(config.get("image_mean", CLIP_MEAN)),
            std=floats(config.get("image_std", CLIP_STD)),
            rescale_factor=config.get("rescale_factor", RESCALE_FACTOR),
            do_rescale=config.get("do_rescale", True),
            do_normalize=config.get("do_normalize", True),
        )
        self.image_token_id = _image_token_id(files)
        _check_tower(files.config.get("vision_config") or {}, self.settings)
        self._settings_key = repr((self.settings, self.normalize.key)).encode()

    def __call__(self, messages: Sequence[Message], template: Mapping[str, Any] | None = None) -> Prompt:
        """Raises InputError, ImageError or TemplateError."""
        check_messages(messages)
        # A marker typed with its brackets stands for the whole of what the template writes.
        turns = [
            (message, place_images(message, WRAPPED_IMAGE if WRAPPED_IMAGE in message.text else IMAGE))
            for message in messages
        ]
        make_turn = turn_maker(self.template, WRAPPED_IMAGE)
        rendered = self.template.render([make_turn(message, parts) for message, parts in turns], template)
        sources = [part.source for _, parts in turns for part in parts if isinstance(part, ImagePart)]
        images = [self.prepare_image(load_image(source)) for source in sources]
        counts = [len(pixels) // self.settings.merge**2 for pixels, _, _ in images]
        expanded = expand_placeholders(rendered, IMAGE, [IMAGE * count for count in counts])
        token_ids = self.tokenizer.encode_prompt(expanded)
        spans = placeholder_spans(token_ids, self.image_token_id, counts)
        prepared = [PreparedImage(*image[:2], span, image[2]) for image, span in zip(images, spans, strict=True)]
        return Prompt(tuple(token_ids), tuple(prepared))

    def prepare_image(self, image: Image.Image) -> tuple[NDArray[np.float32], tuple[int, int], bytes]:
        """RGB -> pixels [patches, 3, side, side], (rows, columns) of patches, digest."""
        settings = self.settings
        digest = hashlib.sha256(self._settings_key + repr(image.size).encode() + image.tobytes()).digest()
        if settings.do_resize:
            image = resize(image, *fitted_size(image.height, image.width, settings), settings.resample)
        if image.height % settings.step or image.width % settings.step:
            raise ImageError(
                f"the image is {image.width} x {image.height} pixels, and this model, which is set to resize nothing, "
                f"takes multiples of {settings.step}"
            )
        pixels = to_patches(self.normalize(image), settings.patch, settings.merge)
        return pixels, (image.height // settings.patch, image.width // settings.patch), digest


def _image_token_id(files: ProcessorFiles) -> int:
    """The placeholder's id, on which tokenizer and config must agree: the model looks for it in the prompt."""
    found = files.tokenizer.token_id(IMAGE)
    declared = files.config.get("image_token_id", found)
    if found is None or found != declared:
        raise ModelError(f"the tokenizer's id of {IMAGE} is {found}, config.json says {declared}")
    return found


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
