"""The spectral density by stochastic Lanczos quadrature.

A probe x of norm 1 sees the spectral measure Σ (x·uᵢ)² δ(λ − λᵢ) of a symmetric operator, whose
mean over random probes is the density (1/n) Σ δ(λ − λᵢ). The Ritz values of m steps of Lanczos from
x, with the squared first components of T's eigenvectors as weights, are the Gauss quadrature of
that measure: exact for polynomials up to degree 2m − 1 (Golub and Meurant, "Matrices, Moments and
Quadrature with Applications", Princeton (2010); Ubaru, Chen and Saad, "Fast estimation of tr(f(A))
via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl. 38 (2017)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from hvp_operations.density import (
    WORKING_VECTORS,
    DensityProgress,
    DensityResult,
    DensitySpec,
    Quadrature,
)

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found, derived_seed
from hvp_core.stochastic.density_probe import Probe
from hvp_core.vectors.vector_space import VectorSpace

#: The ends of the spectrum are computed anew after every step up to twice this many, and then less
#: and less often: the cost of T's eigenvalues grows as the cube of their number.
_TOLD = 32


@final
@dataclass
class DensityState:
    """Quadratures that are known, and the probes on their way.

    Attributes:
        probes: The probes that go in lockstep; empty when all are done.
        quadratures: Quadratures of the probes before them, in the order of the probes' seeds.
        num_products: Products so far.
        smallest: Smallest Ritz value seen so far, of one probe under way and of all that are done.
        largest: Largest Ritz value seen so far, of the same probes.
        orthogonality_defect: Largest entry of |QᵀQ − I| met in the bases of probes that are done.
    """

    probes: list[Probe]
    quadratures: list[Quadrature] = field(default_factory=list)
    num_products: int = 0
    smallest: float = math.inf
    largest: float = -math.inf
    orthogonality_defect: float = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class Density(Algorithm[DensityState]):
    """Gauss quadratures of the spectral measures of random probes.

    Every step is one step of Lanczos for a group of probes: one product with each, in one call, so
    that they share what does not depend on them. A probe whose Krylov space is exhausted ends with
    fewer nodes, and its quadrature is exact.

    Cost: at most num_probes · num_steps products; with bases that are kept, 6 j n multiplications
    in the j-th step of each probe, to make its vector orthogonal and to measure that.

    Attributes:
        spec: The request.
        num_steps: Steps of each probe, at most n.
        num_together: Number of probes that go in lockstep.
        is_kept: Whether the probes' bases fit into memory and are kept orthogonal.
        earlier: Result whose probes are the first ones; None where they have to be run too.
    """

    spec: DensitySpec
    num_steps: int
    num_together: int
    is_kept: bool
    earlier: DensityResult | None = None

    @property
    def _first(self) -> int:
        """Number of the first probe that has to be run."""
        return 0 if self.earlier is None else len(self.earlier.quadratures)

    @classmethod
    def configure(cls, spec: DensitySpec, operator: LinearOperator, budget: Budget) -> Density:
        """See Algorithm. Where no whole basis fits, none is kept and more probes go at once."""
        num_steps = min(spec.num_steps, operator.domain.dimension)
        kept = num_steps + WORKING_VECTORS
        is_kept = budget.num_vectors >= kept
        fitting = max(1, budget.num_vectors // (kept if is_kept else WORKING_VECTORS))
        fitting = min(fitting, operator.most_together or fitting)
        known = 0 if budget.earlier is None else len(budget.earlier.quadratures)
        missing = spec.num_probes - known
        num_groups = math.ceil(missing / fitting)
        return cls(
            spec=spec,
            num_steps=num_steps,
            num_together=math.ceil(missing / num_groups),  # no more than they need
            is_kept=is_kept,
            earlier=budget.earlier,
        )

    def begin(self, operator: LinearOperator) -> DensityState:
        """See Algorithm."""
        space = operator.domain
        vector = space.zeros()
        num_rows = self.num_steps if self.is_kept else 2
        memory = [vector.new_empty(num_rows, len(vector)) for _ in range(self.num_together)]
        state = DensityState(self._group(space, self._first, memory))
        if self.earlier is not None:
            state.quadratures = list(self.earlier.quadratures)
            state.orthogonality_defect = self.earlier.orthogonality_defect
            for quadrature in state.quadratures:
                self._tell(state, quadrature.nodes)
        return state

    def _group(self, space: VectorSpace, first: int, memory: list[torch.Tensor]) -> list[Probe]:
        """The next group of probes, as many as there is memory for, from number `first` on."""
        return [
            Probe.begin(space, rows, self.is_kept, derived_seed(self.spec.seed, index))
            for index, rows in zip(range(first, self.spec.num_probes), memory, strict=False)
        ]

    def step(self, operator: LinearOperator, state: DensityState) -> Advance | None:
        """See Algorithm."""
        space, under_way = operator.domain, [each for each in state.probes if not each.is_done]
        if not under_way:
            return None
        products = operator.apply([probe.newest for probe in under_way], borrow=True)
        for probe, product in zip(under_way, products, strict=True):
            probe.extend(space, product, self.num_steps)
        state.num_products += len(under_way)
        num_steps = max(len(probe.alphas) for probe in under_way)
        num_done = len(state.quadratures) + sum(probe.is_done for probe in state.probes)
        if all(probe.is_done for probe in state.probes):
            self._close(space, state)
        elif num_steps % max(1, num_steps // _TOLD) == 0:
            self._tell(state, under_way[0].jacobi.gauss.nodes)
        return Advance(
            stage="iterating",
            num_products=state.num_products,
            detail=DensityProgress(
                num_probes_done=num_done,
                num_steps=num_steps,
                smallest=state.smallest,
                largest=state.largest,
            ),
        )

    @staticmethod
    def _tell(state: DensityState, values: Sequence[float]) -> None:
        """Note the smallest and the largest of ascending Ritz values."""
        state.smallest = min(state.smallest, values[0])
        state.largest = max(state.largest, values[-1])

    def _close(self, space: VectorSpace, state: DensityState) -> None:
        """Take the quadratures of a group that is done, and begin the next group in its memory."""
        for probe in state.probes:
            quadrature = probe.quadrature(space)
            state.quadratures.append(quadrature)
            state.orthogonality_defect = max(state.orthogonality_defect, probe.defect)
            self._tell(state, quadrature.nodes)
        memory = [probe.rows for probe in state.probes]
        state.probes = self._group(space, len(state.quadratures), memory)

    def result(self, operator: LinearOperator, state: DensityState) -> Found:
        """See Algorithm."""
        return Found(
            result=DensityResult(
                quadratures=tuple(state.quadratures),
                orthogonality_defect=state.orthogonality_defect if self.is_kept else 1.0,
                num_products=state.num_products,
                provenance={
                    "seed": str(self.spec.seed),
                    "num_steps": str(self.num_steps),
                    "probe": "Philox4x32-10 by flat index, Rademacher",
                    "probes_in_lockstep": str(self.num_together),
                    "orthogonality": "full, twice" if self.is_kept else "of neighbours only",
                },
            )
        )
