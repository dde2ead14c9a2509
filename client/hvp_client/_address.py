"""Addresses of servers: on this machine alone, where traffic is not encrypted."""

from __future__ import annotations

import ipaddress
import re

from hvp_operations.wording import shown

from hvp_client._exceptions import InvalidArgumentError

_SOCKETS = ("unix:", "unix-abstract:")
DEFAULT_PORT = 8471
DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"
_LAST_PORT = (1 << 16) - 1


def reachable_address(address: str, *, encrypted: bool = False) -> str:
    """Write an address as gRPC takes it, and refuse one to which data would travel for all to read.

    Args:
        address: HOST:PORT, or any other address that gRPC takes. `http://`, or `https://` where
            traffic is encrypted, may stand before it, and an address of this machine may leave out
            the port, which is then the default one.
        encrypted: Whether what is sent there will be encrypted.

    Returns:
        The address.

    Raises:
        InvalidArgumentError: `ADDRESS_INVALID`: the form or the port is wrong. `CLEARTEXT_REFUSED`:
            the address is of another machine, and nothing would be encrypted.
    """
    address = address.removeprefix("https://" if encrypted else "http://").removesuffix("/")
    if ":" not in address.rpartition("]")[2] and is_on_this_machine(address):
        address = f"{address}:{DEFAULT_PORT}"
    if not _is_well_formed(address):
        raise InvalidArgumentError(
            f"{shown(address)} is no address; give HOST:PORT as the server printed it",
            reason="ADDRESS_INVALID",
            field="address",
        )
    if not encrypted and not is_on_this_machine(address):
        raise InvalidArgumentError(
            f"{address} is not this machine, and models and data would travel there in clear text. "
            "Give certificates, as tls=Tls(...) or as HVP_CA, HVP_CLIENT_CERTIFICATE and "
            "HVP_CLIENT_KEY; or open a tunnel, ssh -L 8471:127.0.0.1:8471 HOST, and use "
            "127.0.0.1:8471",
            reason="CLEARTEXT_REFUSED",
            field="address",
            metadata={"address": address},
        )
    return address


def _is_well_formed(address: str) -> bool:
    """Whether it is HOST:PORT, or the path of a socket."""
    if address.startswith(_SOCKETS):
        return True
    found = re.fullmatch(r"(?:\[[^\]\s]+\]|[^\[\]:/\s]+):(\d{1,5})", _without_scheme(address))
    return found is not None and int(found[1]) <= _LAST_PORT


def _without_scheme(address: str) -> str:
    return re.sub(r"^(dns:(//[^/]*/)?|ipv4:|ipv6:)", "", address)


def is_on_this_machine(address: str) -> bool:
    """Whether what is sent to an address stays on this machine."""
    if address.startswith(_SOCKETS):
        return True
    plain = _without_scheme(address)
    bracketed = re.fullmatch(r"\[([^\]]*)\](:\d+)?", plain)
    host = bracketed[1] if bracketed else plain.partition(":")[0]
    if plain.count(":") > 1 and not bracketed:
        host = plain  # an IPv6 address alone
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
