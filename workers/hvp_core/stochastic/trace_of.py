"""tr f(A + λI) by stochastic Lanczos quadrature, with an interval for all that is not known.

For random signs z, E z·f(A + λI)z = tr f(A + λI), and Lanczos from z gives bounds on each form
(`functions.py`). So three things are left open, and all are in the interval: the choice of the z,
by Student's t; the steps, by the bounds; rounding, by bounds that allow for it. The spectrum's end,
which some bounds need, is zero for a matrix without negative eigenvalues. Otherwise it is found by
a Lanczos run of its own, from a start that is uniform on the sphere: the end that is taken is
wrong with a probability of 0.001 (`krylov/completeness.py`).

Where products are coarser than the dtype (`LinearOperator.noise`), all are taken of the exact
operator instead: a function may magnify errors as it likes, and the bounds know of rounding alone.
Without memory for it the run goes on with what there is, and the result is UNVERIFIED.

See Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J.
Matrix Anal. Appl. 38 (2017), and Golub and Strakoš, "Estimates in quadratic formulas", Numer.
Algorithms 8 (1994).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import torch
from hvp_operations.trace_of import (
    FEWEST_TOGETHER,
    TOGETHER,
    Outcome,
    TraceOfProgress,
    TraceOfResult,
    TraceOfSpec,
    most_steps,
    vectors_of,
)

from hvp_core.krylov.completeness import Recurrence
from hvp_core.krylov.orthogonality import rounding
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found, derived_seed
from hvp_core.stochastic.density_probe import Probe
from hvp_core.stochastic.functions import Bracket, Ends, bracket, is_indefinite, needs_ends
from hvp_core.stochastic.probing import FEWEST
from hvp_core.stochastic.quadrature import Jacobi, Rule
from hvp_core.stochastic.trace_of_state import Standing, TraceOfState, gone_on
from hvp_core.vectors.vector_space import VectorSpace

#: The probability with which an end of the spectrum is wrong.
_FAILURE = 0.001
#: The seed of the run that finds the ends, far from those of the probes.
_SCOUT_SEED = 1 << 32
#: What steps may leave open: of the tolerance, and of the standard error that the budget allows; of
#: a count more, for there it falls only as one over the steps.
_OF_TOLERANCE, _OF_ERROR, _OF_COUNTS_ERROR = 0.2, 0.1, 1.0
#: A count is known where its interval holds one whole number: its standard error is this, or less.
_COUNT_ERROR = 0.25
#: Bounds are looked at after every step up to twice this many, and then less and less often.
_LOOKED_AT = 8


@final
@dataclass(frozen=True, kw_only=True)
class TraceOf(Algorithm[TraceOfState]):
    """An estimate of tr f(A + λI) with its interval.

    Every step is one step of Lanczos for a group of probes. A group ends when the steps leave
    little open beside the tolerance or the standard error, or at the most that it may have. The run
    ends as `CONVERGED` when standard error and quadrature error of 16 probes or more are together
    at most max(rtol |value|, atol); as `NOISE_LIMIT` when rounding is more than that; as
    `MAX_STEPS` when what steps leave open is, and more probes would not help; as `MAX_PRODUCTS`
    when the budget does not suffice for another probe; as `INDEFINITE`, at once, when a Ritz value
    shows that the function has no value. All are `UNVERIFIED` where products are coarse and there
    was no memory for exact ones.

    Cost: at most `max_products` products, and 6 j n multiplications in the j-th step of each probe.

    Attributes:
        spec: The request.
        num_steps: Steps of each probe, at most.
        num_together: Lanczos runs that go in lockstep.
        max_products: Upper bound on products.
        earlier: Result whose probes are the first ones; None where there is none.
    """

    spec: TraceOfSpec
    num_steps: int
    num_together: int
    max_products: int
    earlier: TraceOfResult | None = None

    @classmethod
    def configure(cls, spec: TraceOfSpec, operator: LinearOperator, budget: Budget) -> TraceOf:
        """See Algorithm. Where memory is short probes have fewer steps, but two go at once."""
        room = budget.num_vectors // (2 if operator.noise else 1)  # beside the exact operator
        affordable = room // FEWEST_TOGETHER - vectors_of(0)
        num_steps = max(1, min(most_steps(spec, operator.domain.dimension), affordable))
        fitting = min(TOGETHER, operator.most_together or TOGETHER, room // vectors_of(num_steps))
        paid = budget.max_products // (spec.num_steps or 2)
        return cls(
            spec=spec,
            num_steps=num_steps,
            num_together=max(FEWEST_TOGETHER, min(fitting, paid)),
            max_products=budget.max_products,
            earlier=budget.earlier,
        )

    def begin(self, operator: LinearOperator) -> TraceOfState:
        """See Algorithm."""
        if self.earlier is not None:
            state = gone_on(self.earlier)
            self._judge(operator.domain, state, is_short=False)
            return state
        state = TraceOfState()
        if operator.semidefinite and not operator.noise:
            state.low_end = 0.0
        size = self.num_together
        if needs_ends(self.spec, operator.semidefinite and not operator.noise):
            size -= 1
            # Of one probe there is no standard error: another has to follow.
            shares = self.num_together + (1 if size == 1 else 0)
        else:
            shares = self.num_together
        state.limit = min(self.num_steps, self.max_products // shares)
        if size < self.num_together:
            space = operator.domain
            seed = derived_seed(self.spec.seed, _SCOUT_SEED)
            state.scout = Probe.begin(space, self._rows(space, state), True, seed, "sphere")
        self._open(operator.domain, state, size)
        return state

    def _rows(self, space: VectorSpace, state: TraceOfState) -> torch.Tensor:
        """Memory for a run, and for the vector after its last product: the bounds need its norm."""
        vector = space.zeros()
        return vector.new_empty(state.limit + 1, len(vector))

    def _open(self, space: VectorSpace, state: TraceOfState, size: int) -> None:
        """Begin a group of probes."""
        for index in range(state.num_drawn, state.num_drawn + size):
            seed = derived_seed(self.spec.seed, index)
            state.probes.append(Probe.begin(space, self._rows(space, state), True, seed))
        state.num_drawn += size

    def step(self, operator: LinearOperator, state: TraceOfState) -> Advance | None:
        """See Algorithm."""
        if state.outcome:
            return None
        exact = operator.exact() if operator.noise else operator
        state.is_verified = state.is_verified and exact is not None
        source, space, under_way = exact or operator, operator.domain, state.under_way
        products = source.apply([each.newest for each in under_way], borrow=True)
        for each, product in zip(under_way, products, strict=True):
            each.extend(space, product, state.limit + 1)
        state.num_products += len(under_way)
        if source is not operator:
            state.num_exact += len(under_way)
        num_steps = max(len(each.alphas) for each in under_way)
        state.num_steps = max(state.num_steps, num_steps)
        is_last = num_steps == state.limit or not state.under_way
        if is_last or num_steps % max(1, num_steps // _LOOKED_AT) == 0:
            self._look(source, state, is_last)
        return Advance(
            stage="iterating",
            num_products=state.num_products,
            detail=TraceOfProgress(
                value=state.value,
                standard_error=state.error,
                num_probes=len(state.done),
                num_steps=num_steps,
            ),
        )

    # A group of probes ----------------------------------------------------------------------------

    def _look(self, operator: LinearOperator, state: TraceOfState, is_last: bool) -> None:
        """See what the probes at hand say, and end the group or the run."""
        space = operator.domain
        seen = _Seen(*space.agree(self._seen(operator, state)))
        state.low_end, state.high_end = seen.ends
        state.smallest = min(state.smallest, seen.smallest)
        state.largest = max(state.largest, seen.largest)
        if not seen.brackets:
            state.is_indefinite, state.value, state.error = True, math.nan, math.inf
            state.close(seen.rules, [_NOTHING] * len(seen.rules), space.dimension)
            self._end(state, "INDEFINITE")
            return
        brackets = [Bracket(*each) for each in seen.brackets]
        so_far = state.samples.with_more(brackets).standing(space.dimension)
        state.value, state.error = so_far.value, so_far.error
        if is_last or self._is_narrow(state, so_far):
            is_short = is_last and any(not each.is_done for each in state.probes)
            state.close([Rule(*each) for each in seen.rules], brackets, space.dimension)
            self._judge(space, state, is_short)

    def _seen(self, operator: LinearOperator, state: TraceOfState) -> _Seen:
        """What this process makes of the coefficients; another machine may round it otherwise."""
        space, size = operator.domain, operator.size
        eps = torch.finfo(space.dtype).eps
        runs = [each.jacobi for each in state.probes]
        scout = [state.scout.jacobi] if state.scout else []
        ends = Ends(state.low_end, state.high_end)
        for run in scout:
            ends = self._ends(ends, run, space.dimension, eps, size)
        nodes = [(run.gauss.nodes, _moved(run, eps, size)) for run in (*runs, *scout)]
        has_value = not any(is_indefinite(self.spec, each[0], moved) for each, moved in nodes)
        return _Seen(
            ends=ends,
            smallest=min(each[0] for each, _ in nodes),
            largest=max(each[-1] for each, _ in nodes),
            rules=[run.gauss for run in runs],
            brackets=[bracket(self.spec, run, ends, _moved(run, eps, size)) for run in runs]
            if has_value
            else [],
        )

    def _ends(self, known: Ends, scout: Jacobi, dimension: int, eps: float, size: float) -> Ends:
        """The ends of the spectrum that a run shows, and those that are known already."""
        recurrence = Recurrence(dimension, rounding(eps))
        for alpha, beta in itertools.zip_longest(scout.alphas, scout.betas, fillvalue=0.0):
            recurrence.append(alpha, beta)
        low, high = -recurrence.mirrored().bound(_FAILURE), recurrence.bound(_FAILURE)
        if scout.is_exhausted:  # it has seen every eigenvalue
            low, high = max(low, scout.gauss.nodes[0]), min(high, scout.gauss.nodes[-1])
        moved = _moved(scout, eps, size)
        return Ends(max(known.low, low - moved), min(known.high, high + moved))

    def _is_narrow(self, state: TraceOfState, so_far: Standing) -> bool:
        """Whether more steps would make the interval little narrower."""
        count = len(state.done) + len(state.probes)
        known = 0 if self.earlier is None else len(self.earlier.probes)
        affordable = max(count, known + self.max_products // state.num_steps)
        error = so_far.error * math.sqrt(count / affordable)
        share = _OF_COUNTS_ERROR if self.spec.function == "count" else _OF_ERROR
        least = share * error if math.isfinite(error) else 0.0
        return so_far.quadrature <= max(_OF_TOLERANCE * self._tolerance(so_far), least)

    def _tolerance(self, standing: Standing) -> float:
        least = _COUNT_ERROR if self.spec.function == "count" else 0.0
        return max(self.spec.rtol * abs(standing.value), self.spec.atol, least)

    def _judge(self, space: VectorSpace, state: TraceOfState, is_short: bool) -> None:
        """End the run, or begin another group.

        Args:
            space: Space of the vectors.
            state: The state; no probe is under way.
            is_short: Whether probes of the latest group would have taken more steps.
        """
        count, standing = len(state.done), state.samples.standing(space.dimension)
        tolerance, error = self._tolerance(standing), standing.error + standing.quadrature
        if count >= FEWEST and math.isfinite(error) and error <= max(tolerance, standing.rounding):
            self._end(state, "CONVERGED" if standing.rounding <= tolerance else "NOISE_LIMIT")
            return
        is_limited = is_short and state.limit == self.num_steps
        if is_limited and standing.quadrature > max(tolerance, standing.error):
            self._end(state, "MAX_STEPS")
            return
        remaining = self.max_products - state.num_products
        wanted = FEWEST - count
        if tolerance > standing.quadrature and math.isfinite(standing.error):
            needed = (standing.error / (tolerance - standing.quadrature)) ** 2 * count
            wanted = max(wanted, math.ceil(min(needed, float(self.max_products))) - count, 1)
        else:
            wanted = self.num_together
        size = min(self.num_together, remaining // state.num_steps, wanted)
        if size < 1:
            self._end(state, "MAX_PRODUCTS")
            return
        state.limit = min(self.num_steps, remaining // size)
        self._open(space, state, size)

    @staticmethod
    def _end(state: TraceOfState, outcome: Outcome) -> None:
        state.outcome = outcome if state.is_verified else "UNVERIFIED"

    def result(self, operator: LinearOperator, state: TraceOfState) -> Found:
        """See Algorithm."""
        is_kept = state.is_verified and not state.is_indefinite
        found = state.samples.standing(operator.domain.dimension)
        if state.is_indefinite:
            found = Standing(math.nan, math.inf, -math.inf, math.inf, math.inf, 0.0)
        least = 0.0 if self.spec.function != "log" else -math.inf
        most = float(operator.domain.dimension) if self.spec.function == "count" else math.inf
        return Found(
            result=TraceOfResult(
                value=found.value,
                standard_error=found.error,
                low=max(least, found.low) if not state.is_indefinite else found.low,
                high=min(most, found.high),
                quadrature_error=found.quadrature,
                rounding=found.rounding,
                outcome=cast("Outcome", state.outcome),
                num_probes=len(state.done),
                num_steps=state.num_steps,
                smallest=state.smallest,
                largest=state.largest,
                num_products=state.num_products,
                num_exact_products=state.num_exact,
                probes=tuple(state.done),
                levels=(state.samples.moments.level,) if is_kept else (),
                spectrum_low=state.low_end,
                spectrum_high=state.high_end,
                provenance={
                    "seed": str(self.spec.seed),
                    "probe": "Philox4x32-10 by flat index, Rademacher",
                    "probes_in_lockstep": str(self.num_together),
                    "orthogonality_defect": f"{state.orthogonality_defect:.1e}",
                },
            )
        )


class _Seen(NamedTuple):
    """What is seen at a look; no brackets where the function has no value."""

    ends: Ends
    smallest: float
    largest: float
    rules: list[Rule]
    brackets: list[Bracket]


_NOTHING = Bracket(math.nan, -math.inf, math.inf, -math.inf, math.inf)


def _moved(run: Jacobi, eps: float, size: float) -> float:
    """ε, the norm of the perturbation that the rounding of a run's products amounts to."""
    return max(rounding(eps), len(run.alphas) * eps) * max(run.size, size)
