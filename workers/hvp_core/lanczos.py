"""Extremal eigenpairs of a symmetric operator from its products: thick-restart Lanczos.

Nothing here knows of models or ranks: the operator is a function, and a vector is whatever part of
it this process holds. A residual certifies an eigenvalue, not the k-th: `lanczos_search` goes on
until none of the wanted can be missing, and `verification` says what may be claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from hvp_core.eigenpairs import Eigenpairs, Plan, Progress
from hvp_core.krylov_basis import Dots
from hvp_core.lanczos_search import LanczosSearch, Matvec
from hvp_core.verification import verify


def eigsh(
    matvec: Matvec,
    start: Tensor,
    dimension: int,
    plan: Plan,
    *,
    dots: Dots,
    random: Callable[[int], Tensor],
    agree: Callable[[Any], Any] = lambda found: found,
    verifier: Callable[[], Matvec | None] | None = None,
) -> Generator[Progress, None, Eigenpairs]:
    """Run Lanczos as a generator: it yields after every product and returns the eigenpairs.

    Args:
        matvec: v -> Av, on what this process holds of a vector, (local,). What it returns is not
            written to.
        start: Starting vector (local,), not zero.
        dimension: n, the length of a whole vector.
        plan: What to find.
        dots: (rows (m, local), vector (local,)) -> inner products (m,) float64 of whole vectors.
        random: seed -> a random vector (local,), Gaussian: nothing else may depend on it.
        agree: One answer from those of all processes: two machines may solve the same small
            eigenproblem with other signs, and each would rotate its part of the basis its own way.
        verifier: Asked when the search is over, gives v -> Av as exact as the vector's dtype can
            hold it, or None where that cannot be afforded; by default matvec is as exact. Error
            bounds are of this operator.

    Yields:
        Progress after every product.

    Returns:
        The pairs. Their outcome is `CONVERGED` when every true residual meets the tolerance, or
        rounding, and none was missed; `MULTIPLICITY_UNCERTAIN` when the latter could not be shown
        within the budget; `NOISE_LIMIT` when the search had converged and the verifying products
        do not confirm it: more of the same products would not help; `UNVERIFIED` when there were
        none such: nothing is claimed; else `MAX_PRODUCTS`.

    Raises:
        CurvatureError: NON_FINITE.

    Cost: at most plan.max_products products, and 4 m n multiplications for orthogonality in each;
    (num_vectors + 1) vectors of memory. To show that none was missed takes about as many products
    as it takes to separate the wanted ends from the rest: some ten where they stand far apart.
    """
    search = LanczosSearch(matvec, start, dimension, plan, dots, random, agree)
    yield from search.iterate()
    exact = matvec if verifier is None else verifier()
    return (yield from verify(search, exact))
