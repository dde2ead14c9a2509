"""Whether a job has room on the ranks, known before it is queued."""

from __future__ import annotations

from hvp_operations.operation import Cost, Facts
from hvp_workers.room import least_bytes

from hvp_service.errors import ServiceError
from hvp_service.group_supervisor import GroupSupervisor
from hvp_service.job_store import JobSpec
from hvp_service.operator_resolver import ResolvedOperator
from hvp_service.vector_store import ITEM_BYTES


def facts_of(resolved: ResolvedOperator) -> Facts:
    """What an operation may know of an operator before anything runs."""
    return Facts(num_parameters=resolved.num_parameters, kind=resolved.operator.kind)


async def check_fits(group: GroupSupervisor, asked: JobSpec, resolved: ResolvedOperator) -> Cost:
    """Refuse what the ranks would have no room for if all their memory were free.

    The bound is an optimistic one: whatever it refuses, the ranks' own plan would refuse too,
    which also knows what is in use.

    Returns:
        What the job takes.

    Raises:
        ServiceError: INSUFFICIENT_CLUSTER_MEMORY (metadata: needed and available bytes, of the rank
            that has least), WORKER_GROUP_LOST.
    """
    cost = asked.declared.cost(asked.spec, facts_of(resolved))
    ranks = await group.call(lambda backend: backend.ranks())
    available = min((rank.memory_bytes for rank in ranks), default=0)
    dimension, dtype = resolved.num_parameters, resolved.operator.space.dtype
    needed = least_bytes(cost, dimension * ITEM_BYTES[dtype] / max(1, len(ranks)))
    if 0 < available < needed:  # 0: the ranks do not tell
        raise ServiceError(
            "INSUFFICIENT_CLUSTER_MEMORY",
            f"{asked.declared.headline(asked.spec)} of an operator of order {dimension} in {dtype} "
            f"takes at least {needed} bytes on each of {len(ranks)} ranks, and one has {available} "
            "in all; ask for less, or use more workers or float32.",
            field=f"spec.{asked.operation}",
            metadata={"needed_bytes": str(needed), "available_bytes": str(available)},
        )
    return cost
