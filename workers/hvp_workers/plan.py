"""What a request will take, decided before it runs."""

from __future__ import annotations

from hvp_core.eigenpairs import Plan
from hvp_core.errors import CurvatureError
from hvp_core.policy import Policy

from hvp_workers.backend import EigshSpec, Precision, Tuning
from hvp_workers.eigsh_size import (
    USABLE,
    basis_sizes,
    default_max_products,
    least_bytes,
    vectors_beside_basis,
)

#: Unit roundoff of the operands of matrix products, where it is more than the vectors' own.
_NOISE: dict[Precision, float] = {"full": 0.0, "tf32": 2**-11, "bfloat16": 2**-8}
_EXACT_WORKING = 1.5  # blocks and activations in float64, beside the vectors
_KEPT = 0.25  # of the memory that is free, for what a product leaves to the next one


def policy(precision: Precision, tuning: Tuning, *, device: str, available_bytes: int) -> Policy:
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
    return Policy(
        schedule=tuning.schedule,
        budget_bytes=int(available_bytes * _KEPT),
        compile=compiled,
        graphs=compiled and device == "cuda",
        precision=precision,
    )


#: How pairs are verified: a few products, each as exact as they come, nothing kept or compiled.
EXACT = Policy(schedule="lean", precision="float64")


def exact_bytes(shard_numel: int) -> int:
    """Memory on a rank for a float64 product with a float32 vector: θ and v are copied too."""
    return int(_EXACT_WORKING * shard_numel * (8 + 8 + 4))


def plan_eigsh(
    spec: EigshSpec,
    *,
    dimension: int,
    vector_bytes: int,
    available_bytes: int,
    semidefinite: bool = False,
    precision: Precision = "full",
) -> Plan:
    """Fill in the size of the basis and the budget of products.

    Args:
        spec: What was asked for; 0 means by default.
        semidefinite: The operator is known to have no negative eigenvalue.
        precision: Of the products of the search.
        dimension: n.
        vector_bytes: Of one vector on one rank.
        available_bytes: Free on the rank that has least.

    Raises:
        CurvatureError: K_INVALID, TOL_INVALID, MAX_PRODUCTS_INVALID, NUM_LANCZOS_VECTORS_INVALID,
            INSUFFICIENT_CLUSTER_MEMORY (metadata: needed and available bytes).
    """
    k = spec.k
    if not 1 <= k < dimension:
        raise CurvatureError("K_INVALID", f"k is {k}; give 1 <= k < n = {dimension}")
    if not 0 <= spec.tol < 1:
        raise CurvatureError("TOL_INVALID", f"tol is {spec.tol}; give 0 <= tol < 1")
    max_products = default_max_products(spec, dimension)
    if max_products < 2 * k:
        raise CurvatureError(
            "MAX_PRODUCTS_INVALID",
            f"max_products is {max_products}; {k} pairs take at least {2 * k}: as many to find "
            "them and one each to certify them",
        )
    asked = spec.num_lanczos_vectors
    if asked and not k < asked <= dimension:
        raise CurvatureError(
            "NUM_LANCZOS_VECTORS_INVALID",
            f"num_lanczos_vectors is {asked}; give more than k = {k} and at most n = {dimension}",
        )
    least, wish = basis_sizes(spec, dimension)
    room = int(available_bytes * USABLE) // vector_bytes - vectors_beside_basis(k)
    if room < least:
        needed = least_bytes(spec, dimension=dimension, vector_bytes=vector_bytes)
        raise CurvatureError(
            "INSUFFICIENT_CLUSTER_MEMORY",
            f"a basis of {least} vectors needs {needed} bytes on a rank that has {available_bytes} "
            "free; use more workers, float32, or fewer Lanczos vectors",
            {"needed_bytes": str(needed), "available_bytes": str(available_bytes)},
        )
    return Plan(
        k=k,
        which=spec.which,
        tol=spec.tol,
        max_products=max_products,
        num_vectors=min(wish, room),
        semidefinite=semidefinite,
        noise=_NOISE[precision],
    )
