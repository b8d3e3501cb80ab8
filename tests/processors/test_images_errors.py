"""What can't be a picture ends as one clear line, quickly, and as nothing but ImageError."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mlxvlm.errors import ImageError, InputError
from mlxvlm.processors.images import DEFAULT_LIMITS, decode_image, load_image
from tests.processors.pictures import base64_text, encode, noise, png

RGB = Image.fromarray(noise(40, 40, 3))
PNG = encode(RGB, "PNG")
SMALL = replace(DEFAULT_LIMITS, max_bytes=1 << 10)


def refusal(source: Any, limits: Any = DEFAULT_LIMITS) -> str:
    """The one line that a source is refused with."""
    with pytest.raises(ImageError) as caught:
        load_image(source, limits)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 300
    assert caught.value.exit_code == 3
    assert caught.value.http_status == 400
    return message


def test_image_errors_are_input_errors() -> None:
    assert issubclass(ImageError, InputError)


@pytest.mark.parametrize("door", [str, Path, lambda name: Path(name).as_uri()], ids=["str", "Path", "file URL"])
def test_no_such_file(tmp_path: Path, door: Callable[[str], Any]) -> None:
    source = door(str(tmp_path / "no.png"))
    assert refusal(source) == f"no such image file: {source}"


@pytest.mark.parametrize("door", [str, Path])
def test_folder(tmp_path: Path, door: Callable[[Path], Any]) -> None:
    assert refusal(door(tmp_path)) == f"{tmp_path} is a folder, not an image"


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    file = tmp_path / "pic.png"
    file.write_bytes(PNG)
    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(file) == f"{file} can't be read: Permission denied"


def test_file_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(PNG)
    assert "can't be read: Not a directory" in refusal(tmp_path / "file" / "pic.png")


CONTENTS = {
    "text": b"just some text\n" * 9,
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "json": b'{"error": "gone"}',
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "zeros": bytes(1000),
    "one byte": b"\x89",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_not_a_picture(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pic.png"
    file.write_bytes(content)
    words = "is not an image in a format that can be read"
    for source in (file, content, "data:image/png;base64," + base64_text(content)):
        assert words in refusal(source)
    assert str(file) in refusal(file)


def test_empty(tmp_path: Path) -> None:
    file = tmp_path / "pic.png"
    file.touch()
    assert refusal(file) == f"{file} is empty"
    for source, name in (
        (b"", "the image data"),
        (bytearray(), "the image data"),
        ("data:image/png,", "the data: URL"),
    ):
        assert refusal(source) == f"{name} is empty"
    for text in ("", " ", "\n"):
        assert refusal(text) == "the image's source is an empty text"


TRUNCATABLE = {
    "PNG": (encode(RGB, "PNG"), 0.5),
    "JPEG": (encode(RGB, "JPEG"), 0.8),
    "WEBP": (encode(RGB, "WEBP"), 0.6),
    "GIF": (encode(RGB.convert("P"), "GIF"), 0.8),
    "BMP": (encode(RGB, "BMP"), 0.5),
    "TIFF": (encode(RGB, "TIFF", compression="tiff_lzw"), 0.5),
    "PNG header": (encode(RGB, "PNG"), 0.01),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow also warns of half a TIFF
@pytest.mark.parametrize("name", TRUNCATABLE)
def test_truncated(tmp_path: Path, name: str) -> None:
    data, part = TRUNCATABLE[name]
    assert load_image(data).size == RGB.size
    cut = data[: int(part * len(data))]
    assert "is damaged or truncated" in refusal(cut) or "is not an image" in refusal(cut)
    file = tmp_path / "pic"
    file.write_bytes(cut)
    assert refusal(file).startswith(f"{file} is ")


def test_truncated_file_that_pillow_has_only_opened(tmp_path: Path) -> None:
    file = tmp_path / "pic.png"
    file.write_bytes(PNG[: len(PNG) // 2])
    with Image.open(file) as image:
        assert refusal(image).startswith("the image is damaged or truncated: ")


def test_closed_pillow_image(tmp_path: Path) -> None:
    file = tmp_path / "pic.png"
    file.write_bytes(PNG)
    with Image.open(file) as image:
        pass
    assert refusal(image).startswith("the image ")


@pytest.mark.parametrize(
    "kind",
    [
        *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, AssertionError),
        *(ZeroDivisionError, OverflowError, RuntimeError, NotImplementedError, struct.error, zlib.error),
    ],
)
def test_whatever_a_decoder_raises(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def fail(self: Image.Image) -> None:
        raise kind("bad\nchunk")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    end = repr("bad\nchunk") if kind is KeyError else "bad chunk"
    assert refusal(PNG) == f"the image data is damaged or truncated: {end}"


def test_decoder_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert refusal(PNG) == "the image data does not fit into memory"


def test_pillow_image_without_pixels() -> None:
    assert refusal(Image.new("RGB", (0, 4))) == "the image has no pixels"


def declared(width: int, height: int) -> dict[str, bytes]:
    """Files whose headers promise more than they hold."""
    bmp = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    gif = b"GIF89a" + struct.pack("<HH", min(width, 65535), min(height, 65535)) + b"\x80\0\0" + bytes(6)
    gif += b"," + struct.pack("<HHHH", 0, 0, min(width, 65535), min(height, 65535)) + b"\0\x02\x02D\x01\0;"
    return {"PNG": png(width, height, 8, 6, b"\0"), "BMP": bmp, "GIF": gif}


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF"])
@pytest.mark.parametrize("side", [100_000, 4_000])
def test_header_declares_too_much(monkeypatch: pytest.MonkeyPatch, format: str, side: int) -> None:
    def never(self: Image.Image) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    limits = DEFAULT_LIMITS if side == 100_000 else replace(DEFAULT_LIMITS, max_pixels=1_000_000)
    tracemalloc.start()
    try:
        message = refusal(declared(side, side)[format], limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"limit of {limits.max_pixels:,}" in message
    assert peak < 4 << 20


def test_pixel_limit_is_for_pillow_images_too() -> None:
    limits = replace(DEFAULT_LIMITS, max_pixels=40 * 40 - 1)
    assert refusal(RGB, limits) == refusal(PNG, limits).replace("image data", "image")
    assert load_image(RGB, replace(limits, max_pixels=40 * 40)).size == RGB.size


BAD_TEXTS = {
    "data:image/png;base64,@@@@": "the data: URL is not valid base64",
    "data:image/png;base64,a": "the data: URL is not valid base64",
    "data:image/png;base64,": "the data: URL is not valid base64",
    "data:image/png;base64,é": "the data: URL is not valid base64",
    "data:image/png;base64": "the data: URL has no comma, so no data",
    "data:": "the data: URL has no comma, so no data",
    "data:,\ud800": "the data: URL is not an image in a format that can be read (PNG, JPEG, WebP, GIF ...)",
    "no/such.png": "no such image file: no/such.png",
    "~nobody-of-this-name/pic.png": "no such image file: ~nobody-of-this-name/pic.png",
    "a\0b.png": "no such image file: a\\x00b.png",
    "a\nb.png": "no such image file: a\\nb.png",
    "\ud800.png": "no such image file: \\ud800.png",
    "file://[": "file://[ is not a valid file URL: Invalid IPv6 URL",
    "file:///no/such%20file.png": "no such image file: file:///no/such%20file.png",
    "file:///a%00b": "file:///a%00b can't be read: embedded null byte",
    "ftp://example.org/pic.png": "no such image file: ftp://example.org/pic.png",
}


@pytest.mark.parametrize("text", BAD_TEXTS, ids=ascii)
def test_bad_texts(text: str) -> None:
    assert refusal(text) == BAD_TEXTS[text]


def test_long_text_with_one_bad_character() -> None:
    """Nobody's path is that long: what is wrong is the base64."""
    text = base64_text(noise(300).tobytes())
    words = refusal(text[:200] + "!" + text[200:])
    assert words.startswith(f"the base64 text is not valid base64 (and no file has that name): {text[:20]}")
    assert len(words) < 160


