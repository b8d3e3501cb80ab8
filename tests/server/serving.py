"""A server in a thread, and what tests need to know of its engine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn

from tests.fakes import eventually


@contextmanager
def serving(app: Any, *, small: bool = False) -> Iterator[str]:
    """The base URL of an application on a free port, until the block ends. small: with next to no buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if small:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", loop="asyncio")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server")
        thread.start()
        assert eventually(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(api_key="EMPTY", base_url=f"{url}/v1/", max_retries=0, timeout=60)
