"""Ways to a server: its address with, where there are certificates, encryption."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import grpc

from hvp_client._address import reachable_address
from hvp_client._credentials import Credentials
from hvp_client._exceptions import InvalidArgumentError
from hvp_client._settings import Tls

Options = Sequence[tuple[str, Any]]


@final
@dataclass(frozen=True)
class Way:
    """A way to one server, which channels are opened along.

    Attributes:
        address: The address, as gRPC takes it.
        server_name: Name in the server's certificate where that is not the address's host.
        credentials: Of encrypted channels; None for clear text, which stays on this machine.
        api_key: What calls show; None: nothing.
    """

    address: str
    server_name: str | None = None
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    api_key: Credentials | None = None

    @classmethod
    def to(cls, address: str, tls: Tls | None, api_key: Credentials | None = None) -> Way:
        """The way to an address.

        Args:
            address: HOST:PORT, or any other address that gRPC takes; `https://` before it asks
                for encryption.
            tls: Certificates; None for clear text, or with `https://` for those of gRPC.
            api_key: What calls show.

        Raises:
            InvalidArgumentError: `ADDRESS_INVALID`: the address is malformed. `CLEARTEXT_REFUSED`:
                it is of another machine, and there are no certificates. `TLS_FILES_INVALID`: a
                file of certificates or of a key cannot be read, or one of the two is missing.
        """
        if tls is None and address.startswith("https://"):
            tls = Tls()
        at = reachable_address(address, encrypted=tls is not None)
        if tls is None:
            return cls(at, api_key=api_key)
        if (tls.certificate is None) != (tls.key is None):
            missing = "key" if tls.key is None else "certificate"
            raise _invalid(missing, "a client's certificate and its key go together")
        ca = _contents(tls, "ca", "CERTIFICATE")
        chain, key = (
            _contents(tls, "certificate", "CERTIFICATE"),
            _contents(tls, "key", "PRIVATE KEY"),
        )
        _check(tls)
        credentials = grpc.ssl_channel_credentials(ca, private_key=key, certificate_chain=chain)
        return cls(at, tls.server_name, credentials, api_key)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call on a channel carries along.

        Raises:
            InvalidArgumentError: `API_KEY_INVALID`.
        """
        return () if self.api_key is None else self.api_key.metadata()

    def channel(self, options: Options) -> grpc.Channel:
        """A channel for blocking calls."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, self.credentials, options=self._named(options))

    def awaited_channel(self, options: Options) -> grpc.aio.Channel:
        """A channel of the running event loop."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        return grpc.aio.secure_channel(self.address, self.credentials, options=self._named(options))

    def _named(self, options: Options) -> Options:
        if self.server_name is None:
            return options
        return [*options, ("grpc.ssl_target_name_override", self.server_name)]


def _check(tls: Tls) -> None:
    """See that files that can be read can be used, certificate and key with one another."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
    except ssl.SSLError as error:
        raise _invalid("ca", f"{tls.ca} holds no certificate: {error.reason}") from None
    try:
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except ssl.SSLError as error:
        problem = f"{tls.key} is not the key of {tls.certificate}: {error.reason}"
        raise _invalid("key", problem) from None


def _contents(tls: Tls, name: str, label: str) -> bytes | None:
    """The bytes of a PEM file of `tls`; None where there is none."""
    given = getattr(tls, name)
    if given is None:
        return None
    try:
        found = Path(given).read_bytes()
    except OSError as error:
        raise _invalid(name, f"{given} cannot be read: {error.strerror}") from None
    if f"{label}-----".encode() not in found:
        raise _invalid(name, f"{given} holds no {label.lower()} in PEM form")
    if b"ENCRYPTED" in found:
        raise _invalid(name, f"{given} has a passphrase; write the key to a file without one")
    return found


def _invalid(name: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(problem, reason="TLS_FILES_INVALID", field=f"tls.{name}")
