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
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from hvp_operations.diagonal import DiagonalProgress, DiagonalResult, DiagonalSpec
from hvp_operations.operation import EARLIER
from hvp_operations.trace import Outcome

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found
from hvp_core.stochastic.block_traces import block_traces
from hvp_core.stochastic.diagonal_choice import chosen
from hvp_core.stochastic.diagonal_known import Known, joined, joined_sums
from hvp_core.stochastic.diagonal_methods import DiagonalRun, DiagonalState, stepper
from hvp_core.stochastic.probing import Choice, blocks, judge, method_told
from hvp_core.stochastic.samples import Moments
from hvp_core.stochastic.vector_moments import VectorEstimate, VectorMoments
from hvp_core.stochastic.xdiag import XDiagSketch
from hvp_core.vectors.vector_space import VectorSpace


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
        known: The estimate of the run that this one goes on from; None where there is none.
    """

    spec: DiagonalSpec
    choice: Choice
    max_products: int
    known: Known | None = None

    @classmethod
    def configure(cls, spec: DiagonalSpec, operator: LinearOperator, budget: Budget) -> Diagonal:
        """See Algorithm."""
        known = None
        if budget.earlier is not None:
            (value,), (error,) = (
                budget.inputs[f"{EARLIER}{each}"] for each in ("diagonal", "standard_error")
            )
            known = Known(budget.earlier, value, error)
        if known is None or not known.is_mean:
            choice = chosen(spec, operator, budget)
        else:  # what it has are samples of this method
            choice = chosen(replace(spec, method="hutchinson"), operator, budget)
            if spec.method != choice.method == "hutchinson":
                choice = replace(choice, reason="it goes on from samples of this method")
        return cls(spec=spec, choice=choice, max_products=budget.max_products, known=known)

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
        if self.known is not None:
            self._go_on(space, state, self.known)
        return state

    @staticmethod
    def _go_on(space: VectorSpace, state: DiagonalState, known: Known) -> None:
        """Begin where an earlier run ended."""
        state.num_drawn = known.result.num_probes
        state.num_compared = known.result.num_corrections
        if known.is_mean:
            known.restore(state.samples, state.part_samples)
            state.num_sizes = state.samples.count
            state.size = known.size(torch.finfo(space.dtype).eps) * state.num_sizes
        else:
            state.known_error = known.error_norm(space)

    def _run(self, operator: LinearOperator, state: DiagonalState) -> DiagonalRun:
        return DiagonalRun(self.spec, self.choice, self.max_products, operator, state)

    def step(self, operator: LinearOperator, state: DiagonalState) -> Advance | None:
        """See Algorithm."""
        if state.outcome:
            return None
        run = self._run(operator, state)
        method = stepper(run)
        stage = method.step()
        estimate, _ = self._whole(run, method.estimate())
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
        told, reason = method_told(self.choice, state)
        made = method.estimate()
        assert made is not None  # an outcome is one of something
        sums = method.sums(made) if run.blocks else None
        estimate, share = self._whole(run, made)
        assert estimate is not None
        noise = run.rounding(method.rest)
        if share < 1:
            assert self.known is not None
            noise = share * noise + (1 - share) * self.known.result.rounding
            reason += "; the answer is the mean with that of the job that it goes on from"
            if sums is not None:
                sums = joined_sums(self.known, sums, share)
        norm, error = estimate.norms(run.space)
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
                num_samples=self._num_samples(state),
                num_corrections=state.num_compared + state.num_corrections,
                provenance={
                    "seed": str(self.spec.seed),
                    "probe": "Philox4x32-10 by flat index, Rademacher",
                    "probes_in_lockstep": str(self.choice.num_together),
                    **({"sketch_vectors": str(state.sketch.num_probes)} if state.sketch else {}),
                    **({"share_of_this_run": f"{share:.3f}"} if share < 1 else {}),
                },
            ),
            vectors=(estimate.value, estimate.error),
        )

    def _whole(
        self, run: DiagonalRun, made: VectorEstimate | None
    ) -> tuple[VectorEstimate | None, float]:
        """What is known, with an earlier estimate that was none of samples, and the run's share."""
        if made is None or self.known is None or self.known.is_mean:
            return made, 1.0
        return joined(run.space, self.known, made)

    def _num_samples(self, state: DiagonalState) -> int:
        """The samples that the estimate is the plain mean of; 0 where it is made otherwise."""
        is_other = self.choice.method != "hutchinson" or state.num_coordinates >= 0
        is_joined = self.known is not None and not self.known.is_mean
        return 0 if is_other or is_joined or state.num_corrections > 1 else state.samples.count
