"""What ``allowed_hosts`` means: which names, and which addresses behind them, may be reached.

No socket and no resolver: whoever connects asks :meth:`AllowedHosts.allows_name` before a name is resolved
(a name server is a way out as well), and :meth:`AllowedHosts.check_address` for every address it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from code_sandboxes.errors import SandboxConfigurationError

__all__ = [
    "DEFAULT_PORTS",
    "HOST_NAME",
    "AllowedHosts",
    "NotAllowedError",
    "canonical_host",
    "is_address",
    "with_port",
]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

HOST_NAME = "host.sandbox.internal"
"""The machine itself, its loopback; it has to be listed with the port."""

DEFAULT_PORTS = (80, 443)
"""Where an entry names none."""

# The IANA special-purpose address registries (RFC 6890 and its updates), and what is not unicast at all. They
# are here because what ipaddress takes for global differs between versions of Python (CVE-2024-4032).
_NOT_GLOBAL: dict[int, tuple[Network, ...]] = {
    4: tuple(
        IPv4Network(network)
        for network in (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",  # a cloud's metadata and keys, behind a global address of all things (Azure)
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        )
    ),
    6: tuple(
        IPv6Network(network)
        for network in (
            "::/3",  # with the next two: all but 2000::/3, the global unicast addresses (RFC 4291, 2.4)
            "4000::/2",
            "8000::/1",
            "2001::/23",  # Teredo, ORCHID, benchmarks
            "2001:db8::/32",
            "2002::/16",  # 6to4
            "3fff::/20",
        )
    ),
}

# A translator makes of these the IPv4 address in the last 32 bits (RFC 6052, section 2.1).
_NAT64 = IPv6Network("64:ff9b::/96")

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_LONGEST_NAME = 253
_LONGEST_ENTRY = 1024

# What the C library reads as an address although it is none: 127.1, 0x7f.1, 0177.0.0.1, 2130706433
# (inet_aton(3); the rule is that of the URL standard, "ends in a number").
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

# Letters that the two versions of IDNA map to different domains (UTS 46, section 2.2).
_DEVIATIONS = re.compile("[\u00df\u1e9e\u03c2\u200c\u200d]")


class NotAllowedError(Exception):
    """The policy does not let it through; says why in words."""


@dataclass(frozen=True, slots=True)
class _Port:
    """The end of an entry: a number, ``*``, or nothing."""

    text: str

    def covers(self, port: int) -> bool:
        return self.text == "*" or (str(port) == self.text if self.text else port in DEFAULT_PORTS)


@dataclass(frozen=True, slots=True)
class _Name:
    """A name, or with *below* all those below it."""

    name: str
    below: bool
    port: _Port

    def covers(self, host: str, port: int) -> bool:
        if self.below:
            return host.endswith(f".{self.name}") and host != HOST_NAME and self.port.covers(port)
        return host == self.name and self.port.covers(port)


@dataclass(frozen=True, slots=True)
class _Addresses:
    """An address, or a network."""

    network: Network
    port: _Port

    @property
    def is_one(self) -> bool:
        return self.network.num_addresses == 1

    def covers(self, address: Address, port: int) -> bool:
        return address in self.network and self.port.covers(port)

    @property
    def names_private_ones(self) -> bool:
        """Whoever writes 10.0.0.0/8 means private addresses; who writes 0.0.0.0/0 may not think of them."""
        return self.is_one or any(
            _is_inside(self.network, wider) for wider in _NOT_GLOBAL[self.network.version]
        )


class AllowedHosts:
    """
    Args:
        entries: ``"example.org"``; ``"*.example.org"``, all below it and not itself; an address; a network
            (CIDR). Each may end in a port or in ``:*``; without, ports 80 and 443 are meant. ``"localhost"``
            and loopback addresses are the sandbox's own, which it reaches without asking.

    Raises:
        SandboxConfigurationError: an entry is none of that.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        if isinstance(entries, str):
            raise SandboxConfigurationError(
                f"allowed_hosts is a list of hosts, not one string: [{entries!r}]"
            )
        parsed = [_parsed(entry) for entry in entries]
        self._by_name = tuple(entry for entry in parsed if isinstance(entry, _Name))
        self._by_address = tuple(entry for entry in parsed if isinstance(entry, _Addresses))
        self.is_empty = not parsed

    def allows_name(self, host: str, port: int) -> bool:
        """
        Args:
            host: as :func:`canonical_host` gives it.
        """
        return any(True for _ in self._ports_of(host, port))

    def names_port(self, host: str, port: int) -> bool:
        """Does an entry name the port, so that whatever is spoken there is meant?"""
        return any(named.text for named in self._ports_of(host, port))

    def _ports_of(self, host: str, port: int) -> Iterator[_Port]:
        if is_address(host):
            address = ip_address(host)
            yield from (entry.port for entry in self._by_address if entry.covers(address, port))
        yield from (entry.port for entry in self._by_name if entry.covers(host, port))

    def check_address(self, host: str, address: str, port: int, *, is_own: bool = False) -> None:
        """
        Args:
            host: whose address it is, for the sentence.
            is_own: it is one of this machine's; it reaches what a firewall keeps from others.

        Raises:
            NotAllowedError: it is neither global nor named by an entry, or this machine's.
        """
        found = _seen_through(_address_of(host, address))
        where = f"{host} is at {found}" if str(found) != host else str(found)
        everything = [found, *_embedded(found)]
        if any(_is_never_allowed(each) for each in everything):
            raise NotAllowedError(f"{where}, and loopback, multicast and 'any' addresses are never allowed")
        for each in everything:
            if self._names_as_such(each, port, exactly=is_own):
                continue
            if is_own:
                raise NotAllowedError(
                    f"{where}, an address of the machine itself; add '{HOST_NAME}:{port}' to"
                    " allowed_hosts and use that name to reach what listens on its loopback"
                )
            if not _is_global(each):
                as_such = with_port(str(each), port)
                raise NotAllowedError(
                    f"{where}, which is not a global address; add '{as_such}' to allowed_hosts"
                )

    def _names_as_such(self, address: Address, port: int, *, exactly: bool) -> bool:
        return any(
            entry.covers(address, port) and (entry.is_one if exactly else entry.names_private_ones)
            for entry in self._by_address
        )


