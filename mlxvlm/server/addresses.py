"""Which hosts a picture may be fetched from. Knows names and addresses, not HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]  # host, port -> addresses

_THREADS = 8  # the system's resolver blocks; slow names must not hold up the loop's own threads
# Within 2000::/3, all that is given out to anybody, but not hosts of their own: what stands for an IPv4 address
# (Teredo, 6to4), and addresses for books, which older Pythons don't know.
# Source: https://www.iana.org/assignments/iana-ipv6-special-registry
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NO_HOSTS = [ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")  # 6to4's, deprecated


def is_public(address: str) -> bool:
    """Whether an address is a host of the open internet: not this machine, its network, a group, or an alias of one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.is_multicast or not ip.is_global:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip not in _RELAYS
    # So neither IPv4-mapped nor NAT64 (64:ff9b::/96) addresses, which lead to any IPv4 address.
    return ip in _UNICAST and not any(ip in network for network in _NO_HOSTS)


class SystemResolver:
    """Names to addresses as the system has them, in threads of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="mlxvlm-resolve")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Raises OSError for a name that nobody knows, UnicodeError for one that is no name."""
        loop = asyncio.get_running_loop()
        query = (host, port, socket.AF_UNSPEC, socket.SOCK_STREAM)
        found = await loop.run_in_executor(self._pool, lambda: socket.getaddrinfo(*query))
        # Not a set: the system gives the best first.
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
