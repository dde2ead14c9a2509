"""What a run that estimates tr f(A + λI) has seen, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, final

import torch
from hvp_operations.density import Quadrature
from hvp_operations.trace_of import TraceOfProbe, TraceOfResult

from hvp_core.stochastic.density_probe import Probe
from hvp_core.stochastic.functions import Bracket
from hvp_core.stochastic.quadrature import Rule
from hvp_core.stochastic.samples import Moments, combined


@final
@dataclass
class Samples:
    """Brackets of the probes that are done.

    Attributes:
        moments: Of value, low, high, the part of high − low that is for steps, and the rest of it.
            An end that is not known is the value, and noted below.
        is_open_below: Whether a probe has no bound from below.
        is_open_above: Whether a probe has no bound from above.
        is_open: Whether steps leave a probe without a bound on either side.
    """

    moments: Moments = field(default_factory=lambda: Moments.of(5))
    is_open_below: bool = False
    is_open_above: bool = False
    is_open: bool = False

    def with_more(self, brackets: Sequence[Bracket]) -> Samples:
        """These samples and others."""
        made = replace(self, moments=replace(self.moments))
        for each in brackets:
            steps = each.krylov_high - each.krylov_low
            rest = each.high - each.low - steps if math.isfinite(steps) else 0.0
            low, high = (end if math.isfinite(end) else each.value for end in (each.low, each.high))
            made.is_open_below |= math.isinf(each.low)
            made.is_open_above |= math.isinf(each.high)
            made.is_open |= math.isinf(steps)
            numbers = (
                each.value,
                low,
                high,
                *(x if math.isfinite(x) else 0 for x in (steps, rest)),
            )
            made.moments.add(torch.tensor(numbers, dtype=torch.float64))
        return made

    def standing(self, order: int) -> Standing:
        """What the samples say of the trace of a matrix of this order.

        The mean of lower bounds has an expectation that is not above the trace, and that of upper
        bounds one that is not below: each end is the end of the interval of its own mean.
        """
        count, means = self.moments.count, self.moments.mean.tolist()
        error, halves = math.inf, [math.inf] * 3
        if count > 1:
            _, errors, all_halves = combined([(1.0, self.moments.estimate())])
            error, halves = float(errors[0]), all_halves.tolist()
        steps = math.inf if self.is_open else means[3] / 2
        is_loose = (self.is_open_below or self.is_open_above) and not self.is_open
        return Standing(
            value=order * means[0],
            error=order * error,
            low=-math.inf if self.is_open_below else order * (means[1] - halves[1]),
            high=math.inf if self.is_open_above else order * (means[2] + halves[2]),
            quadrature=order * steps,
            rounding=math.inf if is_loose else order * means[4] / 2,
        )


class Standing(NamedTuple):
    """What is known of tr f(A + λI).

    Attributes:
        value: The estimate.
        error: Its standard error; infinite of one probe.
        low: Lower end of the 95 % interval.
        high: Upper end.
        quadrature: What steps leave open, on either side.
        rounding: What rounding leaves open, on either side.
    """

    value: float
    error: float
    low: float
    high: float
    quadrature: float
    rounding: float


@final
@dataclass
class TraceOfState:
    """What a run has seen.

    Attributes:
        probes: The probes that go in lockstep; empty before the first group and after the last.
        scout: The run from a start that is uniform on the sphere, which finds the ends of the
            spectrum beside the first group's probes; None where they need not be found, or are.
        limit: Steps that the probes at hand may have, at most.
        low_end: Bound below the spectrum of A; minus infinity where none is known.
        high_end: Bound above it.
        samples: Brackets of the probes that are done.
        done: The same probes, as the result tells them.
        value: The estimate as it was last looked at, with the probes at hand.
        error: Its standard error.
        smallest: Smallest Ritz value seen so far.
        largest: Largest Ritz value seen so far.
        num_drawn: Probes begun so far.
        num_steps: The most steps that a probe has had.
        num_products: Products so far.
        num_exact: Of them, those of the exact operator where that is another.
        orthogonality_defect: Largest entry of |QᵀQ − I| met in the bases.
        is_verified: Whether there was memory for the exact operator wherever it was needed.
        is_indefinite: Whether a Ritz value has shown that there is no value.
        outcome: How the run ended; "" while it has not.
    """

    probes: list[Probe] = field(default_factory=list)
    scout: Probe | None = None
    limit: int = 0
    low_end: float = -math.inf
    high_end: float = math.inf
    samples: Samples = field(default_factory=Samples)
    done: list[TraceOfProbe] = field(default_factory=list)
    value: float = 0.0
    error: float = math.inf
    smallest: float = math.inf
    largest: float = -math.inf
    num_drawn: int = 0
    num_steps: int = 0
    num_products: int = 0
    num_exact: int = 0
    orthogonality_defect: float = 0.0
    is_verified: bool = True
    is_indefinite: bool = False
    outcome: str = ""

    @property
    def under_way(self) -> list[Probe]:
        """Every run that takes another product."""
        runs = [*self.probes, *([self.scout] if self.scout else [])]
        return [each for each in runs if not each.is_done]

    def close(self, rules: Sequence[Rule], brackets: Sequence[Bracket], order: int) -> None:
        """Take in the probes at hand, which are done, or as far as they came if there is no value.

        Args:
            rules: The Gauss rule of each.
            brackets: What is known of each.
            order: n.
        """
        if not self.is_indefinite:
            self.samples = self.samples.with_more(brackets)
        for rule, each in zip(rules, brackets, strict=True):
            value, low, high = (order * number for number in each[:3])
            quadrature = Quadrature(nodes=tuple(rule.nodes), weights=tuple(rule.weights))
            self.done.append(TraceOfProbe(value=value, low=low, high=high, quadrature=quadrature))
        for probe in self.probes:
            self.orthogonality_defect = max(self.orthogonality_defect, probe.defect)
        self.probes, self.scout = [], None


def gone_on(earlier: TraceOfResult) -> TraceOfState:
    """The state that a result was made of, with products that are counted anew."""
    lows, highs = ([getattr(each, end) for each in earlier.probes] for end in ("low", "high"))
    samples = Samples(
        moments=Moments.restored(earlier.levels[0]),
        is_open_below=any(map(math.isinf, lows)),
        is_open_above=any(map(math.isinf, highs)),
        is_open=math.isinf(earlier.quadrature_error),
    )
    return TraceOfState(
        low_end=earlier.spectrum_low,
        high_end=earlier.spectrum_high,
        samples=samples,
        done=list(earlier.probes),
        value=earlier.value,
        error=earlier.standard_error,
        smallest=earlier.smallest,
        largest=earlier.largest,
        num_drawn=len(earlier.probes),
        num_steps=earlier.num_steps,
    )
