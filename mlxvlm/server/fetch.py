"""A URL of a picture or a page -> its bytes, from hosts of the open internet only. Knows HTTP's client side only.

A name is resolved here, every address of it is checked, and the connection goes to a checked address: what the name
means a moment later (DNS rebinding) has no say. TLS still proves the name. Each redirect starts anew.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urljoin

import httpx2

from mlxvlm.agent.web_search import PAGE_TIMEOUT_S
from mlxvlm.errors import ImageError, InputError
from mlxvlm.processors.sources import DEFAULT_LIMITS, ImageLimits, reason, short, too_large
from mlxvlm.server.addresses import Resolver, SystemResolver, is_public

_PORTS = {"http": 80, "https": 443}
_MAX_FETCHES = 16  # at a time, of all requests
_MAX_ADDRESSES = 3  # of a host, that are tried
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is fetched. types: beginnings of the media types that are taken, any without them; error: what is raised.

    is_whole: too many bytes are an error; else the first of them will do. remedy: for addresses that are refused.
    """

    accept: str
    agent: str
    error: type[InputError]
    types: tuple[str, ...] = ()
    is_whole: bool = True
    remedy: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """Some hosts (Wikimedia) refuse a client without a name. Uncompressed: the limit is of these bytes."""
        return {"User-Agent": self.agent, "Accept": self.accept, "Accept-Encoding": "identity"}


PICTURE = Wanted("image/*", "mlxvlm (image fetch)", ImageError, remedy=" (see --allow-private-urls)")
PAGE = Wanted(
    "text/html, application/xhtml+xml, text/*;q=0.9",
    "mlxvlm (page fetch)",
    InputError,
    ("text/", "application/xhtml", "application/xml", "application/json"),
    is_whole=False,
)
# Text has few bytes, and a search waits for ten pages.
PAGE_LIMITS = ImageLimits(max_bytes=4 << 20, timeout_s=PAGE_TIMEOUT_S - 1, max_redirects=5)


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL whose host has been looked up."""

    url: httpx2.URL
    addresses: Sequence[str]


class Fetcher:
    """Fetches one kind of thing; close() it. `resolve` gives the addresses of a host."""

    def __init__(
        self,
        allow_private: bool = False,
        limits: ImageLimits = DEFAULT_LIMITS,
        resolve: Resolver | None = None,
        wanted: Wanted = PICTURE,
    ) -> None:
        self.allow_private, self.limits, self.wanted = allow_private, limits, wanted
        self._system = SystemResolver() if resolve is None else None
        self._resolve: Resolver = resolve or self._system  # type: ignore[assignment]
        self._turns = asyncio.Semaphore(_MAX_FETCHES)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx2.create_ssl_context()  # reads the certificates, which takes a while

    async def __call__(self, url: str) -> bytes:
        """The body at an http(s) URL. Raises `wanted.error` with one line that starts with the URL."""
        name = short(url)
        try:
            async with asyncio.timeout(self.limits.timeout_s), self._turns:
                return await self._follow(url, name)
        except TimeoutError as error:
            raise self.wanted.error(f"{name} took longer than {self.limits.timeout_s:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise self.wanted.error(f"{name} can't be fetched: {reason(error)}") from error

    def close(self) -> None:
        if self._system is not None:
            self._system.close()

    async def _follow(self, url: str, name: str) -> bytes:
        for _ in range(self.limits.max_redirects + 1):
            answer = await self._get(await self._check(url, name), name)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise self.wanted.error(f"{name} can't be fetched: more than {self.limits.max_redirects} redirects")

    async def _check(self, text: str, name: str) -> _Target:
        """Scheme, port, and every address of the host."""
        url = httpx2.URL(text)
        if url.scheme not in _PORTS or not url.host:
            raise self.wanted.error(f"{name} can't be fetched: only http and https URLs are")
        if url.userinfo:
            raise self.wanted.error(f"{name} can't be fetched: a URL with a password is not taken")
        port = url.port or _PORTS[url.scheme]
        if port not in _PORTS.values() and not self.allow_private:
            raise self.wanted.error(f"{name} can't be fetched: only ports 80 and 443 are used{self.wanted.remedy}")
        try:
            addresses = await self._resolve(url.raw_host.decode("ascii"), port)
        except (OSError, UnicodeError):
            addresses = ()
        # One answer for names that nobody knows and for names of the inside: it maps no network.
        if not addresses or not (self.allow_private or all(map(is_public, addresses))):
            raise self.wanted.error(f"{name} can't be fetched: its host has no public address{self.wanted.remedy}")
        return _Target(url, addresses[:_MAX_ADDRESSES])

    async def _get(self, target: _Target, name: str) -> bytes | str:
        """The body, or where a redirect leads."""
        for address in target.addresses[:-1]:
            try:
                return await self._get_from(address, target.url, name)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        return await self._get_from(target.addresses[-1], target.url, name)

    async def _get_from(self, address: str, url: httpx2.URL, name: str) -> bytes | str:
        # No cookies, proxies or passwords of the environment. A client each: a connection to an address is of one name.
        share = self.limits.timeout_s / _MAX_ADDRESSES
        timeout = httpx2.Timeout(self.limits.timeout_s, connect=share)
        async with (
            httpx2.AsyncClient(verify=self._tls, timeout=timeout, trust_env=False) as client,
            client.stream(
                "GET",
                url.copy_with(host=address),
                headers={**self.wanted.headers, "Host": url.netloc.decode("ascii")},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            ) as response,
        ):
            if response.status_code in _REDIRECTS:
                return response.headers.get("location", "")
            if response.status_code != 200:
                raise self.wanted.error(f"{name} can't be fetched: HTTP {response.status_code}")
            kind = response.headers.get("content-type", "text/html").lower()
            if self.wanted.types and not kind.startswith(self.wanted.types):
                raise self.wanted.error(f"{name} is no text")
            return await self._body(response, name)

    async def _body(self, response: httpx2.Response, name: str) -> bytes:
        data = bytearray()
        async with aclosing(response.aiter_raw()) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > self.limits.max_bytes:
                    if not self.wanted.is_whole:
                        break
                    raise too_large(name, self.limits)
        return bytes(data)