def test_path_that_reads_as_base64() -> None:
    assert refusal("photos/cats").startswith("photos/cats (no such file, so read as base64) is not an image")


def test_very_long_texts() -> None:
    for text in (
        "a" * 100_000,
        "a." * 50_000,
        "data:" + "a" * 100_000,
        "file:///" + "a" * 100_000,
        "\n" * 9 + "." * 99999,
    ):
        refusal(text)
    assert "File name too long" in refusal(Path("a" * 100_000))


def test_nul_in_a_path() -> None:
    assert refusal(Path("a\0b.png")) == "a\\x00b.png can't be read: embedded null byte"


def test_larger_than_the_limit(tmp_path: Path) -> None:
    assert len(PNG) > SMALL.max_bytes
    file = tmp_path / "pic.png"
    file.write_bytes(PNG)
    end = "is larger than the limit of 0.000976562 MiB"
    assert refusal(file, SMALL) == f"{file} {end}"
    assert refusal(str(file), SMALL) == f"{file} {end}"
    assert refusal(PNG, SMALL) == f"the image data {end}"
    assert refusal(base64_text(PNG), SMALL) == f"the base64 text {end}"
    for url in ("data:image/png;base64," + base64_text(PNG), "data:image/png," + "%41" * 1025):
        assert end in refusal(url, SMALL)
    exact = replace(DEFAULT_LIMITS, max_bytes=len(PNG))
    for source in (file, PNG, base64_text(PNG), "data:;base64," + base64_text(PNG)):
        assert load_image(source, exact).size == RGB.size