def canonical_host(text: str) -> str:
    """A name in lower case without the root's dot, or an address as :mod:`ipaddress` writes it.

    Args:
        text: ASCII; an IPv6 address in brackets.

    Raises:
        ValueError: it is neither, or one that somebody else could read differently.
    """
    if text.startswith("[") and text.endswith("]"):
        _refuse_zone(text)
        return str(_seen_through(IPv6Address(text[1:-1])))
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if not name.isascii() or len(name) > _LONGEST_NAME or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("it is not a host name")
    if not _NUMBER.fullmatch(labels[-1]):
        return name
    try:
        return str(IPv4Address(name))
    except ValueError:
        raise ValueError("it is not an address in the usual form (four decimal numbers)") from None


def is_address(host: str) -> bool:
    """Is what :func:`canonical_host` gave an address?"""
    return ":" in host or host.rpartition(".")[2].isdigit()


def is_loopback_of_the_sandbox(host: str) -> bool:
    """Does a program in the sandbox that asks for *host* mean its own loopback (RFC 6761, section 6.3)?"""
    if is_address(host):
        return ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _parsed(entry: object) -> _Name | _Addresses | None:
    """None: the sandbox's own loopback."""
    try:
        if not isinstance(entry, str):
            raise ValueError("it is not a string")
        return _parsed_text(entry)
    except ValueError as error:
        shown = ascii(entry) if len(str(entry)) <= 100 else f"{str(entry)[:100]!a}..."
        raise SandboxConfigurationError(
            f"allowed_hosts: cannot understand {shown}: {error} (examples: 'example.org', '*.example.org',"
            " 'example.org:8080', 'example.org:*', '192.0.2.1', '[2001:db8::1]:443', '10.0.0.0/8')"
        ) from None


def _parsed_text(entry: str) -> _Name | _Addresses | None:
    if len(entry) > _LONGEST_ENTRY:
        raise ValueError(f"it has more than {_LONGEST_ENTRY} characters")
    if "://" in entry:
        raise ValueError("it is an address of a page; a host has no scheme and no path")
    host, port = _split(entry)
    network = _network(host)
    if network is not None:
        return None if _is_inside(network, _LOOPBACK[network.version]) else _Addresses(network, port)
    below = host.startswith("*.")
    if "*" in host.removeprefix("*."):
        raise ValueError("'*' stands for a whole first label only; network_policy='all' allows every host")
    name = canonical_host(_in_ascii(host.removeprefix("*.")))
    if is_address(name):
        raise ValueError("it is an address, in a form that addresses do not have")
    if is_loopback_of_the_sandbox(name):
        return None
    if name == HOST_NAME and (below or not port.text.isdigit()):
        raise ValueError(f"this machine is allowed port by port: '{HOST_NAME}:8080'")
    return _Name(name, below, port)


