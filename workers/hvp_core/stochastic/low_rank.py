"""A low-rank matrix near a symmetric operator, and a bound on what it leaves.

The error
    is bounded by a short Lanczos run on B = A − A_k from a random vector that A_k does not depend
    on, with the exact operator's products. Its Ritz values are Rayleigh quotients, so ‖B‖ is at
    least the largest magnitude among them; and how little of an eigenvector beyond a number t the
    start can have had is bounded by what the recurrence has measured (`krylov.completeness`, where
    the bound is derived): ‖B‖ is at most t but for a probability that is chosen beforehand.
    Rounding to the vectors' dtype moves B by at most eps^0.85 ‖A‖, which is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, final

import torch
from hvp_operations import eigsh
from hvp_operations.eigsh import EigshSpec
from hvp_operations.low_rank import (
    CHECK_PRODUCTS,
    LowRankProgress,
    LowRankResult,
    LowRankSpec,
    Outcome,
    num_checks,
    num_samples,
    search_spec,
    taken,
)
from hvp_operations.operation import EARLIER, load
from hvp_operations.trace import TOGETHER
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.krylov.completeness import Recurrence
from hvp_core.krylov.krylov_basis import KrylovBasis
from hvp_core.krylov.lanczos_state import LanczosState
from hvp_core.krylov.orthogonality import finite_dots, finite_norm, rounding
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found, derived_seed
from hvp_core.stochastic.low_rank_state import Check, LowRankState
from hvp_core.stochastic.nystrom import distance_from_orthonormal, factored, joined
from hvp_core.vectors.vector_space import VectorSpace

#: Probability with which the bound on the error may be wrong.
FAILURE = 1e-3
_CHECK = 1 << 32  # index of the seed of the vector that the error is bounded with
#: What the search's outcomes say of the approximation.
_OUTCOMES: dict[str, Outcome] = {
    "CONVERGED": "CONVERGED",
    "MULTIPLICITY_UNCERTAIN": "MAX_PRODUCTS",
    "MAX_PRODUCTS": "MAX_PRODUCTS",
    "NOISE_LIMIT": "NOISE_LIMIT",
    "UNVERIFIED": "UNVERIFIED",
}


@final
@dataclass(frozen=True, kw_only=True)
class LowRank(Algorithm[LowRankState]):
    """A matrix A_k = U Λ Uᵀ of rank k near the operator A, and bounds on ‖A − A_k‖.

    A step takes the products of one group of random vectors, one step of the search for eigenpairs,
    or one product that bounds the error. Where products are coarser than the dtype, Nyström takes
    those of the exact operator throughout, if there is memory for it: it is a difference of
    products, which coarse ones would spoil. Laws of `nystrom`, to rounding: 0 ≤ A_k ≤ A, so that
    each eigenvalue is at most A's of the same place; A_k = A where A's rank is at most k.

    Cost: k + oversampling products of `nystrom`, those of the search of `eigsh`, and 10 for the
    bound; 7 l² n multiplications for l random vectors.

    Attributes:
        spec: The request.
        method: The method.
        num_rows: Of `nystrom`, random vectors, and vectors of the run that it goes on from.
        num_together: Number of random vectors whose products are taken in one call.
        search: The algorithm of the question `eigsh`; None of `nystrom`.
        known: Eigenvalues of the run that this one goes on from, ascending; none of one of its own.
        vectors: Their vectors, (local,) each; read only.
    """

    spec: LowRankSpec
    method: Literal["nystrom", "eigsh"]
    num_rows: int
    num_together: int
    search: Algorithm[LanczosState] | None
    known: Sequence[float] = ()
    vectors: Sequence[Tensor] = ()

    @classmethod
    def configure(cls, spec: LowRankSpec, operator: LinearOperator, budget: Budget) -> LowRank:
        """See Algorithm.

        Raises:
            CurvatureError: METHOD_UNSUPPORTED: `nystrom` of an operator that may have negative
                eigenvalues.
        """
        dimension, method = operator.domain.dimension, taken(spec, operator.semidefinite)
        if method == "nystrom" and not operator.semidefinite:
            raise CurvatureError(
                "METHOD_UNSUPPORTED",
                "nystrom needs an operator that has no negative eigenvalue; use eigsh",
            )
        known: Sequence[float] = ()
        vectors: Sequence[Tensor] = ()
        if budget.earlier is not None:
            known, vectors = budget.earlier.eigenvalues, budget.inputs[f"{EARLIER}eigenvectors"]
        search: Any = None
        if method == "eigsh":
            room = budget.num_vectors - spec.k - CHECK_PRODUCTS
            asked, starts = _started(search_spec(spec, dimension), dimension, room, known, vectors)
            search = load(eigsh.OPERATION.algorithm).configure(
                asked,
                operator,
                Budget(
                    max_products=budget.max_products - num_checks(dimension),
                    num_vectors=room,
                    inputs={"v0": starts},
                ),
            )
        rows = num_samples(spec, dimension) if method == "nystrom" else 0
        room = (budget.num_vectors - rows - 1) // 2
        together = min(TOGETHER, room, operator.most_together or room)
        return cls(
            spec=spec,
            method=method,
            num_rows=rows,
            num_together=max(1, together),
            search=search,
            known=known,
            vectors=vectors,
        )

    def begin(self, operator: LinearOperator) -> LowRankState:
        """See Algorithm."""
        vector = operator.domain.zeros()
        state = LowRankState(vector.new_empty(self.num_rows, len(vector)))
        if self.search is None:
            for row, known in zip(state.rows, self.vectors, strict=False):
                row.copy_(known)
            state.num_rows = len(self.vectors)
        state.search = None if self.search is None else self.search.begin(operator)
        return state

    def step(self, operator: LinearOperator, state: LowRankState) -> Advance | None:
        """See Algorithm."""
        if state.check is None:
            state.check = self._approximate(operator, state)
            stage = "sampling" if self.search is None else "searching"
        elif _is_over(state.check, operator.domain):
            return None
        else:
            self._bound(operator, state, state.check)
            stage = "checking"
        return Advance(
            stage=stage,
            num_products=state.num_products,
            detail=LowRankProgress(
                num_vectors=state.num_products - state.num_check,
                error=0.0 if state.check is None else _least_error(operator.domain, state.check),
            ),
        )

    def _approximate(self, operator: LinearOperator, state: LowRankState) -> Check | None:
        """A step towards the approximation; the run that bounds its error once it is there."""
        if self.search is None:
            self._sample(operator, state)
            if state.num_rows == self.num_rows:
                self._factor(operator, state)
        else:
            self._search(self.search, operator, state)
        if not state.eigenvalues:
            return None
        space = operator.domain
        seed = derived_seed(self.spec.seed, _CHECK)
        basis = KrylovBasis.begin(space, num_checks(space.dimension), seed)
        return Check(basis, Recurrence(space.dimension, basis.rounding))

    def _sample(self, operator: LinearOperator, state: LowRankState) -> None:
        """Products of the next random vectors; after the last ones, the approximation."""
        space, first = operator.domain, state.num_rows
        last = min(first + self.num_together, self.num_rows)
        if first == last:
            return
        source = self._source(operator, state)
        drawn = [self._drawn(space, index - len(self.known)) for index in range(first, last)]
        products = source.apply(drawn, borrow=True)
        for row, vector, product in zip(state.rows[first:last], drawn, products, strict=True):
            state.size = math.hypot(state.size, finite_norm(space, product))
            row.copy_(product)
            if self.known:
                _take_off(space, row, vector, state.rows[: len(self.known)], self.known)
        state.num_rows = last
        self._count(operator, source, state, last - first)

    def _source(self, operator: LinearOperator, state: LowRankState) -> LinearOperator:
        """The operator whose products are factored: differences, which coarse ones would spoil."""
        return self._exact(operator, state) if operator.noise else operator

    def _factor(self, operator: LinearOperator, state: LowRankState) -> None:
        """The approximation, of all products of random vectors."""
        space, k, first = operator.domain, self.spec.k, len(self.known)
        draw = partial(self._drawn, space)
        noise = self._source(operator, state).noise
        if not first:
            factors = factored(space, state.rows, k, draw, noise)
            values, state.shift = factors.eigenvalues, factors.shift
            self._take(state, state.rows, values.tolist(), factors.orthogonality)
            return
        values = torch.tensor(self.known, dtype=torch.float64)
        if new := self.num_rows - first:
            factors = factored(space, state.rows[first:], new, draw, noise, state.size)
            state.shift = factors.shift
            values = joined(space, state.rows, values, factors.eigenvalues, k)
        defect = distance_from_orthonormal(space, state.rows[:k])
        self._take(state, state.rows, values.tolist(), defect)

    def _drawn(self, space: VectorSpace, index: int) -> Tensor:
        """The vector of Ω of an index, of norm 1; as many as there are coordinates are these."""
        if self.num_rows == space.dimension and not self.known:
            return space.coordinate(index)
        return space.random(derived_seed(self.spec.seed, index), "sphere")

    def _search(
        self, search: Algorithm[LanczosState], operator: LinearOperator, state: LowRankState
    ) -> None:
        """A step of the search; after the last one, the approximation."""
        assert state.search is not None
        if search.step(operator, state.search) is not None:
            state.num_products = state.search.num_products
            return
        found = search.result(operator, state.search).result
        rows, state.search = state.search.basis.rows, None
        state.outcome = _OUTCOMES[found.outcome]
        defect = distance_from_orthonormal(operator.domain, rows[: self.spec.k])
        self._take(state, rows, list(found.eigenvalues), defect)

    def _take(
        self, state: LowRankState, rows: Tensor, eigenvalues: list[float], orthogonality: float
    ) -> None:
        """Keep the first rows as U."""
        state.rows, state.num_rows = rows[: len(eigenvalues)], len(eigenvalues)
        state.eigenvalues, state.orthogonality = eigenvalues, orthogonality

    def _bound(self, operator: LinearOperator, state: LowRankState, check: Check) -> None:
        """A step of Lanczos on A − A_k."""
        space, source = operator.domain, self._exact(operator, state)
        vector = check.basis.pending[0]
        (product,) = source.apply([vector])
        _take_off(space, product, vector, state.rows, state.eigenvalues)
        check.run.append(*check.basis.extend(space, product))
        state.num_check += 1
        self._count(operator, source, state, 1)

    def _exact(self, operator: LinearOperator, state: LowRankState) -> LinearOperator:
        """The exact operator if there is memory for it; this one where it is exact itself."""
        if operator.domain.dtype == torch.float64 and not operator.noise:
            return operator
        exact = operator.exact()
        state.is_exact = state.is_exact and exact is not None
        return exact or operator

    def _count(
        self, operator: LinearOperator, source: LinearOperator, state: LowRankState, count: int
    ) -> None:
        state.num_products += count
        if source is not operator:
            state.num_exact += count

    def result(self, operator: LinearOperator, state: LowRankState) -> Found:
        """See Algorithm."""
        check, space = state.check, operator.domain
        assert check is not None
        error = _least_error(space, check)
        size = self._exact(operator, state).size  # of the operator that the check asked
        scale = max(error + max(map(abs, state.eigenvalues)), size)
        noise = rounding(torch.finfo(space.dtype).eps) * scale
        ends: Sequence[Recurrence] = (check.run, check.run.mirrored())
        # All is known of what has been seen whole, or is zero at a random vector.
        is_known = check.basis.whole or not error
        bound = error if is_known else max(each.bound(FAILURE / 2) for each in ends)
        return Found(
            result=LowRankResult(
                eigenvalues=tuple(state.eigenvalues),
                outcome=cast("Outcome", state.outcome if state.is_exact else "UNVERIFIED"),
                method=self.method,
                reason=self._reason(),
                error=max(0.0, error - noise),
                error_bound=float(space.agree(bound)) + noise,
                failure_probability=0.0 if is_known else FAILURE,
                is_exact=state.is_exact,
                orthogonality=state.orthogonality,
                shift=state.shift,
                num_products=state.num_products,
                num_check_products=state.num_check,
                num_exact_products=state.num_exact,
                provenance={
                    "seed": str(self.spec.seed),
                    "verified_in": "float64" if state.is_exact else "not verified",
                },
            ),
            vectors=tuple(state.rows),
        )

    def _reason(self) -> str:
        told = self._why()
        return f"{told}; it goes on from {len(self.known)} vectors" if self.known else told

    def _why(self) -> str:
        if self.spec.method != "auto":
            return "it was asked for"
        if self.method == "nystrom":
            return "no eigenvalue is negative: each vector takes one product"
        return "eigenvalues may be negative, which nystrom does not allow"


def _started(
    spec: EigshSpec,
    dimension: int,
    room: int,
    known: Sequence[float],
    vectors: Sequence[Tensor],
) -> tuple[EigshSpec, Sequence[Tensor]]:
    """A search that begins with known eigenvectors: those of the largest values that fit.

    Args:
        spec: The search without them.
        dimension: n.
        room: Vectors that the search may hold.
        known: Their eigenvalues.
        vectors: The eigenvectors.
    """
    least = eigsh.basis_sizes(spec, dimension)[0] + eigsh.beside_basis(spec)
    order = sorted(range(len(known)), key=lambda index: -abs(known[index]))
    starts = [vectors[index] for index in order[: 1 + max(0, room - least)]]
    return replace(spec, v0=("",) * len(starts)), starts


def _take_off(
    space: VectorSpace, product: Tensor, vector: Tensor, rows: Tensor, eigenvalues: Sequence[float]
) -> None:
    """Take U Λ Uᵀ times a vector off a product with it, in place.

    Raises:
        CurvatureError: NON_FINITE.
    """
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    parts = values * finite_dots(space, rows, vector)
    product.addmv_(rows.T, parts.to(product), alpha=-1)


def _is_over(check: Check, space: VectorSpace) -> bool:
    """Whether the run has had all its products, or its Krylov space is exhausted."""
    return check.basis.size == num_checks(space.dimension) or check.basis.num_pending == 0


def _least_error(space: VectorSpace, check: Check) -> float:
    """The largest magnitude of a Ritz value; 0 before there is one."""
    size = check.basis.size
    values = torch.linalg.eigvalsh(check.basis.T[:size, :size])
    return float(space.agree(float(values.abs().max()))) if size else 0.0
