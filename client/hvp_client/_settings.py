"""Settings of a client: how long calls may take, how long they are tried again, and encryption."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timeout:
    """How long a call may take, in seconds.

    Attributes:
        call_s: Time for a call that computes nothing: looking up, listing, deleting.
        compute_s: Time for a call that loads or evaluates the model: loss, gradient, product, and
            the check of a checkpoint.
        silence_s: A stream on which nothing moves for so long counts as broken, be it that nothing
            arrives or that the server takes nothing of an upload. A watched job sends a heartbeat
            every 15 s.
        lease_s: When the server hears nothing of this client for so long, it takes it for dead and
            deletes its vectors; None lets the server choose. An event loop that is held up for
            longer, or a process that is suspended, loses them too.
    """

    call_s: float = 60.0
    compute_s: float = 3600.0
    silence_s: float = 60.0
    lease_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("call_s", "compute_s", "silence_s", "lease_s"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"Timeout.{name} must be positive and finite")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How long a call is tried again when the server cannot answer now, in seconds.

    Only answers that promise that a later try may succeed are tried again; every call that
    changes something carries a request id, so a second try cannot do it twice.

    Attributes:
        patience_s: A call is tried again until this long after its first failure; 0 means never.
        job_patience_s: The same limit while a job is waited for or watched: long enough for a
            server to be started anew and load its model.
        contact_s: The same limit for an address that has never answered this client.
        initial_backoff_s: Pause before the second try.
        max_backoff_s: Longest pause; pauses double until then.
    """

    patience_s: float = 10.0
    job_patience_s: float = 180.0
    contact_s: float = 2.0
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("patience_s", "job_patience_s", "contact_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Retry.{name} must be finite and not negative")
        if not 0 < self.initial_backoff_s <= self.max_backoff_s < math.inf:
            raise ValueError("Retry needs 0 < initial_backoff_s <= max_backoff_s")

    def backoff_s(self, failures: int) -> float:
        """Pause after the `failures`-th failure in a row (from 1), before jitter, seconds."""
        # The exponent is capped so that a long outage cannot overflow a float.
        return min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** min(failures - 1, 30))


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Certificates by which a client and a server show each other who they are: PEM files.

    Attributes:
        ca: Certificates of the authorities whose servers are believed; None for those that gRPC
            brings along, which sign names of the public internet.
        certificate: The client's own certificate, with those between it and its authority.
        key: The private key of `certificate`, without a passphrase.
        server_name: The name that the server's certificate has, where that is not the host of the
            address, as behind a tunnel.
    """

    ca: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    @classmethod
    def from_environment(cls) -> Tls | None:
        """What HVP_CA, HVP_CLIENT_CERTIFICATE, HVP_CLIENT_KEY and HVP_SERVER_NAME say.

        Returns:
            None where none of them is set.
        """
        names = ("HVP_CA", "HVP_CLIENT_CERTIFICATE", "HVP_CLIENT_KEY", "HVP_SERVER_NAME")
        found = [os.environ.get(name) or None for name in names]
        if not any(found):
            return None
        ca, certificate, key, server_name = found
        return cls(ca=ca, certificate=certificate, key=key, server_name=server_name)
