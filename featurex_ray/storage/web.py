"""http(s): which hosts may be asked, by the address that is in fact connected to."""

import asyncio
import ipaddress
import re
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
from aiohttp.abc import AbstractResolver, ResolveResult

from featurex_ray.errors import RefusedUriError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# 127.1, 0x7f000001, 2130706433: addresses to a resolver, though not to a reader.
_NUMERIC = re.compile(r"(.*\.)?(0[xX][0-9a-fA-F]*|[0-9]+)\.?")
_EMBEDDING = [(ipaddress.IPv6Network("64:ff9b::/96"), 0), (ipaddress.IPv6Network("2002::/16"), 80)]
"""IPv6 networks whose addresses hold an IPv4 address, and by how many bits from the right."""


def objection_to_host(authority: str, *, named: Collection[str]) -> str | None:
    """Why a host is not asked, as far as its name tells; None where nothing speaks against it.

    Args:
        authority: `host` or `host:port`.
        named: Hosts that the user named in a prefix.
    """
    if "@" in authority:
        return "it holds credentials"
    try:
        host = urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return "its host is malformed"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "its host is an address in disguise" if _NUMERIC.fullmatch(host) else None
    return objection_to_address(address, named=named)


def objection_to_address(address: Address, *, named: Collection[str]) -> str | None:
    """Why an address is not connected to: it is not one of the public internet.

    An address that the user named is theirs to name, but for link-local ones, where clouds keep
    their machines' credentials.
    """
    plain = _embedded(address)
    if plain.is_link_local or address.is_link_local:
        return f"{address} is link-local"
    if plain.is_global and not plain.is_multicast and address.is_global:
        return None
    if str(address) in named:
        return None
    return f"{address} is not public; --allow-prefix may name the address itself"


def hosts(authorities: Collection[str]) -> frozenset[str]:
    """Hosts without their ports."""
    return frozenset(urlsplit(f"//{authority}").hostname or "" for authority in authorities)


def web_filesystem(*, named: Collection[str]) -> Any:
    """An http(s) filesystem whose connections go to addresses that were checked."""

    async def get_client(**options: Any) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=_CheckedResolver(named), limit=0)
        # Unpacked by itself, a reply of a megabyte could fill the memory.
        return aiohttp.ClientSession(connector=connector, auto_decompress=False, **options)

    return fsspec.filesystem("http", get_client=get_client, skip_instance_cache=True)


class _CheckedResolver(AbstractResolver):
    """Resolves a name; what it gives is what is connected to, so that no second answer can differ."""

    def __init__(self, named: Collection[str]) -> None:
        self._named = named
        self._inner = aiohttp.ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        """The name's addresses, if all of them may be connected to."""
        found = await self._inner.resolve(host, port, family)
        for each in found:
            address = ipaddress.ip_address(each["host"].partition("%")[0])
            if objection := objection_to_address(address, named=self._named):
                raise RefusedUriError(f"the host {host!r} is refused: {objection}")
        return found

    async def close(self) -> None:
        """Nothing is held."""
        await asyncio.sleep(0)


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does; else the address."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    for network, shift in _EMBEDDING:
        if address in network:
            return ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF)
    return address
