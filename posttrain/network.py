"""Which destinations a box may reach: the entries of ``SandboxSpec.network``, and what they let through."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Block = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORTS = (80, 443)
NAME = re.compile(r"([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
"""A host name in lower case. The last label starts with a letter, so that no form of an address passes for a name."""
ENTRY = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?")
EXPECTED = (
    "'host', '*.host' (the names below it), an address or a CIDR block such as '10.1.0.0/16', each with ':port' or for "
    "80 and 443; in lower case, IPv6 in brackets before a port"
)
NOT_PUBLIC: tuple[Block, ...] = tuple(
    ipaddress.ip_network(block)
    for block in (
        # The special-purpose registries of IANA: this host, private, shared, loopback, link-local (and with it the
        # metadata services of clouds), protocol assignments, documentation, relays, benchmarks, multicast, reserved.
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # Of IPv6 all but 2000::/3, and there what tunnels IPv4 or documents.
        *("::/3", "4000::/2", "8000::/1", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of an allow-list: a name (``*.`` for those below it) or a block of addresses, and ports."""

    name: str
    block: Block | None
    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AllowList:
    """What a box may reach. Empty: nothing."""

    entries: tuple[Entry, ...] = ()

    def has_name(self, name: str, port: int) -> bool:
        """Whether the name may be looked up and dialled, as far as its addresses allow it."""
        return NAME.fullmatch(name) is not None and any(
            port in entry.ports and (name == entry.name or (entry.name[:1] == "*" and name.endswith(entry.name[1:])))
            for entry in self.entries
            if entry.name
        )

    def has_address(self, address: Address, port: int, *, named: bool) -> bool:
        """Whether the address may be dialled, ``named`` by a name on the list or by itself.

        One that is not public must lie in a block that is itself part of such a range: ``0.0.0.0/0`` does not open the
        local network.
        """
        address = unmapped(address)
        blocks = [e.block for e in self.entries if e.block and address in e.block and port in e.ports]
        special = [block for block in NOT_PUBLIC if address in block]
        if not special:
            return named or bool(blocks)
        # Both hold the address, so the one with the longer prefix lies within the other.
        return any(block.prefixlen >= wider.prefixlen for block in blocks for wider in special)


def parse(entries: Iterable[str], *, field: str) -> AllowList:
    """The list these entries stand for. ``ValueError`` naming the ``field`` for one that is none."""
    if isinstance(entries, str):
        raise ValueError(f"{field} = {entries!r}: expected a tuple of entries, as in ({entries!r},)")
    return AllowList(tuple(_entry(text, field) for text in entries))


def unmapped(address: Address) -> Address:
    """The IPv4 address within an IPv6 one that only wraps it."""
    return getattr(address, "ipv4_mapped", None) or address


def _entry(text: str, field: str) -> Entry:
    if not isinstance(text, str):
        raise ValueError(f"{field} has {text!r}: expected {EXPECTED}")
    matched = ENTRY.fullmatch(text)
    host = matched["bracketed"] or matched["host"] if matched else text
    ports = (int(matched["port"]),) if matched and matched["port"] else DEFAULT_PORTS
    if not all(0 < port < 1 << 16 for port in ports):
        raise ValueError(f"{field} has {text!r}: expected a port from 1 to 65535")
    if NAME.fullmatch(host.removeprefix("*.")):
        return Entry(host, None, ports)
    try:
        block = ipaddress.ip_network(host)
    except ValueError as error:
        raise ValueError(f"{field} has {text!r} ({error}): expected {EXPECTED}") from error
    if unmapped(block.network_address) != block.network_address:
        raise ValueError(f"{field} has {text!r}: expected the IPv4 block itself, not wrapped in IPv6")
    return Entry("", block, ports)
