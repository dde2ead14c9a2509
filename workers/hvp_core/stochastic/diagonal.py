"""The diagonal of a symmetric operator from products with random signs, with standard errors.

The standard errors
    are those of the *exact* operator A where products come of a coarser Ã (`LinearOperator.noise`):
    `hutchinson` corrects the mean over Ã by a few probes with a coarse and an exact product each
    (`two_levels`), and `xdiag` takes exact products alone. What then is left is rounding to the
    vectors' dtype, which moves Az by at most eps^0.85 ‖Az‖ in norm, and the diagonal by the mean of
    that.

The interval
    estimate ± t · standard error, with Student's t, holds 95 % of the elements on average over many
    runs where an element's samples are about normal. An element whose row has a single large
    element beside the diagonal has samples of two values only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast, final

from hvp_operations.diagonal import DiagonalProgress, DiagonalResult, DiagonalSpec
from hvp_operations.trace import Outcome

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found
from hvp_core.stochastic.block_traces import block_traces
from hvp_core.stochastic.diagonal_choice import chosen
from hvp_core.stochastic.diagonal_methods import DiagonalRun, DiagonalState, stepper
from hvp_core.stochastic.probing import Choice, blocks, judge, method_told
from hvp_core.stochastic.samples import Moments
from hvp_core.stochastic.vector_moments import VectorMoments
from hvp_core.stochastic.xdiag import XDiagSketch


@final
@dataclass(frozen=True, kw_only=True)
class Diagonal(Algorithm[DiagonalState]):
    """An estimate of the diagonal with a standard error of each element.

    A step takes one group of random vectors: one product with each, in one call; of `xdiag` and of
    a correction two. The run ends as that of a trace does, with norms in the place of numbers:
    `CONVERGED` when the norm of the standard error is at most rtol times that of the diagonal, or
    at most atol; `NOISE_LIMIT`, `MAX_PRODUCTS` or `UNVERIFIED`. Where, by the spread so far, the
    tolerance would take more products than there are coordinates, and the budget allows, the
    coordinates take their turns instead.

    Cost: at most `max_products` products; of a sketch of k vectors some 10 k² n multiplications for
    its estimate, in each step.

    Attributes:
        spec: The request.
        choice: The method and its sizes.
        max_products: Upper bound on products.
    """

    spec: DiagonalSpec
    choice: Choice
    max_products: int

    @classmethod
    def configure(cls, spec: DiagonalSpec, operator: LinearOperator, budget: Budget) -> Diagonal:
        """See Algorithm."""
        choice = chosen(spec, operator, budget)
        return cls(spec=spec, choice=choice, max_products=budget.max_products)

    def begin(self, operator: LinearOperator) -> DiagonalState:
        """See Algorithm."""
        space, choice = operator.domain, self.choice
        num_numbers = 1 + len(blocks(space, self.spec.per))
        state = DiagonalState(
            samples=VectorMoments.of(space),
            corrections=VectorMoments.of(space) if operator.noise else None,
            part_samples=Moments.of(num_numbers),
            part_corrections=Moments.of(num_numbers),
        )
        if choice.method == "exact":
            state.num_coordinates = 0
        elif choice.num_rows:
            state.sketch = XDiagSketch.begin(space, choice.num_rows)
        return state

    def _run(self, operator: LinearOperator, state: DiagonalState) -> DiagonalRun:
        return DiagonalRun(self.spec, self.choice, self.max_products, operator, state)

    def step(self, operator: LinearOperator, state: DiagonalState) -> Advance | None:
        """See Algorithm."""
        if state.outcome:
            return None
        run = self._run(operator, state)
        method = stepper(run)
        stage = method.step()
        estimate = method.estimate()
        detail = DiagonalProgress(num_probes=state.num_probes)
        if estimate is not None:
            norm, error = estimate.norms(run.space)
            detail = DiagonalProgress(norm=norm, standard_error=error, num_probes=state.num_probes)
        del estimate
        judge(run, method, detail.standard_error, run.tolerance(detail.norm))
        return Advance(stage=stage, num_products=state.num_products, detail=detail)

    def result(self, operator: LinearOperator, state: DiagonalState) -> Found:
        """See Algorithm."""
        run = self._run(operator, state)
        method = stepper(run)
        estimate = method.estimate()
        assert estimate is not None  # an outcome is one of something
        noise = run.rounding(method.rest)
        norm, error = estimate.norms(run.space)
        told, reason = method_told(self.choice, state)
        sums = method.sums(estimate) if run.blocks else None
        of_sums = noise * math.sqrt(run.space.dimension)
        return Found(
            result=DiagonalResult(
                norm=norm,
                relative_standard_error=error / norm if norm else math.inf if error else 0.0,
                interval_factor=estimate.factor,
                rounding=noise,
                outcome=cast("Outcome", state.outcome),
                method=told,
                reason=reason,
                num_probes=state.num_probes,
                num_products=state.num_products,
                num_exact_products=state.num_exact,
                parts=block_traces(run, sums, of_sums) if sums is not None else (),
                provenance={
                    "seed": str(self.spec.seed),
                    "probe": "Philox4x32-10 by flat index, Rademacher",
                    "probes_in_lockstep": str(self.choice.num_together),
                    **({"sketch_vectors": str(state.sketch.num_probes)} if state.sketch else {}),
                },
            ),
            vectors=(estimate.value, estimate.error),
        )
