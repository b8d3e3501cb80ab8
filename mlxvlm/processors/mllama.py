"""Llama 3.2 Vision: messages -> Prompt. Pictures are fitted into the canvas of tiles that changes them least.

Source: transformers `MllamaImageProcessorPil`, `MllamaProcessor`. PreparedImage.pixels is [max tiles, 3, side, side],
tiles row by row, those that the picture does not fill exactly 0; layout is (rows, columns); span is one token: the
decoder looks at pictures through cross-attention, nothing is expanded.
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

from mlxvlm.errors import ModelError
from mlxvlm.messages import ImagePart, Message, Part
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
    RESCALE_FACTOR,
    Normalizer,
    floats,
    positive,
    resample_of,
    resize,
    split_tiles,
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


class MllamaProcessor:
    """Messages to Prompt. Thread-safe: holds settings only."""

    def __init__(self, files: ProcessorFiles) -> None:
        config = files.image_processor
        self.tokenizer = files.tokenizer
        self.template = files.template()
        self.settings = ImageSettings.from_config(config)
        _check_tower(self.settings, files.config.get("vision_config") or {})
        self.normalize = Normalizer(
            mean=floats(config.get("image_mean", 0.5)),
            std=floats(config.get("image_std", 0.5)),
            rescale_factor=config.get("rescale_factor", RESCALE_FACTOR),
            do_rescale=config.get("do_rescale", True),
            do_normalize=config.get("do_normalize", True),
        )
        self.image_token_id = self.tokenizer.add_special(IMAGE)
        self._settings_key = repr((self.settings, self.normalize.key)).encode()

    def __call__(self, messages: Sequence[Message], template: Mapping[str, Any] | None = None) -> Prompt:
        """Raises InputError, ImageError or TemplateError."""
        check_messages(messages)
        turns = [(message, place_images(message, IMAGE)) for message in messages]
        make_turn = turn_maker(self.template, IMAGE, _turn)
        rendered = self.template.render([make_turn(message, parts) for message, parts in turns], template)
        sources = [part.source for _, parts in turns for part in parts if isinstance(part, ImagePart)]
        # One token a picture: the text stays as it is, only the counts are compared.
        expand_placeholders(rendered, IMAGE, [IMAGE] * len(sources))
        images = [self.prepare_image(load_image(source)) for source in sources]
        token_ids = self.tokenizer.encode_prompt(rendered)
        spans = placeholder_spans(token_ids, self.image_token_id, [1] * len(images))
        prepared = [PreparedImage(*image[:2], span, image[2]) for image, span in zip(images, spans, strict=True)]
        return Prompt(tuple(token_ids), tuple(prepared))

    def prepare_image(self, image: Image.Image) -> tuple[NDArray[np.float32], Arrangement, bytes]:
        """RGB -> pixels [max tiles, 3, side, side], (rows, columns), digest."""
        tile, max_tiles = self.settings.tile, self.settings.max_tiles
        digest = hashlib.sha256(self._settings_key + repr(image.size).encode() + image.tobytes()).digest()
        rows, columns = best_arrangement(image.height, image.width, tile, max_tiles)
        canvas = Image.new("RGB", (columns * tile, rows * tile))
        size = fitted_size(image.height, image.width, (canvas.height, canvas.width), tile)
        # Padded before it is normalised: the margin is a normalised black, which is not 0.
        canvas.paste(resize(image, *size, self.settings.resample))
        pixels = np.zeros((max_tiles, 3, tile, tile), np.float32)
        pixels[: rows * columns] = split_tiles(self.normalize(canvas), rows, columns)
        return pixels, (rows, columns), digest


def _turn(message: Message, parts: Sequence[Part]) -> dict[str, Any]:
    """Content as parts only where there is a picture.

    Of a system turn, a tool's answer and a first turn beside tools the template prints whatever it is given, so a list
    would put its own source text into the prompt.
    """
    if not message.images:
        return {"role": message.role, "content": message.text}
    content = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in parts
    ]
    return {"role": message.role, "content": content}


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
