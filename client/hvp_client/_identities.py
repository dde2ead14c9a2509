"""Records of API keys, and of who the server takes a client for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hvp_protos.v1 import key_pb2, system_pb2

from hvp_client._times import from_timestamp


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """An API key as the server has it, which is without its secret.

    Attributes:
        name: `projects/{project}/keys/{id}`; with `-` for the project it opens every one.
        role: `read`, `submit` or `admin`; each may do what those before it may.
        label: Words by which people tell it from others.
        create_time: When it was made, UTC.
        expire_time: When it expires, UTC; None: never.
        revoke_time: When it was revoked, UTC; None: it was not.
        use_time: When it was last used, UTC, to the minute; None: never.
    """

    name: str
    role: str
    label: str
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None
    use_time: datetime | None


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who a server takes a client for.

    Attributes:
        kind: What shows it: `key`, `token`, `certificate`, or `local` for a client on the server's
            machine that shows nothing.
        subject: Id of the API key, subject of the token, or common name of the certificate.
        projects: The projects that are there for it; None means all.
        role: `read`, `submit` or `admin`.
        expire_time: When that ends, UTC; None: never.
    """

    kind: str
    subject: str
    projects: tuple[str, ...] | None
    role: str
    expire_time: datetime | None


def key_from_proto(message: key_pb2.Key) -> ApiKey:
    """Make an `ApiKey` of its message."""
    times = {
        name: from_timestamp(getattr(message, name)) if message.HasField(name) else None
        for name in ("expire_time", "revoke_time", "use_time")
    }
    return ApiKey(
        name=message.name,
        role=message.role,
        label=message.label,
        create_time=from_timestamp(message.create_time),
        **times,
    )


def caller_from_proto(message: system_pb2.WhoAmIResponse) -> Caller:
    """Make a `Caller` of its message."""
    projects = tuple(name.removeprefix("projects/") for name in message.projects)
    return Caller(
        kind=message.kind,
        subject=message.subject,
        projects=projects or None,
        role=message.role,
        expire_time=(
            from_timestamp(message.expire_time) if message.HasField("expire_time") else None
        ),
    )
