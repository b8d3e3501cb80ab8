"""Every format and mode: orientation, transparency, 16 bits, animations."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxvlm.errors import ImageError
from mlxvlm.processors.images import load_image
from tests.processors.pictures import chunk, encode, noise, on_white, pixels_of, png, upright

RGB = Image.fromarray(noise(9, 6, 3))
RGBA = Image.fromarray(noise(9, 6, 4))
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "WEBP": {"lossless": True, "exact": True},
    "PPM": {},
    "JPEG2000": {},
    "ICO": {"sizes": [RGB.size]},
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_rgb(name: str) -> None:
    data = encode(RGB, name.split()[0], **LOSSLESS[name])
    assert np.array_equal(pixels_of(load_image(data)), np.asarray(RGB))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy(format: str) -> None:
    smooth = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    loaded = pixels_of(load_image(encode(smooth, format, quality=90)))
    assert np.abs(loaded.astype(int) - np.asarray(smooth)).mean() < 4


@pytest.mark.parametrize("name", ["PNG", "TIFF", "TIFF lzw", "WEBP"])
def test_rgba_on_white(name: str) -> None:
    data = encode(RGBA, name.split()[0], **LOSSLESS[name])
    assert np.array_equal(pixels_of(load_image(data)), on_white(RGBA))


def test_transparent_pixels_are_white_whatever_their_colour() -> None:
    clear = noise(4, 4, 4)
    clear[..., 3] = 0
    assert np.all(pixels_of(load_image(encode(Image.fromarray(clear), "PNG"))) == 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV"]
)
def test_pillow_modes(mode: str) -> None:
    if mode in ("La", "PA"):
        image = RGBA.convert("LA").convert(mode) if mode == "La" else RGBA.convert("P").convert("PA")
    else:
        image = (RGBA if mode in ("LA", "RGBA", "RGBa") else RGB).convert(mode)
    plain = image.convert("LA") if mode == "La" else image
    expected = on_white(plain.convert("RGBA")) if "A" in mode.upper() else np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels_of(load_image(image)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_png_modes(mode: str) -> None:
    image = (RGBA if mode == "LA" else RGB).convert(mode)
    expected = on_white(image.convert("RGBA"))
    assert np.array_equal(pixels_of(load_image(encode(image, "PNG"))), expected)


PER_ENTRY = bytes([0, 255, 128, 7])


@pytest.mark.parametrize(("format", "transparency"), [("PNG", 1), ("PNG", PER_ENTRY), ("GIF", 1)])
def test_palette_transparency(format: str, transparency: int | bytes) -> None:
    indices = noise(8, 8) % 4
    palette = noise(4, 3, seed=1)
    image = Image.fromarray(indices).convert("L")
    image.putpalette(palette.tobytes())
    loaded = pixels_of(load_image(encode(image, format, transparency=transparency)))
    alpha = [255 * (entry != 1) for entry in range(4)] if isinstance(transparency, int) else list(transparency)
    rgba = np.concatenate([palette, np.array(alpha, np.uint8)[:, None]], axis=1)
    assert np.array_equal(loaded, on_white(Image.fromarray(rgba[indices])))


def test_one_transparent_colour() -> None:
    pixels = noise(5, 5, 3)
    data = encode(Image.fromarray(pixels), "PNG", transparency=tuple(int(v) for v in pixels[2, 3]))
    expected = pixels.copy()
    expected[2, 3] = 255
    assert np.array_equal(pixels_of(load_image(data)), expected)
    grey = noise(5, 5)
    data = encode(Image.fromarray(grey), "PNG", transparency=int(grey[1, 1]))
    expected = np.where(grey == grey[1, 1], 255, grey).astype(np.uint8)
    assert np.array_equal(pixels_of(load_image(data))[..., 0], expected)


def test_sixteen_bit_grey_keeps_the_high_byte() -> None:
    levels = np.random.default_rng(0).integers(0, 1 << 16, (6, 7), dtype=np.uint16)
    for data in (encode(Image.fromarray(levels), "PNG"), encode(Image.fromarray(levels), "TIFF")):
        assert np.array_equal(pixels_of(load_image(data)), np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, 2))


def test_wide_grey_pillow_images() -> None:
    levels = np.array([[0, 255, 256, 65535]])
    for mode in ("I;16", "I;16B", "I"):
        image = Image.new(mode, (4, 1))
        for x, level in enumerate(levels[0]):
            image.putpixel((x, 0), int(level))
        assert pixels_of(load_image(image))[0, :, 0].tolist() == [0, 0, 1, 255], mode
    dark = Image.fromarray(np.full((1, 2), 200, np.uint16))
    assert pixels_of(load_image(dark))[0, 0].tolist() == [0, 0, 0]
    small = Image.new("I", (2, 1), 200)  # 8-bit values in a wide image
    assert pixels_of(load_image(small))[0, 0].tolist() == [200, 200, 200]


@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bit_grey_with_a_transparent_level(orientation: int) -> None:
    levels = np.array([[1000, 1001, 0], [65535, 999, 1000]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(levels), "PNG", transparency=1000, exif=exif)
    expected = upright(np.array([[255, 3, 0], [255, 3, 255]], np.uint8), orientation)
    assert pixels_of(load_image(data))[..., 0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 0.5, 254.9], [0, 0, 254]),
        ([-1.0, 0.5, 300.0], [0, 0, 255]),
        ([-0.5, 0.5, 1.0], [0, 0, 1]),
        ([float("nan"), 1.0, 0.0], [0, 255, 0]),
        ([float("inf"), 2.0, float("-inf")], [255, 2, 0]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_float_grey(levels: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([levels], np.float32))
    assert image.mode == "F"
    for source in (image, encode(image, "TIFF")):
        assert pixels_of(load_image(source))[0, :, 1].tolist() == expected


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    levels = np.random.default_rng(0).integers(0, 1 << 16, (3, 4, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    assert np.array_equal(pixels_of(load_image(png(4, 3, 16, 2, rows))), (levels >> 8).astype(np.uint8))


def test_cmyk_jpeg() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(pixels_of(load_image(data)).astype(int) - [255, 0, 0]).max() < 12


def test_grey_jpeg() -> None:
    data = encode(Image.new("L", (16, 16), 77), "JPEG", quality=95)
    assert np.abs(pixels_of(load_image(data)).astype(int) - 77).max() < 3


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(io.BytesIO(data)) as check:
        assert getattr(check, "n_frames", 1) == 3
    assert pixels_of(load_image(data))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    expected = upright(np.asarray(RGB), orientation)
    for format in ("PNG", "TIFF", "WEBP"):
        data = encode(RGB, format, orientation=orientation, **LOSSLESS[format])
        file = tmp_path / f"pic.{format.lower()}"
        file.write_bytes(data)
        with Image.open(file) as opened:
            for source in (data, file, opened):
                assert np.array_equal(pixels_of(load_image(source)), expected), (format, type(source))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_jpeg(orientation: int) -> None:
    stored = pixels_of(load_image(encode(RGB, "JPEG")))
    loaded = pixels_of(load_image(encode(RGB, "JPEG", orientation=orientation)))
    assert np.array_equal(loaded, upright(stored, orientation))


@pytest.mark.parametrize("orientation", [6, 7])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_orientation_in_every_mode(mode: str, orientation: int) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 1 << 16, (5, 3), dtype=np.uint16))
    else:
        image = RGBA.convert(mode)
    plain = pixels_of(load_image(encode(image, "PNG")))
    turned = pixels_of(load_image(encode(image, "PNG", orientation=orientation)))
    assert np.array_equal(turned, upright(plain, orientation))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientation_that_means_nothing(orientation: int) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"
    assert np.array_equal(pixels_of(load_image(encode(RGB, "PNG", exif=exif))), np.asarray(RGB))


def test_exif_behind_the_pixels() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(RGB))
    exif = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, 3, 0) + b"\0\0\0\0"
    data = png(6, 9, 8, 2, rows)
    end = data.index(b"IEND") - 4
    loaded = load_image(data[:end] + chunk(b"eXIf", exif) + data[end:])
    assert np.array_equal(pixels_of(loaded), upright(np.asarray(RGB), 3))


@pytest.mark.parametrize("format", ["EPS", "PCX", "SGI", "TGA"])
def test_formats_that_nobody_sends_are_refused(format: str) -> None:
    with pytest.raises(ImageError, match="not an image in a format that can be read"):
        load_image(encode(RGB, format))
