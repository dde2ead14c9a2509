"""Linear systems (A + λI) x = b of a symmetric operator, by its products.

The recurrences are those of `cg` and `minres`. What they say of their residual holds for products
without error, so every x has a residual of its own, from the operator's exact product. Where that
does not meet the tolerance yet, the recurrence is begun again from it, for as long as each round
halves it at least: iterative refinement, with the exact product in the place of a wider dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from hvp_operations.solve import (
    NO_FACTORS,
    RESERVED_PRODUCTS,
    Outcome,
    SolveProgress,
    SolveResult,
    SolveSpec,
    common_vectors,
    kept_vectors,
    most_products,
    working_vectors,
)
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.krylov.cg import ConjugateGradients, Inverse
from hvp_core.krylov.minres import Minres
from hvp_core.krylov.orthogonality import finite_dots, finite_norm
from hvp_core.krylov.preconditioner import DiagonalPreconditioner, LowRankPreconditioner
from hvp_core.krylov.system_state import SolveState, SystemState
from hvp_core.linop.compositions import Shifted
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.linop.preconditioner import Preconditioner
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found
from hvp_core.vectors.vector_space import VectorSpace

#: A round that leaves more of the residual than this is the last one.
_HELPFUL = 0.5
#: A round after the first goes to this part of the tolerance: the one before was not far from it.
_AGAIN = 0.9
#: Roundings that an exact product's figures are trusted to, relative to the matrix.
_TRUSTED = 8


def identity(vector: Tensor) -> Tensor:
    """The preconditioner that is none: it gives the vector itself."""
    return vector


def preconditioner(spec: SolveSpec, operator: LinearOperator, vectors: Sequence[Tensor]) -> Inverse:
    """The inverse of the preconditioner that a spec names; `identity` where it names none.

    Args:
        spec: The request.
        operator: The operator A, which has factors of its own where they are asked for.
        vectors: The vectors (local,) of the preconditioner.

    Raises:
        CurvatureError: OPERATOR_HAS_NO_FACTORS.
    """
    space = operator.domain
    if spec.factors:
        found = operator.factored(spec.damping, spec.seed)
        if found is None:
            raise CurvatureError("OPERATOR_HAS_NO_FACTORS", f"the operator has none; {NO_FACTORS}")
        return found
    if not vectors:
        return identity
    values = spec.preconditioner_values
    if values:
        return LowRankPreconditioner(space, vectors, values, spec.damping)
    return DiagonalPreconditioner(space, vectors[0], spec.damping)


@final
@dataclass(frozen=True, kw_only=True)
class Solve(Algorithm[SolveState]):
    """Linear systems with one matrix, several of which go in lockstep.

    A step is one call of the operator with a vector of each system that is on its way, or one call
    of the exact operator with what is to be shown of each. The outcome of a system is one of these.
    `CONVERGED`: the true residual meets the tolerance. `NEGATIVE_CURVATURE`: CG met a direction d
    with d·(A + λI)d < 0, and the exact product confirms it. `BREAKDOWN`: CG met one with
    d·(A + λI)d = 0. `LEAST_SQUARES`: MINRES met a residual in the null space. `NOISE_LIMIT`: the
    products of the recurrence are too coarse for what it claims. `UNVERIFIED`: the residual meets
    the tolerance, and is none of an exact product. `MAX_PRODUCTS`: none of these.

    Cost: at most `max_products` products for each system, and a few multiples of n beside.

    Attributes:
        spec: The request.
        method: The recurrence.
        max_products: Upper bound on products for each system.
        num_together: Number of systems that go in lockstep.
        right_hand_sides: The vectors b, (local,) each.
        starts: The vectors x₀, (local,) each; none for zero.
        apply_inverse: Gives M⁻¹v for a positive definite preconditioner M; it may give v itself,
            and does not write to v.
    """

    spec: SolveSpec
    method: Literal["cg", "minres"]
    max_products: int
    num_together: int
    right_hand_sides: Sequence[Tensor]
    starts: Sequence[Tensor] = ()
    apply_inverse: Inverse = identity

    @classmethod
    def configure(cls, spec: SolveSpec, operator: LinearOperator, budget: Budget) -> Solve:
        """See Algorithm. Where memory is short, fewer systems go in lockstep."""
        method = spec.method
        if method == "auto":
            method = "cg" if operator.semidefinite and spec.damping >= 0 else "minres"
        beside = 2 * kept_vectors(spec) + common_vectors(spec)
        room = (budget.num_vectors - beside) // working_vectors(spec, method)
        return cls(
            spec=spec,
            method=method,
            max_products=most_products(spec, operator.domain.dimension),
            num_together=max(1, min(room, operator.most_together or room)),
            right_hand_sides=budget.inputs["b"],
            starts=budget.inputs["x0"],
            apply_inverse=preconditioner(spec, operator, budget.inputs["preconditioner"]),
        )

    def begin(self, operator: LinearOperator) -> SolveState:
        """See Algorithm.

        Raises:
            CurvatureError: PRECONDITIONER_NOT_POSITIVE, VECTORS_NOT_ORTHONORMAL or NON_FINITE; the
                errors of the walk that factors are taken of.
        """
        if isinstance(self.apply_inverse, Preconditioner):
            self.apply_inverse.prepare()
        starts: Sequence[Tensor | None] = self.starts or [None] * len(self.right_hand_sides)
        return SolveState(
            [
                SystemState.begin(operator.domain, b, x0)
                for b, x0 in zip(self.right_hand_sides, starts, strict=True)
            ]
        )

    def step(self, operator: LinearOperator, state: SolveState) -> Advance | None:
        """See Algorithm."""
        shifted = Shifted(operator, self.spec.damping) if self.spec.damping else operator
        under_way = [
            (system, b)
            for system, b in zip(state.systems, self.right_hand_sides, strict=True)
            if system.stage != "done"
        ][: self.num_together]
        for stage, work in (
            ("iterating", self._iterate),
            ("verifying", self._verify),
            ("probing", self._probe),
        ):
            if chosen := [each for each in under_way if each[0].stage == stage]:
                work(shifted, chosen)
                return Advance(
                    stage=stage, num_products=state.num_products, detail=_standing(state)
                )
        return None

    def _iterate(self, shifted: LinearOperator, chosen: Chosen) -> None:
        """A step of each recurrence."""
        space = shifted.domain
        for system, b in chosen:
            if system.recurrence is None:
                self._begin_round(shifted, system, b)
        chosen = [each for each in chosen if each[0].stage == "iterating"]
        if not chosen:
            return
        recurrences = [system.under_way for system, _ in chosen]
        arguments = [each.argument(self.apply_inverse) for each in recurrences]
        products = shifted.apply(arguments, borrow=True)
        for (system, _), each, argument, product in zip(
            chosen, recurrences, arguments, products, strict=True
        ):
            each.take(space, argument, product, self.apply_inverse)
            system.num_products += 1
            system.recursion_residual = each.residual_norm / system.norm
            if each.residual_norm <= system.target:
                system.end = "solved"
            elif each.end:
                system.end = each.end
            elif system.num_products + RESERVED_PRODUCTS >= self.max_products:
                system.end = "budget"
            if system.end:
                system.recursion_residual = each.best_norm / system.norm
                system.stage = "verifying"

    def _begin_round(self, shifted: LinearOperator, system: SystemState, r: Tensor) -> None:
        """Begin the recurrence from a residual, in the memory that it has already."""
        space, noise = shifted.domain, shifted.noise
        rows, scale, wanted = None, 0.0, self.spec.tol * system.norm
        if system.recurrence is not None:
            rows, scale = system.recurrence.rows, system.recurrence.scale
            wanted *= _AGAIN
        if self.method == "cg":
            system.cg = ConjugateGradients.begin(space, r, self.apply_inverse, scale, rows)
        else:
            system.minres = Minres.begin(space, r, self.apply_inverse, noise, scale, rows)
        # What is reduced by more than the products' own error is that error.
        most = max(noise, torch.finfo(r.dtype).eps)
        system.target = max(wanted, most * system.under_way.residual_norm)
        system.end, system.stage = "", "iterating"
        if system.under_way.end:  # at once: what was given as a preconditioner is none
            system.end, system.stage = system.under_way.end, "verifying"

    def _verify(self, shifted: LinearOperator, chosen: Chosen) -> None:
        """The true residual of each x, and what follows from it."""
        exact = shifted.exact()
        trials = []
        for system, _ in chosen:
            trial = system.x
            if system.recurrence is not None:
                trial = system.recurrence.correction.add_(system.x)
            trials.append(trial)
        products = (exact or shifted).apply(trials, borrow=True)
        for (system, b), trial, product in zip(chosen, trials, products, strict=True):
            r = torch.sub(b, product)
            residual = finite_norm(shifted.domain, r) / system.norm
            was, system.num_products = system.residual, system.num_products + 1
            if residual < was:  # else what the recurrence says of its residual is wrong
                system.x.copy_(trial)
                system.residual = residual
            if not system.end:  # of the start there is no recurrence yet
                system.recursion_residual = residual
            system.is_exact = exact is not None
            self._judge(shifted, system, r, residual, was)

    def _judge(
        self, shifted: LinearOperator, system: SystemState, r: Tensor, residual: float, was: float
    ) -> None:
        """Decide how a system goes on whose residual r is known, of this norm and that before."""
        helps = residual <= _HELPFUL * was
        affordable = system.num_products + 1 + RESERVED_PRODUCTS <= self.max_products
        if system.residual <= self.spec.tol:
            self._finish(system, "CONVERGED" if system.is_exact else "UNVERIFIED")
        elif system.end == "flat":
            self._finish(system, "BREAKDOWN")
        elif system.end == "negative":
            system.stage = "probing"
        elif system.end != "budget" and helps and affordable:
            self._begin_round(shifted, system, r)
        elif system.end == "least_squares":
            system.under_way.witness.copy_(r)
            system.stage = "probing"
        else:
            is_noise = system.end == "solved" and not helps
            self._finish(system, "NOISE_LIMIT" if is_noise else "MAX_PRODUCTS")

    def _probe(self, shifted: LinearOperator, chosen: Chosen) -> None:
        """Products that show why a recurrence could not go on."""
        space, exact = shifted.domain, shifted.exact()
        witnesses = [system.under_way.witness for system, _ in chosen]
        products = (exact or shifted).apply(witnesses, borrow=True)
        for (system, _), witness, product in zip(chosen, witnesses, products, strict=True):
            system.num_products += 1
            system.is_exact = system.is_exact and exact is not None
            eps, scale = torch.finfo(witness.dtype).eps, system.under_way.size
            if system.end == "negative":
                trusted = _TRUSTED * eps * max(scale, (exact or shifted).size)
                self._judge_curvature(space, system, witness, product, trusted)
                continue
            size = finite_norm(space, witness)
            system.normal_residual = finite_norm(space, product) / (scale * size or math.inf)
            is_null = system.normal_residual <= _TRUSTED * max(math.sqrt(eps), shifted.noise)
            self._finish(system, "LEAST_SQUARES" if is_null else "NOISE_LIMIT")

    def _judge_curvature(
        self, space: VectorSpace, system: SystemState, d: Tensor, product: Tensor, trusted: float
    ) -> None:
        """Decide whether a direction d has negative curvature, and keep it then."""
        squared = float(finite_dots(space, d.unsqueeze(0), d)[0])
        curvature = float(finite_dots(space, d.unsqueeze(0), product)[0]) / squared
        if curvature < -trusted:
            system.curvature = curvature - self.spec.damping
            system.keep(d / math.sqrt(squared))
            self._finish(system, "NEGATIVE_CURVATURE")
        else:
            self._finish(system, "NOISE_LIMIT")

    def _finish(self, system: SystemState, outcome: Outcome) -> None:
        system.outcome, system.stage = outcome, "done"
        system.cg = system.minres = None

    @property
    def _noted(self) -> Mapping[str, str]:
        """What the provenance says of a preconditioner, where there is one."""
        is_one = isinstance(self.apply_inverse, Preconditioner)
        return {"preconditioner": str(self.apply_inverse)} if is_one else {}

    def result(self, operator: LinearOperator, state: SolveState) -> Found:
        """See Algorithm."""
        systems = state.systems
        verified = all(system.is_exact for system in systems)
        return Found(
            result=SolveResult(
                systems=tuple(system.told for system in systems),
                num_products=state.num_products,
                provenance={
                    "method": self.method,
                    **self._noted,
                    "verified_in": "float64" if verified else "not verified",
                    "right_hand_sides_in_lockstep": str(min(self.num_together, len(systems))),
                },
            ),
            vectors=(
                *(system.x for system in systems),
                *(system.direction for system in systems if system.has_direction),
            ),
        )


Chosen = Sequence[tuple[SystemState, Tensor]]


def _standing(state: SolveState) -> SolveProgress:
    ended = [system.stage == "done" for system in state.systems]
    return SolveProgress(
        num_ended=sum(ended),
        residuals=tuple(
            system.residual if is_done else system.recursion_residual
            for system, is_done in zip(state.systems, ended, strict=True)
        ),
    )
