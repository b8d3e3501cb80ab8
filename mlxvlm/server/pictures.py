"""A request's image_url -> the bytes of a picture's file, by the server's policy. Knows sources, not pixels.

URLs: fetch.py. data: URLs and base64 text: what they hold decides, not the type that they name. Paths and file://
URLs: any where only this machine can connect, else those under the image folder, else none. Whether the bytes are a
picture, and how large, is seen where they are decoded (processors/images.py), from the header before the pixels.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from mlxvlm.errors import ImageError
from mlxvlm.processors.sources import (
    DEFAULT_LIMITS,
    MAX_PATH_CHARS,
    ImageLimits,
    decode_base64,
    decode_data_url,
    file_url_path,
    short,
)
from mlxvlm.server.addresses import Resolver
from mlxvlm.server.fetch import Fetcher
from mlxvlm.server.local_files import read_anywhere, read_under
from mlxvlm.server.settings import ServerSettings

_REMEMBERED_BYTES = 128 << 20
_REMEMBERED_S = 300.0  # every turn of a chat sends its pictures' URLs again
# Of formats that fit into a path's length.
_SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\1\0")
_LOCAL_HOSTS = ("", "localhost")  # of a file:// URL


class Pictures:
    """Reads the pictures of requests; close() it."""

    def __init__(
        self, settings: ServerSettings, limits: ImageLimits = DEFAULT_LIMITS, resolve: Resolver | None = None
    ) -> None:
        self.limits = limits
        self._root, self._is_local = settings.image_root, settings.is_loopback
        self._fetch = Fetcher(settings.allow_private_urls, limits, resolve)
        self._fetched = RecentBytes(_REMEMBERED_BYTES, _REMEMBERED_S)

    async def read(self, source: str) -> bytes:
        """The bytes that a URL, data: URL, path or base64 text stands for. Raises ImageError."""
        if not source.strip():
            raise ImageError("the image's source is an empty text")
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            data = self._fetched.get(source)
            if data is None:
                data = await self._fetch(source)
                self._fetched.put(source, data)
        else:
            # Decoding and disks take their time.
            data = await asyncio.to_thread(self._read, source, scheme)
        if not data:
            raise ImageError(f"{short(source)} is empty")
        return data

    def close(self) -> None:
        self._fetch.close()

    def _read(self, source: str, scheme: str) -> bytes:
        if scheme.startswith("data:"):
            return decode_data_url(source, self.limits)
        if scheme.startswith("file:"):
            return self._read_path(_local_path(source))
        if len(source) > MAX_PATH_CHARS:
            return self._decode(source, "the base64 text is not valid base64")
        if "://" in source:
            raise ImageError(f"{short(source)} is no picture's address: only http, https, file and data URLs are")
        return self._path_or_base64(source)

    def _decode(self, source: str, problem: str) -> bytes:
        data = decode_base64(source, self.limits)
        if data is None:
            raise ImageError(problem)
        return data

    def _path_or_base64(self, source: str) -> bytes:
        """A short text may be either; a file comes first."""
        if not self._may_read_files:
            return self._decode(source, _no_files(source))
        try:
            return self._read_path(Path(source))
        except ImageError:
            data = decode_base64(source, self.limits)
            # "photos/cat" is base64 as well as a path: its error is the file's unless it is a picture.
            if data is None or not data.startswith(_SIGNATURES):
                raise
            return data

    @property
    def _may_read_files(self) -> bool:
        return self._is_local or self._root is not None

    def _read_path(self, path: Path) -> bytes:
        if self._root is not None:
            return read_under(self._root, path, self.limits)
        if self._is_local:
            return read_anywhere(path, self.limits)
        raise ImageError(_no_files(str(path)))


class RecentBytes:
    """Least recently used bytes by name, for a while. `clock` gives seconds."""

    def __init__(self, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes, self.keep_s, self.nbytes = max_bytes, keep_s, 0
        self._clock = clock
        self._items: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def get(self, name: str) -> bytes | None:
        data, until = self._items.get(name, (None, 0.0))
        if data is None or until <= self._clock():
            return None
        self._items.move_to_end(name)
        return data

    def put(self, name: str, data: bytes) -> None:
        self._drop(name)
        self._items[name] = (data, self._clock() + self.keep_s)
        self.nbytes += len(data)
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._items)))

    def _drop(self, name: str) -> None:
        data, _ = self._items.pop(name, (b"", 0.0))
        self.nbytes -= len(data)


def _local_path(url: str) -> Path:
    """Of file:///path, file://localhost/path and file:/path."""
    rest = url[len("file:") :]
    host = rest[2:].partition("/")[0] if rest.startswith("//") else ""
    if host.lower() not in _LOCAL_HOSTS:
        raise ImageError(f"{short(url)} names a file of another machine")
    return file_url_path(url)


def _no_files(source: str) -> str:
    return (
        f"{short(source)} is neither a URL nor base64, and this server reads no files: "
        "start it with --image-root DIR to let it read those of a folder"
    )
