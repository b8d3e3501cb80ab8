"""`mlxvlm` with a small application in place of the real endpoints: python -m tests.server.stub_app serve ..."""

from __future__ import annotations

import asyncio
import sys
import types
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlxvlm.errors import MlxvlmError

NAME = "mlxvlm.server.app"


def create_app(registry: Any, *, read_json: Any, fetch_picture: Any, routes: Any = (), tools: Any = None) -> Starlette:
    async def health(request: Request) -> Response:
        return JSONResponse({}, 200 if registry.is_ready else 503)

    async def echo(request: Request) -> Response:
        return JSONResponse(await read_json(request))

    async def picture(request: Request) -> Response:
        source = await read_json(request)
        return JSONResponse(len(await fetch_picture(source)))

    async def slow(request: Request) -> Response:
        count = int(request.query_params["tenths"])

        async def pieces() -> Any:
            async with registry.acquire():
                for _ in range(count):
                    yield b"."
                    await asyncio.sleep(0.1)
                yield b"done"

        return StreamingResponse(pieces())

    async def large(request: Request) -> Response:
        async def pieces() -> Any:
            for _ in range(2_000):
                yield bytes(1 << 16)

        return StreamingResponse(pieces())

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, MlxvlmError)
        return JSONResponse({"error": {"message": str(error)}}, error.http_status)

    own = [
        Route("/health", health),
        Route("/echo", echo, methods=["POST"]),
        Route("/picture", picture, methods=["POST"]),
        Route("/slow", slow),
        Route("/large", large),
    ]
    return Starlette(routes=[*own, *routes], exception_handlers={MlxvlmError: failed})


def stub_module() -> types.ModuleType:
    """What stands for mlxvlm.server.app."""
    module: Any = types.ModuleType(NAME)
    module.create_app = create_app
    return module


if __name__ == "__main__":
    from mlxvlm.cli import main

    sys.modules[NAME] = stub_module()
    sys.exit(main(sys.argv[1:]))
