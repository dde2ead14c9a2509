"""Which searches for eigenpairs no worker group here could run, known before one is queued."""

from __future__ import annotations

from hvp_workers.backend import EigshSpec
from hvp_workers.eigsh_size import least_bytes

from hvp_service.errors import ServiceError
from hvp_service.group_supervisor import GroupSupervisor
from hvp_service.job_store import EigshJob
from hvp_service.operator_resolver import ResolvedOperator
from hvp_service.vector_store import ITEM_BYTES

# About 220 bytes of a result are one pair's, and a result travels as one message of 4 MiB.
MAX_EIGENPAIRS = 10_000


def backend_spec(spec: EigshJob) -> EigshSpec:
    """What the ranks are asked for."""
    return EigshSpec(
        k=spec.k,
        which=spec.which,
        tol=spec.tol,
        max_products=spec.max_products,
        seed=spec.seed,
        num_lanczos_vectors=spec.num_lanczos_vectors,
    )


async def check_fits(group: GroupSupervisor, spec: EigshJob, resolved: ResolvedOperator) -> None:
    """Refuse what the ranks would have no room for if all their memory were free.

    The bound is an optimistic one: whatever it refuses, the ranks' own plan would refuse too,
    which also knows what is in use.

    Raises:
        ServiceError: INSUFFICIENT_CLUSTER_MEMORY (metadata: needed and available bytes, of the rank
            that has least), WORKER_GROUP_LOST.
    """
    ranks = await group.call(lambda backend: backend.ranks())
    available = min((rank.memory_bytes for rank in ranks), default=0)
    dimension, dtype = resolved.num_parameters, resolved.operator.space.dtype
    needed = least_bytes(
        backend_spec(spec),
        dimension=dimension,
        vector_bytes=dimension * ITEM_BYTES[dtype] / max(1, len(ranks)),
    )
    if 0 < available < needed:  # 0: the ranks do not tell
        raise ServiceError(
            "INSUFFICIENT_CLUSTER_MEMORY",
            f"k = {spec.k} eigenpairs of an operator of order {dimension} in {dtype} take at least "
            f"{needed} bytes on each of {len(ranks)} ranks, and one has {available} in all; ask "
            "for fewer pairs or Lanczos vectors, or use more workers or float32.",
            field="spec.eigsh.k",
            metadata={"needed_bytes": str(needed), "available_bytes": str(available)},
        )
