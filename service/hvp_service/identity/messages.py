"""API keys and callers as messages."""

from __future__ import annotations

from hvp_protos.v1 import key_pb2, system_pb2

from hvp_service.calls.messages import timestamp
from hvp_service.identity.caller import Identity
from hvp_service.identity.keys import ApiKey


def key_message(key: ApiKey) -> key_pb2.Key:
    """Make the message of a key."""
    return key_pb2.Key(
        name=str(key.name),
        role=key.role,
        label=key.label,
        create_time=timestamp(key.create_time),
        expire_time=timestamp(key.expire_time),
        revoke_time=timestamp(key.revoke_time),
        use_time=timestamp(key.use_time),
    )


def ttl_value(request: key_pb2.CreateKeyRequest) -> float | None:
    """Seconds that a key is to live; None: for ever."""
    ttl = request.ttl
    return ttl.seconds + ttl.nanos / 1e9 if request.HasField("ttl") else None


def identity_message(identity: Identity) -> system_pb2.WhoAmIResponse:
    """Make the answer to who calls."""
    return system_pb2.WhoAmIResponse(
        kind=identity.kind,
        subject=identity.subject,
        projects=[f"projects/{project}" for project in sorted(identity.projects or ())],
        role=identity.role,
        expire_time=timestamp(identity.expire_time),
    )
