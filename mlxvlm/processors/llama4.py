"""Llama 4: messages -> Prompt. Pictures are fitted onto a canvas of square tiles, then a view of the whole follows.

Source: transformers `Llama4ImageProcessor`, `Llama4Processor`. PreparedImage.pixels is [tiles, 3, side, side] (tiles
row by row, the view of the whole last where there is more than one), layout is (rows, columns).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxvlm.errors import ModelError
from mlxvlm.messages import ImagePart, Message, Part
from mlxvlm.processors.base import (
    PreparedImage,
    Prompt,
    check_messages,
    expand_placeholders,
    place_images,
    placeholder_spans,
    turn_of_text,
)
from mlxvlm.processors.files import ProcessorFiles
from mlxvlm.processors.images import load_image
from mlxvlm.processors.transforms import (
    RESCALE_FACTOR,
    BFloat16Normalizer,
    Normalizer,
    floats,
    pad_bottom_right,
    positive,
    resample_of,
    resize,
    split_tiles,
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


class Llama4Processor:
    """Messages to Prompt. Thread-safe: holds settings only."""

    def __init__(self, files: ProcessorFiles) -> None:
        self.tokenizer = files.tokenizer
        self.template = files.template()
        self.settings = ImageSettings.from_config(files.image_processor)
        self.normalize = _normalizer(files.image_processor)
        self.image_token_id = _image_token_id(files)
        self.tokens_per_tile = _tokens_per_tile(files, self.settings.tile)
        self._settings_key = repr((self.settings, self.normalize.key)).encode()

    def __call__(self, messages: Sequence[Message], template: Mapping[str, Any] | None = None) -> Prompt:
        """Raises InputError, ImageError or TemplateError."""
        check_messages(messages)
        turns = [(message, place_images(message, IMAGE)) for message in messages]
        rendered = self.template.render([_turn(message, parts) for message, parts in turns], template)
        sources = [part.source for _, parts in turns for part in parts if isinstance(part, ImagePart)]
        images = [self.prepare_image(load_image(source)) for source in sources]
        expansions = [self._expansion(*layout) for _, layout, _ in images]
        token_ids = self.tokenizer.encode_prompt(expand_placeholders(rendered, IMAGE, expansions))
        counts = [len(pixels) * self.tokens_per_tile for pixels, _, _ in images]
        spans = placeholder_spans(token_ids, self.image_token_id, counts)
        prepared = [PreparedImage(*image[:2], span, image[2]) for image, span in zip(images, spans, strict=True)]
        return Prompt(tuple(token_ids), tuple(prepared))

    def prepare_image(self, image: Image.Image) -> tuple[NDArray[np.float32], tuple[int, int], bytes]:
        """RGB -> pixels [tiles, 3, side, side], (rows, columns), digest."""
        settings = self.settings
        digest = hashlib.sha256(self._settings_key + repr(image.size).encode() + image.tobytes()).digest()
        canvas = best_canvas(image.height, image.width, settings)
        size = fitted_size(image.height, image.width, canvas, settings)
        # Padding is black before normalising, not zero after it.
        padded = pad_bottom_right(resize(image, *size, settings.resample), *canvas)
        rows, columns = canvas[0] // settings.tile, canvas[1] // settings.tile
        tiles = split_tiles(self.normalize(padded), rows, columns)
        if rows * columns == 1:
            return tiles, (rows, columns), digest
        # The whole picture, squeezed into one tile without regard to its aspect.
        overview = self.normalize(resize(image, settings.tile, settings.tile, settings.resample))
        return np.concatenate([tiles, overview[None]]), (rows, columns), digest

    def _expansion(self, rows: int, columns: int) -> str:
        """The text that stands for one image. Source: `_prompt_split_image`."""
        tile = PATCH * self.tokens_per_tile
        row = TILE_X.join([tile] * columns) + TILE_Y
        return f"{IMAGE_START}{row * rows if rows * columns > 1 else ''}{IMAGE}{tile}{IMAGE_END}"


def _turn(message: Message, parts: Sequence[Part]) -> dict[str, Any]:
    """Content always as one string, which the template prints as it is.

    Of a list it reads the first part of a system turn only, and in front of tools it prints the list's Python repr.
    """
    turn = turn_of_text(message, parts, IMAGE)
    if message.tool_calls:
        # The template writes arguments as JSON itself.
        calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls]
        turn["tool_calls"] = [{"function": call} for call in calls]
    return turn


def _normalizer(config: Mapping[str, Any]) -> Normalizer:
    rescales, normalizes = config.get("do_rescale", True), config.get("do_normalize", True)
    # The reference goes through bfloat16, as training did, only where it does both.
    kind = BFloat16Normalizer if rescales and normalizes else Normalizer
    return kind(
        mean=floats(config.get("image_mean", 0.5)),
        std=floats(config.get("image_std", 0.5)),
        rescale_factor=config.get("rescale_factor", RESCALE_FACTOR),
        do_rescale=rescales,
        do_normalize=normalizes,
    )


def _image_token_id(files: ProcessorFiles) -> int:
    """The id that features are written over: the model's and the tokenizer's must be the same."""
    for token in (IMAGE, PATCH, IMAGE_START, IMAGE_END, TILE_X, TILE_Y):
        if files.tokenizer.token_id(token) is None:
            raise ModelError(f"the tokenizer has no token {token}")
    found = files.tokenizer.token_id(PATCH)
    assert found is not None
    declared = files.config.get("image_token_index", files.config.get("image_token_id", 200092))
    if declared != found:
        raise ModelError(f"config.json says image_token_index {declared}, but {PATCH} is token {found}")
    return found


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
