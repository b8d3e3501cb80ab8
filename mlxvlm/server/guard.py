"""Who may talk to the server: the wall in front of every endpoint. Knows HTTP's headers, not what is asked.

A server on a user's machine is within reach of every web page that the user opens. What keeps pages out: the Host
check (a page's own name that was made to point here, DNS rebinding), the Origin and Sec-Fetch-Site checks (requests
that a page sends elsewhere), and the content type (forms, which send without asking). docs/server-security.md.
"""

from __future__ import annotations

import hmac
import ipaddress
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxvlm.server.refusals import Headers, send_error
from mlxvlm.server.settings import ANY, LOOPBACK_NAMES, ServerSettings

OPEN_PATHS = frozenset({"/health"})  # without an API key: programs that start the server ask it
_WITH_BODY = ("POST", "PUT", "PATCH")
_PREFLIGHT_S = b"600"  # how long a browser may remember a preflight
_METHODS = b"GET, POST, DELETE"
_EXPOSED = b"x-request-id, request-id, retry-after"
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_\-, ]{1,2048}")
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/]+)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
# Kept where an endpoint sets its own. Source: https://owasp.org/www-project-secure-headers/
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


class RefusedError(Exception):
    """Why a request does not get through."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Guard:
    """ASGI middleware: a request comes through, or gets a 4xx in OpenAI's shape."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app, self.settings, self.open_paths = app, settings, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:  # there are no WebSockets here; a handshake is refused with 403
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _Incoming(scope)
        extra = list(_SECURITY)
        try:
            self._check_host(scope, headers)
            origin = self._check_origin(scope, headers)
            if self.settings.cors_origins:
                extra.append((b"vary", b"Origin"))
            if origin is not None:
                extra += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
            if origin is not None and _is_preflight(scope, headers):
                await _answer_preflight(headers, extra, send)
                return
            self._check_key(scope, headers)
            _check_type(scope, headers)
        except RefusedError as refused:
            told = [*extra, *refused.headers]
            await send_error(send, refused.status, refused.message, refused.code, told, path=scope["path"])
            return
        await self.app(scope, receive, _with_headers(send, extra))

    def _check_host(self, scope: Scope, headers: _Incoming) -> None:
        """A page whose name was made to point here still sends that name."""
        hosts = headers.all(b"host")
        if len(hosts) != 1:
            raise RefusedError(400, "the request must have one Host header")
        found = _split_authority(hosts[0])
        if found is None or not self._may_be_host(*found, scope):
            raise RefusedError(
                403,
                f"the server does not answer to the host {_shown(hosts[0])}: "
                "start it with --allowed-host to have it answer to another name",
                "host_not_allowed",
            )

    def _may_be_host(self, name: str, port: str | None, scope: Scope) -> bool:
        settings = self.settings
        allowed = {host.lower() for host in settings.allowed_hosts}
        if ANY in allowed or name in allowed or f"{name}:{port}" in allowed:
            return True
        bound = scope.get("server") or (None, None)
        own_port = str(bound[1])
        if (port or _DEFAULT_PORTS.get(scope.get("scheme", "http"))) != own_port:
            return False
        if name in LOOPBACK_NAMES:
            return True
        # Rebinding takes a name: an address in numbers is what the browser has connected to.
        return not settings.is_loopback and (_is_address(name) or name == settings.host.lower())

    def _check_origin(self, scope: Scope, headers: _Incoming) -> bytes | None:
        """The origin of another page that may read the answer; None for our own pages and for programs."""
        origins = headers.all(b"origin")
        if not origins:
            self._check_fetch_site(scope, headers)
            return None
        origin = origins[0].lower()
        if len(origins) == 1:
            if origin in (f"http://{headers.host}", f"https://{headers.host}"):
                return None
            if origin != "null" and (ANY in self.settings.cors_origins or origin in self.settings.cors_origins):
                return origins[0].encode("latin-1")
        raise RefusedError(
            403,
            f"web pages of {_shown(origins[0])} may not use this server: start it with --cors-origin to let them",
            "origin_not_allowed",
        )

    def _check_fetch_site(self, scope: Scope, headers: _Incoming) -> None:
        """What pages send without an Origin: pictures, frames, links. Only a link that is followed harms nobody."""
        site = headers.one(b"sec-fetch-site")
        if site in ("", "none", "same-origin"):
            return
        is_link = headers.one(b"sec-fetch-mode") == "navigate" and headers.one(b"sec-fetch-dest") == "document"
        if scope["method"] not in ("GET", "HEAD") or not is_link:
            raise RefusedError(403, "web pages of other sites may not use this server", "origin_not_allowed")

    def _check_key(self, scope: Scope, headers: _Incoming) -> None:
        """OpenAI's `Authorization: Bearer KEY` or Anthropic's `x-api-key: KEY`."""
        if self.settings.api_key is None or scope["path"] in self.open_paths:
            return
        scheme, _, bearer = headers.one(b"authorization").partition(" ")
        given = [headers.one(b"x-api-key"), bearer.strip() if scheme.lower() == "bearer" else ""]
        wanted = self.settings.api_key.encode()
        # Compared in constant time, and all of them: how long it takes tells nothing.
        matches = [hmac.compare_digest(key.encode("latin-1"), wanted) for key in given]
        if not any(matches):
            message = "the API key is wrong" if any(given) else "an API key is needed: Authorization: Bearer KEY"
            raise RefusedError(401, message, "invalid_api_key", [(b"www-authenticate", b"Bearer")])


