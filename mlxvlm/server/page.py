"""The page to chat in, at `/`: static files of the package, each at its own address. Knows no model and no API."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_INDEX = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The page runs its own files, talks to its own server, and shows pictures that the reader gave it. Where a browser
# knows trusted types, no string becomes HTML or a script at all.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Another version of the package has other files under the same addresses: kept, but asked for each time.
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """One route a file, to append to a Starlette app's: `/` and `/ui/NAME`. The files are read now, once."""
    return list(_routes())


def _routes() -> Iterator[Route]:
    for entry in sorted(files("mlxvlm.server").joinpath("ui").iterdir(), key=lambda entry: entry.name):
        media_type = _MEDIA_TYPES.get(PurePosixPath(entry.name).suffix)
        if media_type is None:  # what an editor or the system left there
            continue
        path = "/" if entry.name == _INDEX else f"/ui/{entry.name}"
        yield Route(path, _endpoint(entry.read_bytes(), media_type), methods=["GET"], include_in_schema=False)


def _endpoint(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": etag}

    async def serve(request: Request) -> Response:
        known = request.headers.get("If-None-Match", "")
        if etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
