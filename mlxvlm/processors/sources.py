"""The text that stands for a picture -> the bytes of its file. Knows URLs, base64 and limits, not pictures."""

from __future__ import annotations

import base64
import binascii
import re
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlparse
from urllib.request import url2pathname

from mlxvlm.errors import ImageError

MAX_PATH_CHARS = 255  # longer texts that name no file are taken for base64: file systems' own limit of a name


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may cost before it is refused."""

    max_bytes: int = 64 << 20
    max_pixels: int = 178_000_000  # Pillow refuses more; decoded to RGB this is half a GB
    timeout_s: float = 30.0
    max_redirects: int = 3


DEFAULT_LIMITS = ImageLimits()


def file_url_path(url: str) -> Path:
    """Of a file:// URL, whose host is not looked at. Raises ImageError."""
    try:
        return Path(url2pathname(urlparse(url).path))  # url2pathname also decodes %20
    except ValueError as error:
        raise ImageError(f"{short(url)} is not a valid file URL: {reason(error)}") from error


def decode_data_url(source: str, limits: ImageLimits) -> bytes:
    """What a data: URL holds; the type that it names is not looked at. Raises ImageError."""
    header, comma, payload = source.partition(",")
    if not comma:
        raise ImageError("the data: URL has no comma, so no data")
    if not header.lower().rstrip().endswith(";base64"):
        return unquote_to_bytes(payload.encode(errors="replace"))
    data = decode_base64(unquote(payload), limits)
    if data is None:
        raise ImageError("the data: URL is not valid base64")
    return data


def decode_base64(text: str, limits: ImageLimits) -> bytes | None:
    """Decoded bytes, None for text that is not base64. Line breaks and the URL-safe alphabet are accepted."""
    if len(text) > limits.max_bytes * 4 // 3 + 4:
        raise too_large("the base64 text", limits)
    compact = re.sub(r"\s+", "", text).translate(str.maketrans("-_", "+/"))
    if not compact:
        return None
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def fetch(url: str, limits: ImageLimits) -> bytes:
    """The body of an http(s) URL, within the limits of bytes, redirects and total time."""
    import httpx2  # costs 0.1 s, and most pictures are files

    deadline = time.monotonic() + limits.timeout_s
    name = short(url)
    data = bytearray()
    try:
        with httpx2.Client(timeout=limits.timeout_s) as client:
            # Some hosts (Wikimedia among them) refuse a client that gives no name.
            request = client.build_request("GET", url, headers={"User-Agent": "mlxvlm (image fetch)"})
            # Redirects by hand: the client would read the body of each, however long.
            for _ in range(limits.max_redirects + 1):
                with closing(client.send(request, stream=True)) as response:
                    if response.next_request is not None:
                        request = response.next_request
                        _check_deadline(deadline, name, limits)
                        continue
                    if response.status_code >= 300:
                        raise ImageError(f"{name} can't be fetched: HTTP {response.status_code}")
                    for chunk in response.iter_bytes():  # as it comes: a set size would wait until it is full
                        data += chunk
                        if len(data) > limits.max_bytes:
                            raise too_large(name, limits)
                        _check_deadline(deadline, name, limits)
                    return bytes(data)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise ImageError(f"{name} can't be fetched: {reason(error)}") from error
    raise ImageError(f"{name} can't be fetched: more than {limits.max_redirects} redirects")


def _check_deadline(deadline: float, name: str, limits: ImageLimits) -> None:
    if time.monotonic() > deadline:
        raise ImageError(f"{name} took longer than {limits.timeout_s:g} s")


def too_large(name: str, limits: ImageLimits) -> ImageError:
    """The error of more bytes than the limit."""
    return ImageError(f"{name} is larger than the limit of {limits.max_bytes / (1 << 20):g} MiB")


def reason(error: Exception) -> str:
    """An error's own words on one line, without a file name that the line already has."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return short(" ".join(words.split()))


def short(text: str, limit: int = 120) -> str:
    """A source for an error line: control characters escaped, the middle of a long one left out."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: 2 * limit])
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-12:]}"