def _check_type(scope: Scope, headers: _Incoming) -> None:
    """JSON only: what a form can send (text/plain among it) needs no preflight."""
    if scope["method"] not in _WITH_BODY:
        return
    if headers.one(b"content-encoding").lower() not in ("", "identity"):
        raise RefusedError(415, "a compressed body is not taken: send it without Content-Encoding")
    types = headers.all(b"content-type")
    has_body = headers.one(b"content-length") not in ("", "0") or bool(headers.all(b"transfer-encoding"))
    if not types and not has_body:
        return
    name, _, parameter = (types[0] if len(types) == 1 else "").partition(";")
    parameter = parameter.strip().lower().replace('"', "")
    if name.strip().lower() != "application/json" or parameter not in ("", "charset=utf-8"):
        raise RefusedError(415, "the body must be JSON: send Content-Type: application/json")


class _Incoming:
    """A request's headers as text."""

    def __init__(self, scope: Scope) -> None:
        self._pairs: list[tuple[bytes, bytes]] = scope["headers"]
        hosts = self.all(b"host")
        self.host = hosts[0].lower() if hosts else ""

    def all(self, name: bytes) -> list[str]:
        return [value.decode("latin-1").strip() for key, value in self._pairs if key.lower() == name]

    def one(self, name: bytes) -> str:
        """The value, "" where there is none; several become a list, which is no value that is looked for."""
        return ", ".join(self.all(name))


def _split_authority(text: str) -> tuple[str, str | None] | None:
    """Host and port of a Host header, in lower case and without a root's dot."""
    match = _AUTHORITY.fullmatch(text.lower())
    return None if match is None else (match[1].removesuffix("."), match[2])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _shown(value: str) -> str:
    """A header in an error: short, and without what could steer a terminal."""
    return ascii(value[:100])


def _is_preflight(scope: Scope, headers: _Incoming) -> bool:
    return scope["method"] == "OPTIONS" and bool(headers.one(b"access-control-request-method"))


async def _answer_preflight(headers: _Incoming, extra: list[tuple[bytes, bytes]], send: Send) -> None:
    """May the page send this? Its origin is one that may; which headers it wants to add is its affair."""
    answer = [*extra, (b"access-control-allow-methods", _METHODS), (b"access-control-max-age", _PREFLIGHT_S)]
    wanted = headers.one(b"access-control-request-headers").encode("latin-1")
    if _HEADER_NAMES.fullmatch(wanted):
        answer.append((b"access-control-allow-headers", wanted))
    if headers.one(b"access-control-request-private-network") == "true":
        answer.append((b"access-control-allow-private-network", b"true"))
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body"})


def _with_headers(send: Send, extra: list[tuple[bytes, bytes]]) -> Send:
    """Adds headers to the answer; one that it already has is kept, but for CORS, which is decided here alone."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [pair for pair in message.get("headers", ()) if not pair[0].lower().startswith(b"access-control-")]
            names = {name.lower() for name, _ in own} - {b"vary"}
            message = {**message, "headers": [*own, *(pair for pair in extra if pair[0] not in names)]}
        await send(message)

    return sending
