"""One picture, every door: the pixels are the same."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image

from mlxvlm.processors.images import load_image
from tests.processors.conftest import Web
from tests.processors.pictures import base64_text, encode, noise, on_white, pixels_of, upright

# A PNG, so that no door loses anything; orientation and transparency, so that each has something to get wrong.
STORED = noise(5, 7, 4)
DATA = encode(Image.fromarray(STORED), "PNG", orientation=6)
SHOWN = on_white(Image.fromarray(np.ascontiguousarray(upright(STORED, 6))))


def wrapped(text: str) -> str:
    return "\r\n".join(text[i : i + 20] for i in range(0, len(text), 20)) + "\n"


TEXTS: dict[str, Callable[[], str]] = {
    "base64": lambda: base64_text(DATA),
    "base64 without padding": lambda: base64_text(DATA).rstrip("="),
    "base64 in lines": lambda: wrapped(base64_text(DATA)),
    "base64 for URLs": lambda: base64.urlsafe_b64encode(DATA).decode(),
    "data URL": lambda: "data:image/png;base64," + base64_text(DATA),
    "data URL, capitals": lambda: "DATA:image/PNG;BASE64," + base64_text(DATA),
    "data URL in lines": lambda: "data:image/png;base64,\n" + wrapped(base64_text(DATA)),
    "data URL, both encodings": lambda: "data:image/png;base64," + base64_text(DATA).replace("+", "%2B"),
    "data URL with parameters": lambda: "data:image/png;name=a.png;base64," + base64_text(DATA),
    "data URL, per cent": lambda: "data:image/png," + quote_from_bytes(DATA),
    "data URL, no type": lambda: "data:;base64," + base64_text(DATA),
}


def test_the_test_picture_has_all_that_these_tests_need() -> None:
    text = base64_text(DATA)
    assert "+" in text
    assert "/" in text
    assert text.endswith("=")
    assert SHOWN.shape == (7, 5, 3)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_texts(text: Callable[[], str]) -> None:
    assert np.array_equal(pixels_of(load_image(text())), SHOWN)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes(kind: Callable[[bytes], Any]) -> None:
    assert np.array_equal(pixels_of(load_image(kind(DATA))), SHOWN)


class BytesPath:
    """What os.scandir gives for a folder named in bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return str(self.path).encode()


PATHS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "Path": lambda path: path,
    "bytes path": BytesPath,
    "file URL": lambda path: path.as_uri(),
    "file URL with a host": lambda path: path.as_uri().replace("file://", "file://localhost"),
    "FILE URL": lambda path: path.as_uri().replace("file:", "FILE:"),
}


@pytest.mark.parametrize("name", ["plain.png", "a b.png", "100%25.png", "é?#.png", "no_suffix", "QUJD"])
@pytest.mark.parametrize("door", PATHS.values(), ids=PATHS.keys())
def test_paths(tmp_path: Path, door: Callable[[Path], Any], name: str) -> None:
    file = tmp_path / name
    file.write_bytes(DATA)
    assert np.array_equal(pixels_of(load_image(door(file))), SHOWN)


@pytest.mark.parametrize("name", ["pic.png", "QUJD"])  # the second is base64 too: the file wins
def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(DATA)
    assert np.array_equal(pixels_of(load_image(name)), SHOWN)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pic.png").write_bytes(DATA)
    assert np.array_equal(pixels_of(load_image("~/pic.png")), SHOWN)


def test_web(web: Web) -> None:
    url = web.add("/a%20b.png?size=1", DATA)
    assert np.array_equal(pixels_of(load_image(url)), SHOWN)
    assert np.array_equal(pixels_of(load_image(url.replace("http:", "HTTP:"))), SHOWN)
    assert web.asked == ["/a%20b.png?size=1"] * 2
    assert "mlxvlm" in web.headers[0]["user-agent"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_web_redirect(web: Web, status: int) -> None:
    def redirect(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("Location", "/pic.png")
        handler.end_headers()

    web.add("/pic.png", DATA)
    assert np.array_equal(pixels_of(load_image(web.add("/old", redirect))), SHOWN)
    assert web.asked == ["/old", "/pic.png"]


def test_web_chunked(web: Web) -> None:
    def chunked(handler: Any) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(DATA), 50):
            piece = DATA[start : start + 50]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    assert np.array_equal(pixels_of(load_image(web.add("/pic", chunked))), SHOWN)


def test_pillow_image_still_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "pic.png"
    file.write_bytes(DATA)
    with Image.open(file) as image:
        assert np.array_equal(pixels_of(load_image(image)), SHOWN)


def test_pillow_image_stays_as_it_was() -> None:
    image = Image.fromarray(STORED)
    before = image.tobytes()
    loaded = load_image(image)
    loaded.paste((1, 2, 3), (0, 0, 2, 2))
    assert image.mode == "RGBA"
    assert image.tobytes() == before


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4), (1, 1), (1, 9, 3)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = noise(*shape)
    if shape[2:] == (4,):
        expected = on_white(Image.fromarray(array))
    elif shape[2:] == (3,):
        expected = array
    else:
        expected = np.repeat(array.reshape(*shape[:2], 1), 3, axis=2)
    assert np.array_equal(pixels_of(load_image(array)), expected)


def test_array_views() -> None:
    array = noise(6, 8, 3)
    for view in (array[::-1], array[:, ::2], array.swapaxes(0, 1), array[..., ::-1]):
        assert np.array_equal(pixels_of(load_image(view)), view)
    frozen = array.copy()
    frozen.flags.writeable = False
    assert np.array_equal(pixels_of(load_image(frozen)), array)


def test_array_is_copied() -> None:
    array = noise(4, 4, 3)
    loaded = load_image(array)
    before = loaded.tobytes()
    array[:] = 0
    assert loaded.tobytes() == before


def test_threads(tmp_path: Path) -> None:
    file = tmp_path / "pic.png"
    file.write_bytes(DATA)
    right: list[bool] = []

    def load() -> None:
        for _ in range(20):
            right.append(np.array_equal(pixels_of(load_image(file)), SHOWN))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 160
