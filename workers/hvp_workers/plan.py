"""What a request will take, decided before it runs."""

from __future__ import annotations

from hvp_core.errors import CurvatureError
from hvp_core.settings import ComputeSettings
from hvp_operations.operation import Cost

from hvp_workers.backend import Precision, Tuning
from hvp_workers.room import USABLE, needed_bytes

_EXACT_WORKING = 1.5  # blocks and activations in float64, beside the vectors
_KEPT = 0.25  # of the memory that is free, for what a product leaves to the next one


def settings(
    precision: Precision, tuning: Tuning, *, device: str, available_bytes: int
) -> ComputeSettings:
    """How the products of an operator are computed.

    Compiling takes minutes once and then saves most of the time on a GPU; on a CPU, where large
    matrix products take what there is to take, it stays off unless it is asked for.

    Args:
        precision: Of the operands of matrix products.
        tuning: What whoever runs the server says.
        device: `cpu` or `cuda`.
        available_bytes: Free on the rank that has least.
    """
    compiled = tuning.compile == "on" or (tuning.compile == "auto" and device == "cuda")
    return ComputeSettings(
        schedule=tuning.schedule,
        budget_bytes=int(available_bytes * _KEPT),
        compile=compiled,
        graphs=compiled and device == "cuda",
        precision=precision,
    )


#: How pairs are verified: a few products, each as exact as they come, nothing kept or compiled.
EXACT = ComputeSettings(schedule="lean", precision="float64")


def exact_bytes(theta_numel: int, vector_numel: int) -> int:
    """Memory on a rank for a float64 product with a float32 vector: θ and v are copied too.

    Args:
        theta_numel: Elements of θ on the rank.
        vector_numel: Of a vector, which may be of some of the parameters alone.
    """
    return int(_EXACT_WORKING * (8 * theta_numel + (8 + 4) * vector_numel))


def room_for(cost: Cost, *, vector_bytes: int, available_bytes: int) -> int:
    """Vectors that a run may hold.

    Args:
        cost: What the run takes.
        vector_bytes: Of one vector on one rank.
        available_bytes: Free on the rank that has least.

    Raises:
        CurvatureError: INSUFFICIENT_CLUSTER_MEMORY (metadata: needed and available bytes).
    """
    room = int(available_bytes * USABLE) // vector_bytes
    if room < cost.least_vectors:
        needed = needed_bytes(cost.least_vectors, vector_bytes)
        raise CurvatureError(
            "INSUFFICIENT_CLUSTER_MEMORY",
            f"{cost.least_vectors} vectors at the least need {needed} bytes on a rank that has "
            f"{available_bytes} free; use more workers, float32, or ask for less",
            {"needed_bytes": str(needed), "available_bytes": str(available_bytes)},
        )
    return min(cost.wished_vectors, room)
