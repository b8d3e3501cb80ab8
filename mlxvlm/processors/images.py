"""A picture from anywhere -> one RGB Pillow image. Knows sources, formats and limits; no model.

One policy for every source: EXIF orientation is honoured, transparency is composited on white, 16-bit grey keeps its
high byte, floats up to 1 are scaled to 255, an animation gives its first frame.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlxvlm.errors import ImageError
from mlxvlm.processors.sources import (
    DEFAULT_LIMITS,
    MAX_PATH_CHARS,
    ImageLimits,
    decode_base64,
    decode_data_url,
    fetch,
    file_url_path,
    reason,
    short,
    too_large,
)

# Sizes are checked here against ImageLimits, from the header alone; Pillow's own warning would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Odd metadata in a picture that can be read all the same is no news for a user.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,  # a picture whose file was closed
    RuntimeError,
    struct.error,
    zlib.error,
)
# Pillow reads many more, among them EPS, which it gives to Ghostscript to run.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "ICO")
_ORIENTATION = 0x0112  # the EXIF tag
_HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"heim", b"heis")


def load_image(source: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An RGB image from a path, URL, data: URL, base64 text, bytes, Pillow image or uint8 array [H, W(, C)].

    Raises ImageError with one line that names the source.
    """
    if isinstance(source, Image.Image):
        with _decoding("the image", limits):  # it may be a file that is not read yet
            _check_pixels(source, "the image", limits)
            return _to_rgb(source, "the image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source), "the image data", limits)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _from_path(Path(path), path, limits)
    if isinstance(source, str):
        return _from_text(source, limits)
    raise ImageError(f"an image can't be a {type(source).__name__}: give a path, URL, base64 text, bytes or picture")


def decode_image(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An RGB image from the bytes of a file; `name` stands for it in errors."""
    if not data:
        raise ImageError(f"{name} is empty")
    if len(data) > limits.max_bytes:
        raise too_large(name, limits)
    formats = ("HEIF", *_FORMATS) if _register_heic(data, name) else _FORMATS
    with _decoding(name, limits), Image.open(io.BytesIO(data), formats=formats) as image:
        _check_pixels(image, name, limits)
        image.load()
        return _to_rgb(image, name)


def _check_pixels(image: Image.Image, name: str, limits: ImageLimits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise ImageError(
            f"{name} is {image.width} x {image.height} pixels, more than the limit of {limits.max_pixels:,} in all; "
            "make it smaller first"
        )


@contextmanager
def _decoding(name: str, limits: ImageLimits) -> Iterator[None]:
    """What Pillow raises, as ImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a format that can be read (PNG, JPEG, WebP, GIF ...)") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} declares more pixels than the limit of {limits.max_pixels:,}") from error
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} is damaged or truncated: {reason(error)}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """EXIF orientation, then transparency on white, then RGB (transformers `convert_to_rgb` for Pillow images)."""
    if not image.width or not image.height:
        raise ImageError(f"{name} has no pixels")
    # Read before exif_transpose, which drops what it does not know.
    level = image.info.get("transparency")
    transparent = "A" in image.getbands() or "a" in image.getbands() or level is not None
    if image.getexif().get(_ORIENTATION, 1) != 1:  # else it would be copied for nothing
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _from_wide_grey(image, level)
    if image.mode == "F":
        return _from_float_grey(image)
    if transparent:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        background = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_wide_grey(image: Image.Image, level: Any) -> Image.Image:
    """16- and 32-bit grey, white where it has the transparent `level`.

    Pillow's own conversion clips all above 255 to white, which leaves a blank page.
    """
    levels = np.asarray(image).astype(np.int64)
    is_clear = levels == level if isinstance(level, int) else np.zeros(levels.shape, bool)
    if image.mode.startswith("I;16") or levels.max(initial=0) > 255:
        levels >>= 8
    # The level of a PNG is compared in full depth: its neighbours share the high byte.
    levels[is_clear] = 255
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB")


def _from_float_grey(image: Image.Image) -> Image.Image:
    """Floats of 0 to 1 or of 0 to 255, which only their values tell apart."""
    levels = np.nan_to_num(np.asarray(image).astype(np.float64))
    if levels.min() >= 0 and levels.max() <= 1:
        levels = (levels * 255).round()
    # Above 1 the fraction is dropped, as Pillow does.
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB")


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise ImageError(
            f"an image array must be uint8 of shape [height, width] or [height, width, 1, 3 or 4], "
            f"not {array.dtype} {list(array.shape)}"
        )
    if channels == 1:
        array = array.reshape(array.shape[:2])
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "the image")


def _from_text(source: str, limits: ImageLimits) -> Image.Image:
    if not source.strip():
        raise ImageError("the image's source is an empty text")
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return decode_image(fetch(source, limits), short(source), limits)
    if scheme.startswith("data:"):
        return decode_image(decode_data_url(source, limits), "the data: URL", limits)
    if scheme.startswith("file://"):
        return _from_path(file_url_path(source), source, limits)
    path = Path(source)
    try:
        path = path.expanduser()
        is_file = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a NUL inside, nobody's home
        is_file = False
    if is_file:
        return _from_path(path, source, limits)
    data = decode_base64(source, limits)
    if data is None:
        if len(source) > MAX_PATH_CHARS:
            raise ImageError(f"the base64 text is not valid base64 (and no file has that name): {short(source, 60)}")
        raise ImageError(f"no such image file: {short(source)}")
    # "photos/cat" is base64 as well as a path.
    name = "the base64 text" if len(source) > MAX_PATH_CHARS else f"{short(source)} (no such file, so read as base64)"
    return decode_image(data, name, limits)


def _from_path(path: Path, name: str, limits: ImageLimits) -> Image.Image:
    name = short(name)
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a folder, not an image")
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)  # a device or a pipe tells no size, and may have no end
    except FileNotFoundError as error:
        raise ImageError(f"no such image file: {name}") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} can't be read: {reason(error)}") from error
    return decode_image(data, name, limits)


def _register_heic(data: bytes, name: str) -> bool:
    """Whether these are iPhone pictures; needs the optional `pi-heif` package, else an error names the remedy."""
    # Brands: [8:12] the file's own, from 16 on those it is compatible with; AVIF shares "mif1".
    if data[4:8] != b"ftyp" or data[8:12] not in _HEIC_BRANDS or b"avif" in data[16:48]:
        return False
    try:
        from pi_heif import register_heif_opener
    except ImportError as error:
        raise ImageError(f"{name} is a HEIC picture: pip install 'mlxvlm[heic]', or save it as JPEG") from error
    register_heif_opener()
    return True
