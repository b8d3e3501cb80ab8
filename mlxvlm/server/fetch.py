"""A picture's URL -> its bytes, from hosts of the open internet only. Knows HTTP's client side, no pictures.

A name is resolved here, every address of it is checked, and the connection goes to a checked address: what the name
means a moment later (DNS rebinding) has no say. TLS still proves the name. Each redirect starts anew.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urljoin

import httpx2

from mlxvlm.errors import ImageError
from mlxvlm.processors.sources import DEFAULT_LIMITS, ImageLimits, reason, short, too_large
from mlxvlm.server.addresses import Resolver, SystemResolver, is_public

_PORTS = {"http": 80, "https": 443}
_MAX_FETCHES = 16  # at a time, of all requests
_MAX_ADDRESSES = 3  # of a host, that are tried
_REDIRECTS = (301, 302, 303, 307, 308)
# Some hosts (Wikimedia among them) refuse a client that gives no name. Uncompressed: the limit is of these bytes.
_HEADERS = {"User-Agent": "mlxvlm (image fetch)", "Accept": "image/*", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL whose host has been looked up."""

    url: httpx2.URL
    addresses: Sequence[str]


class Fetcher:
    """Fetches pictures; close() it. `resolve` gives the addresses of a host."""

    def __init__(
        self, allow_private: bool = False, limits: ImageLimits = DEFAULT_LIMITS, resolve: Resolver | None = None
    ) -> None:
        self.allow_private, self.limits = allow_private, limits
        self._system = SystemResolver() if resolve is None else None
        self._resolve: Resolver = resolve or self._system  # type: ignore[assignment]
        self._turns = asyncio.Semaphore(_MAX_FETCHES)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx2.create_ssl_context()  # reads the certificates, which takes a while

    async def __call__(self, url: str) -> bytes:
        """The body at an http(s) URL. Raises ImageError with one line that starts with the URL."""
        name = short(url)
        try:
            async with asyncio.timeout(self.limits.timeout_s), self._turns:
                return await self._follow(url, name)
        except TimeoutError as error:
            raise ImageError(f"{name} took longer than {self.limits.timeout_s:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise ImageError(f"{name} can't be fetched: {reason(error)}") from error

    def close(self) -> None:
        if self._system is not None:
            self._system.close()

    async def _follow(self, url: str, name: str) -> bytes:
        for _ in range(self.limits.max_redirects + 1):
            answer = await self._get(await self._check(url, name), name)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise ImageError(f"{name} can't be fetched: more than {self.limits.max_redirects} redirects")

    async def _check(self, text: str, name: str) -> _Target:
        """Scheme, port, and every address of the host."""
        url = httpx2.URL(text)
        if url.scheme not in _PORTS or not url.host:
            raise ImageError(f"{name} can't be fetched: only http and https URLs are")
        if url.userinfo:
            raise ImageError(f"{name} can't be fetched: a URL with a password is not taken")
        port = url.port or _PORTS[url.scheme]
        if port not in _PORTS.values() and not self.allow_private:
            raise ImageError(f"{name} can't be fetched: only ports 80 and 443 are used (see --allow-private-urls)")
        try:
            addresses = await self._resolve(url.raw_host.decode("ascii"), port)
        except (OSError, UnicodeError):
            addresses = ()
        # One answer for names that nobody knows and for names of the inside: it maps no network.
        if not addresses or not (self.allow_private or all(map(is_public, addresses))):
            raise ImageError(f"{name} can't be fetched: its host has no public address (see --allow-private-urls)")
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
                headers={**_HEADERS, "Host": url.netloc.decode("ascii")},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            ) as response,
        ):
            if response.status_code in _REDIRECTS:
                return response.headers.get("location", "")
            if response.status_code != 200:
                raise ImageError(f"{name} can't be fetched: HTTP {response.status_code}")
            return await self._body(response, name)

    async def _body(self, response: httpx2.Response, name: str) -> bytes:
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > self.limits.max_bytes:
                raise too_large(name, self.limits)
        return bytes(data)
