"""All that the server can be told, checked once. Plain values."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mlxvlm.agent.loop import MAX_ROUNDS, MOST_ROUNDS
from mlxvlm.errors import UsageError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")  # as a Host header writes them
ANY = "*"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the server listens, whom it answers, and what a request may cost. Raises UsageError."""

    host: str = "127.0.0.1"
    port: int = 1234  # 0: any free one
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()  # names, with or without a port, that a Host header may have; "*": any
    cors_origins: tuple[str, ...] = ()  # pages' origins that may use the server from a browser; "*": any
    allow_private_urls: bool = False  # pictures from this machine's network
    image_root: Path | None = None  # the only folder whose files are read as pictures
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 512 << 20  # of all requests whose bodies are being read
    body_timeout_s: float = 60.0  # from a request's head to its body's end
    max_connections: int = 1000
    idle_unload_s: float | None = None
    drain_s: float = 30.0  # for running requests at the end, and before a model is unloaded
    log_json: bool = False
    ui: bool | None = None  # the page; None: where only this machine can connect
    enable_search: bool = False
    search_url: str | None = None  # a search service of the operator's own, which also enables search
    mcp_config: Path | None = None
    max_tool_rounds: int = MAX_ROUNDS

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"--port is a number up to 65535, not {self.port}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError("the API key must be one or more printable ASCII characters")
        for origin in self.cors_origins:
            _check_origin(origin)
        for limit, name in (
            (self.max_body_bytes, "--max-body-mb"),
            (self.body_timeout_s, "--body-timeout"),
            (self.max_connections, "--max-connections"),
            (1 if self.idle_unload_s is None else self.idle_unload_s, "--idle-unload"),
        ):
            if not 0 < limit < 1e12:
                raise UsageError(f"{name} must be above 0, not {limit:g}")
        if not 1 <= self.max_tool_rounds <= MOST_ROUNDS:
            raise UsageError(f"--max-tool-rounds is a number from 1 to {MOST_ROUNDS}, not {self.max_tool_rounds}")
        if not 0 <= self.drain_s < 1e6:
            raise UsageError(f"--drain is a number of seconds, not {self.drain_s:g}")
        if self.image_root is not None and not self.image_root.is_dir():
            raise UsageError(f"--image-root {os.fsdecode(self.image_root)} is no folder")

    @property
    def shows_ui(self) -> bool:
        return self.is_loopback if self.ui is None else self.ui

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _check_origin(origin: str) -> None:
    """An origin as browsers write it, or "*"."""
    if origin == ANY:
        return
    try:
        parts = urlsplit(origin)
        is_origin = bool(parts.hostname) and not (parts.path or parts.query or parts.fragment or parts.username)
    except ValueError:
        is_origin = False
    if not is_origin or origin != origin.lower():
        raise UsageError(f"--cors-origin takes an origin like https://example.org in lower case, or *, not {origin}")
