"""The whole server as `mlxvlm serve` puts it together, in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlxvlm.errors import MlxvlmError
from mlxvlm.server import serving
from mlxvlm.server.assembly import assemble
from mlxvlm.server.loading import CheckpointLoader
from mlxvlm.server.registry import Loader, ModelSpec, Registry
from mlxvlm.server.settings import ServerSettings


class Whole:
    """registry and url are there once it is ready."""

    registry: Registry
    url: str
    _server: serving._Server

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.error: MlxvlmError | None = None

    def end(self) -> None:
        """What a signal does."""
        self._server.should_exit = True

    def run(self, specs: Sequence[ModelSpec], loader: Loader, settings: ServerSettings) -> None:
        async def main() -> None:
            self.registry = Registry(specs, loader, drain_s=settings.drain_s)
            listener = serving.listen(settings)
            self.url = serving.url_of(listener)
            genuine = serving._Server.__init__

            def remembered(server: serving._Server, *args: object) -> None:
                genuine(server, *args)  # type: ignore[arg-type]
                if not hasattr(self, "_server"):  # of servers that run side by side, the first is this one's
                    self._server = server

            serving._Server.__init__ = remembered  # type: ignore[method-assign]
            try:
                await serving.serve(
                    assemble(self.registry, settings), self.registry, settings, listener, self.ready.set
                )
            finally:
                serving._Server.__init__ = genuine  # type: ignore[method-assign]

        try:
            asyncio.run(main())
        except MlxvlmError as error:
            self.error = error
        finally:
            self.ready.set()


@contextmanager
def whole(
    specs: Sequence[ModelSpec] = (ModelSpec("demo", "demo"),),
    settings: ServerSettings | None = None,
    loader: Loader | None = None,
) -> Iterator[Whole]:
    """Ready when the block begins, gone when it ends."""
    server = Whole()
    arguments = (specs, loader or CheckpointLoader(), settings or ServerSettings(port=0))
    thread = threading.Thread(target=server.run, args=arguments, name="whole server")
    thread.start()
    try:
        assert server.ready.wait(60)
        assert server.error is None, server.error
        yield server
    finally:
        if thread.is_alive():
            server.end()
        thread.join(30)
        assert not thread.is_alive()
