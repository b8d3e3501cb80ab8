"""Damaged files and arbitrary texts: an RGB picture or ImageError with one line, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.errors import ImageError
from mlxvlm.processors.images import ImageLimits, load_image
from tests.processors.pictures import base64_text, encode, noise

# Damaged headers may declare anything; decoding what is declared only costs time here.
LIMITS = ImageLimits(max_bytes=1 << 16, max_pixels=500_000, timeout_s=0.1)
RGB = Image.fromarray(noise(7, 5, 3))
RGBA = Image.fromarray(noise(7, 5, 4))
FILES = {
    "PNG": encode(RGB, "PNG", orientation=6),
    "PNG rgba": encode(RGBA, "PNG"),
    "PNG palette": encode(RGB.quantize(4), "PNG", transparency=2),
    "PNG 1 bit": encode(RGB.convert("1"), "PNG"),
    "JPEG": encode(RGB, "JPEG", orientation=8),
    "JPEG cmyk": encode(RGB.convert("CMYK"), "JPEG"),
    "JPEG progressive": encode(RGB, "JPEG", progressive=True),
    "WEBP": encode(RGB, "WEBP", orientation=3),
    "WEBP lossless": encode(RGBA, "WEBP", lossless=True),
    "GIF": encode(RGB.quantize(8), "GIF", save_all=True, append_images=[RGB.quantize(4)]),
    "BMP": encode(RGB, "BMP"),
    "TIFF": encode(RGB, "TIFF", orientation=5),
    "TIFF lzw": encode(RGB, "TIFF", compression="tiff_lzw"),
    "AVIF": encode(RGB, "AVIF"),
    "JPEG2000": encode(RGB, "JPEG2000"),
    "ICO": encode(RGB, "ICO"),
    "PPM": encode(RGB, "PPM"),
}
# Pillow warns of damage that it can live with.
pytestmark = pytest.mark.filterwarnings("ignore")


def check(source: Any) -> None:
    refusal = ""
    try:
        image = load_image(source, LIMITS)
    except ImageError as error:
        refusal = str(error)
        image = Image.new("RGB", (1, 1))
    assert refusal.isprintable()  # no line breaks either
    assert len(refusal) < 400
    assert image.mode == "RGB"
    assert image.width * image.height <= LIMITS.max_pixels
    image.tobytes()


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_whole(name: str) -> None:
    assert set(load_image(FILES[name], LIMITS).size) == {5, 7}


@given(st.data())
@settings(max_examples=1000, deadline=None)
def test_damaged_files(data: st.DataObject) -> None:
    damaged = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    where = st.one_of(st.integers(0, min(len(damaged), 64) - 1), st.integers(0, len(damaged) - 1))
    for place, value in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), max_size=6)):
        damaged[place] = value
    start, end = sorted(data.draw(st.tuples(where, where)))
    match data.draw(st.sampled_from(["keep", "truncate", "cut"])):
        case "truncate":
            del damaged[end:]
        case "cut":
            del damaged[start:end]
    check(bytes(damaged))


@pytest.mark.parametrize("name", FILES)
def test_every_truncation(name: str) -> None:
    data = FILES[name]
    for end in range(0, len(data), max(1, len(data) // 80)):
        check(data[:end])


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes(data: bytes) -> None:
    check(data)
    check(base64_text(data))


@given(
    st.sampled_from(["", "data:", "data:image/png;base64,", "data:,", "file:", "file://", "~", "/", "./"]), st.text()
)
@settings(max_examples=400, deadline=None)
@example("file://", "[")
@example("~", "nobody-of-this-name")
@example("data:,", "\ud800")
def test_any_text(prefix: str, text: str) -> None:
    check(prefix + text)
    check(prefix + text.encode("utf-16", "surrogatepass").decode("latin-1"))


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_url_without_a_host(text: str) -> None:
    check("http://[" + text)
