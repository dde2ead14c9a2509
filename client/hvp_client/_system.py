"""Records of the server and of its worker groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hvp_protos.v1 import system_pb2

from hvp_client._enums import plain_name
from hvp_client._times import from_timestamp


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """A server's version and what it serves.

    Attributes:
        version: Version of the `hvp` distribution that the server runs.
        dtypes: Dtypes that it computes in.
        operator_kinds: Kinds of operator that it serves, as `Client.operator` takes them.
        precisions: Precisions that its ranks' device has, as `Client.operator` takes them.
        start_time: When the server started, UTC.
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
        rank: Number of the rank, from 0.
        hostname: Name of the machine that it runs on.
        pid: Process id on that machine.
        resident_bytes: Its resident memory at present.
        num_threads: Number of threads that it computes with.
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
        generation: Id that changes when the ranks are started anew; vectors that are not durable
            end then.
        device: Device that the ranks compute on, `cpu` or `cuda`.
        ranks: The group's processes, in the order of their numbers.
    """

    name: str
    state: str
    generation: str
    device: str
    ranks: tuple[Rank, ...]


def server_info_from_proto(message: system_pb2.GetServerInfoResponse) -> ServerInfo:
    """Make a `ServerInfo` of its message."""
    return ServerInfo(
        version=message.version,
        dtypes=tuple(message.dtypes),
        operator_kinds=tuple(kind.removeprefix("KIND_").lower() for kind in message.operator_kinds),
        precisions=tuple(message.precisions),
        start_time=from_timestamp(message.start_time),
    )


def worker_group_from_proto(message: system_pb2.WorkerGroup) -> WorkerGroup:
    """Make a `WorkerGroup` of its message."""
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
