"""Pixels to pixels: resize, rescale, normalise. Knows no family and no file.

Source: transformers `image_transforms.py` and the PIL backend of `image_processing_backends.py`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESCALE_FACTOR = 0.00392156862745098  # 1/255 as the checkpoints' configs spell it
# The training data's statistics (openai/CLIP `clip.py`).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Values that are looked up at once. NumPy makes 8 bytes of index for each, which then stay in a core's cache and below
# the 128 kB from which malloc asks the system for fresh pages each time.
CACHED = 1 << 13

Frames = NDArray[np.uint8]  # [N, 3, H, W], a picture's bytes cut as its tower takes them


def resize(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """A resized copy; `resample` is Pillow's number (1 Lanczos, 2 bilinear, 3 bicubic)."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), resample=Image.Resampling(resample))


def resize_both(
    image: Image.Image, one: tuple[int, int], other: tuple[int, int], resample: int
) -> tuple[Image.Image, Image.Image]:
    """A picture in two sizes (height, width), side by side in two threads: Pillow lets others run while it resizes."""
    if image.size in (one[::-1], other[::-1]):
        return resize(image, *one, resample), resize(image, *other, resample)  # there is but one to make
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(resize, image, *other, resample)
        return resize(image, *one, resample), beside.result()


@dataclass(frozen=True)
class Normalizer:
    """uint8 -> float32 (v * rescale - mean) / std for each channel. Raises ValueError for settings that can't be."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = RESCALE_FACTOR
    do_rescale: bool = True
    do_normalize: bool = True
    key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(_is_number(value) for value in values):
                raise ValueError(f"image_{name} is {values!r}, not 3 numbers")
        if not all(self.std):
            raise ValueError(f"image_std is {self.std!r}, and pixels are divided by it")
        if self.do_rescale and not _is_number(self.rescale_factor):
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}, not a number")
        settings = (self.mean, self.std, self.rescale_factor, self.do_rescale, self.do_normalize)
        object.__setattr__(self, "key", repr(settings))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], mean: Any = 0.5, std: Any = 0.5) -> Self:
        """preprocessor_config.json, with a family's mean and std where it has none."""
        return cls(
            mean=floats(config.get("image_mean", mean)),
            std=floats(config.get("image_std", std)),
            rescale_factor=config.get("rescale_factor", RESCALE_FACTOR),
            do_rescale=config.get("do_rescale", True),
            do_normalize=config.get("do_normalize", True),
        )

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """[C, 256]: a byte has 256 values, so the reference's arithmetic runs once a value instead of once a pixel."""
        levels = np.arange(256, dtype=np.float64) * (self.rescale_factor if self.do_rescale else 1.0)
        table: NDArray[np.float32] = np.repeat(levels.astype(np.float32)[None], len(self.mean), axis=0)
        if self.do_normalize:
            table -= np.array(self.mean, np.float32)[:, None]
            table /= np.array(self.std, np.float32)[:, None]
        return table

    def __call__(self, frames: Frames, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """[N, C, H, W], into `out` (contiguous, of the same shape) if there is one. Each value is written once."""
        pixels: NDArray[np.float32] = np.empty(frames.shape, np.float32) if out is None else out
        step = CACHED // frames[0].size
        if not step:
            for planes, found, levels in zip(frames.swapaxes(0, 1), pixels.swapaxes(0, 1), self._table, strict=True):
                for plane, values in zip(planes, found, strict=True):
                    _look_up(levels, plane.reshape(-1), values.reshape(-1))
            return pixels
        table = self._table.reshape(-1)
        channels = np.arange(0, len(table), 256, dtype=np.uint16)[:, None, None]
        for start in range(0, len(frames), step):
            some = slice(start, start + step)
            _look_up(table, (frames[some] + channels).reshape(-1), pixels[some].reshape(-1))
        return pixels


def _look_up(table: NDArray[np.float32], levels: NDArray[Any], out: NDArray[np.float32]) -> None:
    for start in range(0, len(levels), CACHED):
        some = slice(start, start + CACHED)
        # No index is out of range; with "raise" NumPy writes to a buffer of its own first.
        np.take(table, levels[some], out=out[some], mode="clip")


@dataclass(frozen=True)
class BFloat16Normalizer(Normalizer):
    """A Normalizer whose every step rounds to bfloat16, for models that were trained on such pixels."""

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        levels = np.arange(256, dtype=np.float32) * np.float32(self.rescale_factor)
        mean, std = (round_to_bfloat16(np.array(values, np.float32))[:, None] for values in (self.mean, self.std))
        return round_to_bfloat16(round_to_bfloat16(round_to_bfloat16(levels) - mean) / std)


def cut(image: Image.Image, rows: int, columns: int, out: Frames | None = None) -> Frames:
    """An RGB image as rows * columns tiles, row by row: [tiles, 3, side, side], into `out` if there is one.

    Bytes are moved, not the floats that they become: a quarter of the memory.
    """
    height, width = image.height // rows, image.width // columns
    frames: Frames = np.empty((rows * columns, 3, height, width), np.uint8) if out is None else out
    tiles = frames.reshape(rows, columns, 3, height, width)
    for channel, plane in enumerate(image.split()):  # whole rows of a plane are moved, not every third byte
        tiles[:, :, channel] = np.asarray(plane).reshape(rows, height, columns, width).swapaxes(1, 2)
    return frames


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers with 8 significant bits, ties to even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def pad_bottom_right(image: Image.Image, height: int, width: int) -> Image.Image:
    """An RGB image on a black canvas, at its top left."""
    if image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image)
    return canvas


def floats(values: Any, count: int = 3) -> tuple[float, ...]:
    """A per-channel setting that may be given as one number; ValueError for what holds no numbers."""
    channels = values if isinstance(values, (list, tuple)) else (values,) * count
    if not all(_is_number(value) for value in channels):
        raise ValueError(f"{values!r} is given for the colour channels, not {count} numbers")
    return tuple(float(value) for value in channels)


def positive(value: Any, name: str) -> int:
    """A side or a count from a config; ValueError for one that is no whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"the image processor's {name} is {value!r}, no positive whole number")
    return value


def resample_of(config: Mapping[str, Any], default: int) -> int:
    """Pillow's number of the filter that a config names, as an int; ValueError for one that Pillow has not."""
    value = config.get("resample", default)
    # A float or a bool equals a number, but digests would tell them apart.
    if not isinstance(value, int) or isinstance(value, bool) or value not in set(Image.Resampling):
        raise ValueError(f"the image processor's resample is {value!r}, no number of a Pillow filter")
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
