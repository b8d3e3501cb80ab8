"""Which addresses are the open internet's."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.server.addresses import SystemResolver, is_public

PUBLIC = ["8.8.8.8", "1.1.1.1", "151.101.1.1", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"]
# One of each kind that IANA's registries set aside.
INSIDE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
    *("169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1"),
    *("203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
    *(
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "ff02::1",
        "ff0e::1",
        "2001:db8::1",
        "3fff::1",
    ),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1"),
    *("2002:7f00:1::", "2002:808:808::", "2001::1", "2001:10::1", "2001:20::1", "100::1", "fec0::1", "5f00::1"),
    *("localhost", "", "8.8.8", "0x7f.1", "2130706433", "127.1", "8.8.8.8 ", "8.8.8.8%eth0"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", INSIDE)
def test_inside(address: str) -> None:
    assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_what_ipaddress_calls_private_never_passes(address: ipaddress.IPv4Address) -> None:
    if is_public(str(address)):
        kinds = ("private", "loopback", "multicast", "reserved", "link_local", "unspecified")
        assert [kind for kind in kinds if getattr(address, f"is_{kind}")] == []
    # However it is dressed up as IPv6.
    number = int(address)
    for dressed in (f"::ffff:{address}", f"::{address}", f"64:ff9b::{address}"):
        assert not is_public(dressed)
    assert not is_public(f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1")


@given(st.ip_addresses(v=6))
def test_only_unicast_passes(address: ipaddress.IPv6Address) -> None:
    if is_public(str(address)):
        assert address.exploded[0] in "23"
        assert address.ipv4_mapped is None
        assert address.sixtofour is None
        assert address.teredo is None


def test_the_systems_names() -> None:
    resolver = SystemResolver()

    async def look() -> None:
        found = await resolver("localhost", 80)
        assert found
        assert not any(map(is_public, found))
        # All the ways in which a system writes 127.0.0.1.
        for name in ("127.1", "2130706433", "0x7f000001", "0177.0.0.1"):
            try:
                found = await resolver(name, 80)
            except OSError:
                continue
            assert not any(map(is_public, found)), name
        with pytest.raises((OSError, UnicodeError)):
            await resolver("a" * 300, 80)

    try:
        asyncio.run(look())
    finally:
        resolver.close()
