"""Where a server may be: on this machine, as long as nothing on the way is encrypted."""

from __future__ import annotations

import ipaddress
import re

from hvp_client._exceptions import InvalidArgumentError

_LAST_PORT = (1 << 16) - 1


def refuse_clear_text(address: str) -> None:
    """Refuse an address to which models, data and results would travel for all to read.

    Args:
        address: HOST:PORT, or any other that gRPC takes.

    Raises:
        InvalidArgumentError: `CLEARTEXT_REFUSED`; `ADDRESS_INVALID` for a port that there is not.
    """
    port = re.search(r":(\d+)$", address)
    if port is not None and int(port[1]) > _LAST_PORT and is_on_this_machine(address):
        raise InvalidArgumentError(
            f"{address} has a port beyond {_LAST_PORT}; give HOST:PORT as the server printed it",
            reason="ADDRESS_INVALID",
            field="address",
        )
    if not is_on_this_machine(address):
        raise InvalidArgumentError(
            f"{address} is not this machine, and there is no TLS yet: models and data would travel "
            "there in clear text. Open a tunnel, ssh -L 8471:127.0.0.1:8471 HOST, and use "
            "127.0.0.1:8471",
            reason="CLEARTEXT_REFUSED",
            field="address",
            metadata={"address": address},
        )


def is_on_this_machine(address: str) -> bool:
    """Whether what is sent to an address stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    plain = re.sub(r"^(dns:(//[^/]*/)?|ipv4:|ipv6:)", "", address)
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
