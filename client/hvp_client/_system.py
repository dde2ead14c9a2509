"""What the server is, and how its workers are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hvp_protos.v1 import system_pb2

from hvp_client._enums import plain_name
from hvp_client._times import from_timestamp


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server is and serves.

    Attributes:
        version: Of the `hvp` distribution it runs.
        dtypes: It computes in.
        operator_kinds: As `Client.operator` takes them.
        precisions: The same.
        start_time: UTC.
    """

    version: str
    dtypes: tuple[str, ...]
    operator_kinds: tuple[str, ...]
    precisions: tuple[str, ...]
    start_time: datetime


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of a worker group.

    Attributes:
        rank: From 0.
        hostname: Of its machine.
        pid: On that machine.
        resident_bytes: Resident set now.
        num_threads: It computes with.
    """

    rank: int
    hostname: str
    pid: int
    resident_bytes: int
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """Processes that hold one model in shards and compute in step.

    Attributes:
        name: `projects/{project}/workerGroups/{id}`.
        state: `STARTING`, `READY` or `LOST`.
        generation: Changes when the ranks are started anew; vectors that are not durable end then.
        device: `cpu` or `cuda`.
        ranks: In order.
    """

    name: str
    state: str
    generation: str
    device: str
    ranks: tuple[Rank, ...]


def server_info_from_proto(message: system_pb2.GetServerInfoResponse) -> ServerInfo:
    """Make the record of a message."""
    return ServerInfo(
        version=message.version,
        dtypes=tuple(message.dtypes),
        operator_kinds=tuple(kind.removeprefix("KIND_").lower() for kind in message.operator_kinds),
        precisions=tuple(message.precisions),
        start_time=from_timestamp(message.start_time),
    )


def worker_group_from_proto(message: system_pb2.WorkerGroup) -> WorkerGroup:
    """Make the record of a message."""
    return WorkerGroup(
        name=message.name,
        state=plain_name(system_pb2.WorkerGroup.State, message.state, "STATE_"),
        generation=message.generation,
        device=message.device,
        ranks=tuple(
            Rank(
                rank=rank.rank,
                hostname=rank.hostname,
                pid=rank.pid,
                resident_bytes=rank.resident_bytes,
                num_threads=rank.num_threads,
            )
            for rank in message.ranks
        ),
    )
