"""Certificates of a server: what it shows to clients, and whose clients it lets in."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hvp_service.app.config import ServerConfig


class TlsError(ValueError):
    """A file of certificates or of a key does not do; the message says why and what to do."""


@final
@dataclass(frozen=True, kw_only=True)
class Certificates:
    """PEM certificates of a server.

    Attributes:
        chain: Its own certificate, with those between it and its authority.
        key: The private key.
        client_authorities: Those whose clients are let in; None lets in everybody.
    """

    chain: bytes
    key: bytes = field(repr=False)
    client_authorities: bytes | None


def read_certificates(config: ServerConfig) -> Certificates | None:
    """Read a server's certificates, and see that they can do what they are for.

    Returns:
        None where a server of this machine alone has none.

    Raises:
        TlsError: A file cannot be read, or holds something else; the certificate is not one of the
            key, or not valid now.
    """
    if config.tls_certificate is None or config.tls_key is None:
        return None
    chain, key = _bytes(config.tls_certificate), _bytes(config.tls_key)
    own, *_ = _parsed(config.tls_certificate, "certificate", x509.load_pem_x509_certificates, chain)
    private = _parsed(config.tls_key, "private key", _key, key)
    if own.public_key() != private.public_key():
        raise TlsError(
            f"{config.tls_key} is not the key of {config.tls_certificate}: give the two that were "
            "made together"
        )
    now = datetime.datetime.now(datetime.UTC)
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        raise TlsError(
            f"{config.tls_certificate} is valid from {own.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now is {now:%Y-%m-%d %H:%M}: renew "
            "it, or set the clock"
        )
    authorities = None
    if config.tls_client_ca is not None:
        authorities = _bytes(config.tls_client_ca)
        _parsed(config.tls_client_ca, "certificate", x509.load_pem_x509_certificates, authorities)
    return Certificates(chain=chain, key=key, client_authorities=authorities)


def _key(contents: bytes) -> Any:
    return load_pem_private_key(contents, None)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path} cannot be read: {error.strerror}") from None


def _parsed(path: Path, what: str, parse: Callable[[bytes], Any], contents: bytes) -> Any:
    try:
        return parse(contents)
    except (ValueError, TypeError) as error:  # a key with a passphrase is a TypeError
        raise TlsError(f"{path} holds no {what} in PEM form that can be read: {error}") from None