_LOOPBACK: dict[int, Network] = {4: IPv4Network("127.0.0.0/8"), 6: IPv6Network("::1/128")}


def _split(entry: str) -> tuple[str, _Port]:
    """Where there is more than one colon and no bracket, all of it is an IPv6 address."""
    if entry.count(":") > 1 and not entry.startswith("["):
        return f"[{entry}]", _Port("")
    host, colon, port = entry.rpartition(":") if not entry.endswith("]") else (entry, "", "")
    if not colon:
        return entry, _Port("")
    if port != "*" and not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError(f"a port is a number from 1 to 65535, or '*', not {port[:20]!a}")
    return host, _Port(port if port == "*" else str(int(port)))


def _network(host: str) -> Network | None:
    """The addresses that *host* stands for; None if it is a name."""
    is_v6 = host.startswith("[")
    text = host.removeprefix("[").removesuffix("]") if is_v6 else host
    if not is_v6 and not re.fullmatch(r"[0-9.]+(/[0-9]+)?", text):
        if "/" in text:
            raise ValueError("a host has no path")
        return None
    _refuse_zone(text)
    kind = IPv6Network if is_v6 else IPv4Network
    try:
        network: Network = kind(text, strict=False)
    except ValueError:
        raise ValueError("it is neither an address in the usual form nor a network") from None
    if network.network_address != ip_address(text.partition("/")[0]):
        raise ValueError(f"the network of that size that it is in is {network}")
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        network = _seen_through_network(network)
    if network.is_multicast or _is_inside(network, _NOT_GLOBAL[4][0]) or network == IPv6Network("::/128"):
        raise ValueError("nothing can be connected to there")
    return network


def _seen_through_network(network: IPv6Network) -> Network:
    first = _seen_through(network.network_address)
    return IPv4Network((first, network.prefixlen - 96)) if isinstance(first, IPv4Address) else network


def _in_ascii(name: str) -> str:
    """Names of other scripts as the domain name system has them (IDNA)."""
    if name.isascii():
        return name
    if _DEVIATIONS.search(name):
        raise ValueError("not all programs take it for the same domain; write it in ASCII ('xn--...')")
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise ValueError(f"it is not a host name: {error}") from None


def _refuse_zone(address: str) -> None:
    if "%" in address:
        raise ValueError("an address with a zone means something else on every machine")


def _address_of(host: str, text: str) -> Address:
    try:
        _refuse_zone(text)
        return ip_address(text)
    except ValueError as error:
        raise NotAllowedError(f"{host} is at {text!a}: {error}") from None


def _seen_through(address: Address) -> Address:
    """The IPv4 address that is really connected to, where an IPv6 one is only its wrapping."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _embedded(address: Address) -> list[Address]:
    """Where a tunnel would deliver to (RFC 3056, 6to4; RFC 4380, Teredo)."""
    if isinstance(address, IPv6Address):
        if address.sixtofour is not None:
            return [address.sixtofour]
        if address.teredo is not None:
            return list(address.teredo)
    return []


def _is_never_allowed(address: Address) -> bool:
    # Linux connects to this machine where 0.0.0.0 or :: is asked for.
    return (
        address.is_loopback
        or address.is_unspecified
        or address.is_multicast
        or address in _THIS_NETWORK
        or address == _BROADCAST
    )


_THIS_NETWORK = IPv4Network("0.0.0.0/8")
_BROADCAST = IPv4Address("255.255.255.255")


def _is_global(address: Address) -> bool:
    return address.is_global and not any(address in network for network in _NOT_GLOBAL[address.version])


def _is_inside(network: Network, wider: Network) -> bool:
    if isinstance(network, IPv4Network):
        return isinstance(wider, IPv4Network) and network.subnet_of(wider)
    return isinstance(wider, IPv6Network) and network.subnet_of(wider)


def with_port(host: str, port: int) -> str:
    """As :class:`AllowedHosts` takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
