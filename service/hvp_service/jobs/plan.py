"""Plans of jobs: the cost of a job, and whether it fits on the ranks, before it is queued."""

from __future__ import annotations

from dataclasses import dataclass

from hvp_operations.operation import Cost
from hvp_workers.room import composed_vectors, needed_bytes

from hvp_service.calls.errors import ServiceError
from hvp_service.group.supervisor import GroupSupervisor
from hvp_service.jobs.store import JobSpec
from hvp_service.operators.resolver import ResolvedOperator
from hvp_service.vectors.store import ITEM_BYTES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a job, and the ranks' memory for it.

    Attributes:
        cost: Upper bounds on products and vectors.
        seconds_per_product: Median of the latest job on the same operator; 0 where there was none.
        num_ranks: Number of ranks that share each vector.
        least_bytes: Memory on each rank without which the job does not begin, with that of the
            vectors which it names, and of those that an operator of several matrices works with. A
            deterministic operator's jobs begin with all that they wish.
        wished_bytes: Memory on each rank that the job takes where there is enough.
        available_bytes: Memory of the rank that has least, free or in use; 0 where the ranks do not
            tell.
        problem: Why the job does not fit, and what would; "" where it may fit.
        reason: The reason of the refusal that `problem` is.
    """

    cost: Cost
    seconds_per_product: float
    num_ranks: int
    least_bytes: int
    wished_bytes: int
    available_bytes: int
    problem: str
    reason: str


async def plan_of(
    group: GroupSupervisor,
    asked: JobSpec,
    resolved: ResolvedOperator,
    seconds_per_product: float = 0.0,
) -> Plan:
    """Compare what a job takes with what the ranks would have if all their memory were free.

    The bound is an optimistic one: whatever does not fit, the ranks' own plan would refuse too,
    which also knows what is in use.

    Args:
        group: The ranks.
        asked: The job's question.
        resolved: The operator of the question.
        seconds_per_product: Time of a product; 0 where it is not known.

    Raises:
        ServiceError: WORKER_GROUP_LOST.
    """
    cost = asked.declared.cost(asked.spec, resolved.facts)
    beside = len({name for names in asked.inputs.values() for name in names})
    beside += composed_vectors(resolved.operator.composition)
    ranks = await group.call(lambda backend: backend.ranks())
    available = min((rank.memory_bytes for rank in ranks), default=0)
    dtype, shape = resolved.operator.space.dtype, (resolved.num_outputs, resolved.num_arguments)
    elements = shape[1] if resolved.codomain is resolved.domain else sum(shape)
    vector_bytes = elements * ITEM_BYTES[dtype] / max(1, len(ranks))
    is_deterministic = resolved.operator.deterministic
    least = cost.wished_vectors if is_deterministic else cost.least_vectors
    needed = needed_bytes(beside + least, vector_bytes)
    described = "a deterministic" if is_deterministic else "an"
    problem = (
        f"{asked.declared.headline(asked.spec)} of {described} "
        f"operator of shape {shape} in {dtype} takes at least {needed} bytes on each of "
        f"{len(ranks)} ranks, and one has {available} in all; ask for less, or use more workers or "
        "float32."
    )
    return Plan(
        cost=cost,
        seconds_per_product=seconds_per_product,
        num_ranks=len(ranks),
        least_bytes=needed,
        wished_bytes=needed_bytes(beside + cost.wished_vectors, vector_bytes),
        available_bytes=available,
        problem=problem if 0 < available < needed else "",
        reason="DETERMINISTIC_MEMORY" if is_deterministic else "INSUFFICIENT_CLUSTER_MEMORY",
    )


def require_room(asked: JobSpec, plan: Plan) -> None:
    """Refuse a job that does not fit.

    Raises:
        ServiceError: INSUFFICIENT_CLUSTER_MEMORY, of a deterministic operator DETERMINISTIC_MEMORY
            (metadata: needed and available bytes, of the rank that has least).
    """
    if plan.problem:
        raise ServiceError(
            plan.reason,
            plan.problem,
            field=f"spec.{asked.operation}",
            metadata={
                "needed_bytes": str(plan.least_bytes),
                "available_bytes": str(plan.available_bytes),
            },
        )
