"""How a request is computed and how much memory it takes, decided before it runs."""

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
        precision: Precision of the operands of matrix products.
        tuning: Settings of the server.
        device: `cpu` or `cuda`.
        available_bytes: Memory that is free on the rank that has least.
    """
    compiled = tuning.compile == "on" or (tuning.compile == "auto" and device == "cuda")
    return ComputeSettings(
        schedule=tuning.schedule,
        budget_bytes=int(available_bytes * _KEPT),
        compile=compiled,
        graphs=compiled and device == "cuda",
        precision=precision,
    )


#: Settings for the forward pass that labels are drawn in: in the vectors' own type.
DRAWING = ComputeSettings(schedule="lean")
#: Settings for the products that verify eigenpairs: as exact as can be, nothing kept or compiled.
EXACT = ComputeSettings(schedule="lean", precision="float64")


def exact_bytes(theta_numel: int, vector_numel: int) -> int:
    """Memory on a rank for a float64 product with a float32 vector: θ and v are copied too.

    Args:
        theta_numel: Number of elements of θ on the rank.
        vector_numel: Number of elements of a vector on the rank; a vector may have only some of the
            parameters.
    """
    return int(_EXACT_WORKING * (8 * theta_numel + (8 + 4) * vector_numel))


def room_for(cost: Cost, *, vector_bytes: int, available_bytes: int) -> int:
    """Number of vectors that a run may hold.

    Args:
        cost: Products and vectors that the run takes.
        vector_bytes: Bytes of one vector on one rank.
        available_bytes: Memory that is free on the rank that has least.

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