def test_limit_is_told_in_mebibytes() -> None:
    limits = replace(DEFAULT_LIMITS, max_bytes=3 << 20)
    assert refusal(bytes((3 << 20) + 1), limits) == "the image data is larger than the limit of 3 MiB"


def test_file_that_tells_no_size(tmp_path: Path) -> None:
    """A pipe: only as much as the limit allows is taken from it."""
    pipe = tmp_path / "pic.png"
    os.mkfifo(pipe)
    sent = 0

    def feed() -> None:
        nonlocal sent
        with suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            while sent < 8 << 20:
                sent += file.write(bytes(1 << 12))

    thread = threading.Thread(target=feed)
    thread.start()
    assert "larger than the limit" in refusal(str(pipe), SMALL)
    thread.join()
    assert sent < 1 << 20


@pytest.mark.parametrize("source", [None, 3, 2.5, True, [PNG], {"url": "x"}, object(), ("a",)], ids=repr)
def test_wrong_types(source: Any) -> None:
    assert f"can't be a {type(source).__name__}: give a path, URL" in refusal(source)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4), bool),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 5), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros(9, np.uint8),
        np.zeros((), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        np.array([["a"]], object),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_wrong_arrays(array: np.ndarray) -> None:
    assert refusal(array).startswith("an image array must be uint8 of shape")


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"heim", b"heis"])
def test_heic_without_its_package(monkeypatch: pytest.MonkeyPatch, brand: bytes) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    data = struct.pack(">I4s4sI4s", 20, b"ftyp", brand, 0, b"mif1") + bytes(50)
    assert refusal(data) == "the image data is a HEIC picture: pip install 'mlxvlm[heic]', or save it as JPEG"


def test_avif_that_shares_a_brand_with_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    data = encode(RGB, "AVIF")
    assert data[4:12] == b"ftypavif"
    assert b"avif" in data[16:48]
    assert load_image(data[:8] + b"mif1" + data[12:]).size == RGB.size


def test_name_in_errors() -> None:
    with pytest.raises(ImageError, match=r"^part 2 is empty$"):
        decode_image(b"", "part 2")


def test_connection_refused() -> None:
    with socket.socket() as free:  # bound, never listening
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/pic.png"
        assert refusal(url).startswith(f"{url} can't be fetched: ")
