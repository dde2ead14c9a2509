"""The trace of a symmetric operator from products with random vectors, with an interval.

The interval
    is one of the *exact* operator A where products come of a coarser Ã (`LinearOperator.noise`).
    `hutchinson` estimates tr A = E z·Ãz + E z·(A − Ã)z in two levels, each with probes of its own
    (Giles, "Multilevel Monte Carlo methods", Acta Numerica 24 (2015)): many coarse products, and a
    few probes with a coarse and an exact product each. The second level is small, and its own
    standard error says how well it is known; nothing is assumed of Ã, not even that it is linear.
    The other methods take differences of products which coarse ones would spoil: all but the
    products that choose the basis of `hutch++` are those of the exact operator.

    What then is left is rounding to the vectors' dtype. It moves v·Av by at most
    eps^0.85 ‖v‖ ‖Av‖, or, of a form that was computed as a sum of squares, by eps^0.85 of itself.
    That much is added to the half-width, averaged as the estimate is; a block of m of n parameters
    has √(m/n) of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast, final

import torch
from hvp_operations.trace import Level, Outcome, TraceProgress, TraceResult, TraceSpec

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found
from hvp_core.stochastic.block_traces import block_traces
from hvp_core.stochastic.probing import Choice, blocks, judge, method_told
from hvp_core.stochastic.samples import Moments
from hvp_core.stochastic.sketches import NystromSketch, Range, XTraceSketch
from hvp_core.stochastic.trace_choice import chosen
from hvp_core.stochastic.trace_methods import stepper
from hvp_core.stochastic.trace_run import TraceRun, TraceState


@final
@dataclass(frozen=True, kw_only=True)
class Trace(Algorithm[TraceState]):
    """An estimate of the trace with its interval.

    A step takes one group of random vectors: one product with each, in one call; of `xtrace` and of
    a correction two. The run ends when the standard error, over enough vectors to be believed, is
    at most max(rtol |value|, atol): `CONVERGED`. It ends as `NOISE_LIMIT` when the standard error
    is below the rounding of the products, and that is above the tolerance; as `MAX_PRODUCTS` when
    the budget does not suffice for another step; and as `UNVERIFIED` instead of any of these where
    products are coarse and were not compared with exact ones. Where, by the spread so far, the
    tolerance would take more products than there are coordinates, and the budget allows, the
    coordinates take their turns instead: the value is then exact but for rounding.

    Cost: at most `max_products` products; 4 k n multiplications for the k-th vector of a basis.

    Attributes:
        spec: The request.
        choice: The method and its sizes.
        max_products: Upper bound on products.
        earlier: Result by `hutchinson` whose random vectors are the first ones; None where there is
            none.
    """

    spec: TraceSpec
    choice: Choice
    max_products: int
    earlier: TraceResult | None = None

    @classmethod
    def configure(cls, spec: TraceSpec, operator: LinearOperator, budget: Budget) -> Trace:
        """See Algorithm.

        Raises:
            CurvatureError: METHOD_UNSUPPORTED: `xnystrace` of an operator that may have negative
                eigenvalues.
        """
        if budget.earlier is not None:  # what it has seen are samples of this method
            choice = chosen(replace(spec, method="hutchinson"), operator, budget)
        else:
            choice = chosen(spec, operator, budget)
        return cls(
            spec=spec, choice=choice, max_products=budget.max_products, earlier=budget.earlier
        )

    def begin(self, operator: LinearOperator) -> TraceState:
        """See Algorithm."""
        space, rows = operator.domain, self.choice.num_rows
        num_numbers = 1 + len(blocks(space, self.spec.per))
        state = TraceState(
            samples=Moments.of(num_numbers),
            corrections=Moments.of(num_numbers),
            coordinates=torch.zeros(num_numbers, dtype=torch.float64),
        )
        match self.choice.method:
            case "hutch++":
                state.basis = Range.begin(space, rows)
            case "xtrace":
                state.xtrace = XTraceSketch.begin(space, rows)
            case "xnystrace":
                state.nystrom = NystromSketch.begin(space, rows)
            case "exact":
                state.num_coordinates = 0
        if self.earlier is not None:
            state.samples, state.corrections = map(Moments.restored, self.earlier.levels)
            state.num_drawn = state.num_sizes = state.samples.count
            state.size = self.earlier.size
        return state

    def _run(self, operator: LinearOperator, state: TraceState) -> TraceRun:
        return TraceRun(self.spec, self.choice, self.max_products, operator, state)

    def step(self, operator: LinearOperator, state: TraceState) -> Advance | None:
        """See Algorithm."""
        if state.outcome:
            return None
        run = self._run(operator, state)
        method = stepper(run)
        stage = method.step()
        standing = method.standing()
        detail = TraceProgress(num_probes=state.num_probes)
        if standing is not None:
            detail = TraceProgress(
                value=float(standing.value[0]),
                standard_error=float(standing.error[0]),
                num_probes=state.num_probes,
            )
        judge(run, method, detail.standard_error, run.tolerance(detail.value))
        return Advance(stage=stage, num_products=state.num_products, detail=detail)

    def result(self, operator: LinearOperator, state: TraceState) -> Found:
        """See Algorithm."""
        run = self._run(operator, state)
        method = stepper(run)
        standing = method.standing()
        assert standing is not None  # an outcome is one of something
        noise = run.rounding(method.rest)
        value, error, half = (each.tolist() for each in standing)
        told, reason = method_told(self.choice, state)
        law = "uniform on the sphere" if self.choice.method.startswith("x") else "Rademacher"
        return Found(
            result=TraceResult(
                value=value[0],
                standard_error=error[0],
                low=value[0] - half[0] - noise,
                high=value[0] + half[0] + noise,
                rounding=noise,
                outcome=cast("Outcome", state.outcome),
                method=told,
                reason=reason,
                num_probes=state.num_probes,
                num_products=state.num_products,
                num_exact_products=state.num_exact,
                parts=block_traces(run, standing, noise),
                levels=self._levels(state),
                size=state.size if self._levels(state) else 0.0,
                provenance={
                    "seed": str(self.spec.seed),
                    "probe": f"Philox4x32-10 by flat index, {law}",
                    "probes_in_lockstep": str(self.choice.num_together),
                },
            )
        )

    def _levels(self, state: TraceState) -> tuple[Level, ...]:
        """What an extension goes on from; nothing where the answer is made of other things."""
        if self.choice.method != "hutchinson" or state.num_coordinates >= 0:
            return ()
        return state.samples.level, state.corrections.level
