"""Small pictures for the tests of this room, and what must come out of them."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
ORIENTATION = 0x0112  # the EXIF tag


def noise(*shape: int, seed: int = 0) -> Pixels:
    """Random bytes: no two orientations or channels of them look alike."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels_of(image: Image.Image) -> Pixels:
    assert image.mode == "RGB"
    return np.asarray(image)


def encode(image: Image.Image, format: str, *, orientation: int = 0, **options: Any) -> bytes:
    if orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def upright(stored: Pixels, orientation: int) -> Pixels:
    """How a viewer shows `stored`; source: the EXIF 2.3 table of the tag Orientation."""
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored[::-1].swapaxes(0, 1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: stored[:, ::-1].swapaxes(0, 1),
    }[orientation]


def on_white(rgba: Image.Image) -> Pixels:
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba))[..., :3]


def png(width: int, height: int, depth: int, color: int, rows: bytes, *, extra: bytes = b"") -> bytes:
    """A PNG by hand: `rows` is the raw image data, each row with its filter byte; `extra` goes before it."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()
