"""The mass of a symmetric matrix outside of its diagonal blocks, with an interval.

For random signs z with the part z_b on the columns of block b, E ‖(A z_b)_a‖² is the sum of the
squares of the elements of A_ab, ‖A_ab‖². Each probe takes a product with each of its parts, which
add up to it, and gives a sample of all masses. A_ab and A_ba are transposes, so that each sample
has two of their common mass. The fraction off the diagonal is a ratio of two means (`ratio.py`).

The interval
    is one of the *exact* operator A where products come of a coarser Ã (`LinearOperator.noise`).
    The masses are estimated in two levels, each with probes of its own, as a trace is
    (`trace.py`): those of many coarse products, and differences of the masses that exact and coarse
    products have, of a few probes.

    What then is left is rounding to the vectors' dtype. A product is off by a vector of at most
    ε = eps^0.85 of its norm, or of `LinearOperator.size` where terms cancel. By the triangle
    inequality over all products, the roots of the mass off the diagonal and of the whole mass are
    each off by at most δ = ε √(Σ size²), with the mean over the probes under the root. With r = δ
    over the root of the whole mass, the root of the fraction f then lies between (√f − r)/(1 + r)
    and (√f + r)/(1 − r); both ends of the interval are moved so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from hvp_operations.block_mass import (
    TOGETHER,
    BlockMassProgress,
    BlockMassResult,
    BlockMassSpec,
    Outcome,
)
from torch import Tensor

from hvp_core.krylov.orthogonality import finite, finite_norm
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found, derived_seed
from hvp_core.stochastic.block_mass_run import BlockMassState, MassRun, Samples
from hvp_core.stochastic.samples import Moments, combined
from hvp_core.stochastic.two_levels import CORRECTION_SEEDS


@final
@dataclass(frozen=True, kw_only=True)
class BlockMass(Algorithm[BlockMassState]):
    """Masses of all blocks of a symmetric matrix, and the share off its diagonal.

    A step takes the products with some parts of a probe, in one call; of a correction with both
    operators. The run ends when the standard error of the fraction, over enough probes to be
    believed, is at most max(rtol · fraction, atol): `CONVERGED`. It ends as `NOISE_LIMIT` when that
    tolerance is below what rounding leaves; as `MAX_PRODUCTS` when there are to be no more probes,
    or the budget does not suffice for another one; as `UNVERIFIED` instead of these where products
    are coarse and were not compared with exact ones; and as `ZERO_OPERATOR` when all were zero.

    Cost: B products for each of `num_probes` probes, and 2 B for each correction.

    Attributes:
        spec: The request.
        blocks: Numbers of the parts of the space in each block, by its name.
        num_together: Parts of a probe whose products are taken in one call.
        max_products: Upper bound on products.
        earlier: Result whose random vectors are the first ones; None where there is none.
    """

    spec: BlockMassSpec
    blocks: dict[str, list[int]]
    num_together: int
    max_products: int
    earlier: BlockMassResult | None = None

    @classmethod
    def configure(cls, spec: BlockMassSpec, operator: LinearOperator, budget: Budget) -> BlockMass:
        """See Algorithm."""
        number = {name: index for index, name in enumerate(operator.domain.parts())}
        blocks = {
            block: [number[name] for name in names]
            for block, names in spec.by.divide(list(number)).items()
        }
        together = min(TOGETHER, operator.most_together or TOGETHER, len(blocks))
        return cls(
            spec=spec,
            blocks=blocks,
            num_together=min(together, max(1, (budget.num_vectors - 1) // 2)),
            max_products=budget.max_products,
            earlier=budget.earlier,
        )

    def begin(self, operator: LinearOperator) -> BlockMassState:
        """See Algorithm."""
        size, earlier = len(self.blocks), self.earlier
        samples, corrections = (
            [Samples.of(level) for level in earlier.levels]
            if earlier is not None
            else [Samples(Moments.of(size**2)) for _ in range(2)]
        )
        return BlockMassState(
            samples=samples,
            corrections=corrections,
            under_way=torch.zeros(size, size, dtype=torch.float64),
            size=0.0 if earlier is None else earlier.size,
        )

    def _run(self, operator: LinearOperator, state: BlockMassState) -> MassRun:
        return MassRun(self.spec, len(self.blocks), self.max_products, operator, state)

    def step(self, operator: LinearOperator, state: BlockMassState) -> Advance | None:
        """See Algorithm."""
        if state.outcome:
            return None
        run = self._run(operator, state)
        if state.num_products == 0:
            run.judge()  # what an extension begins with may do
        if not state.outcome:
            self._go_on(run, operator, state)
        found, detail = run.fraction(), BlockMassProgress(num_probes=state.samples.count)
        if found is not None and not math.isnan(found.value):
            detail = replace(
                detail, off_block_fraction=found.value, standard_error=found.standard_error
            )
        stage = "correcting" if state.is_correcting else "sampling"
        return Advance(stage=stage, num_products=state.num_products, detail=detail)

    def _go_on(self, run: MassRun, operator: LinearOperator, state: BlockMassState) -> None:
        """Take the next products, and end the run where they do.

        Raises:
            CurvatureError: NON_FINITE.
        """
        if state.num_columns == 0:
            state.is_correcting = run.next() == "correcting"
        exact = operator.exact() if state.is_correcting else None
        if state.is_correcting and exact is None:
            state.is_verified, state.is_correcting, state.num_columns = False, False, 0
            run.judge()
            return
        self._take(operator, exact, state)
        if state.num_columns == len(self.blocks):
            level = state.corrections if state.is_correcting else state.samples
            level.add((state.under_way + state.under_way.T) / 2)
            state.num_columns = 0
            run.judge()

    def _take(
        self, operator: LinearOperator, exact: LinearOperator | None, state: BlockMassState
    ) -> None:
        """Take the products with the next parts of the probe at hand; those of A too, if given.

        Raises:
            CurvatureError: NON_FINITE.
        """
        space, start = operator.domain, state.num_columns
        index = state.samples.count
        if exact is not None:
            index = CORRECTION_SEEDS + state.corrections.count
        probe = space.random(derived_seed(self.spec.seed, index), "rademacher")
        some = list(self.blocks.values())[start : start + self.num_together]
        parts = [space.only(probe, numbers) for numbers in some]
        columns = slice(start, start + len(parts))
        coarse = self._masses(operator, parts, state)
        if exact is None:
            state.under_way[:, columns] = coarse
            for part, mass in zip(parts, coarse.sum(0).tolist(), strict=True):
                state.size += max(mass, (operator.size * finite_norm(space, part)) ** 2)
        else:
            state.under_way[:, columns] = self._masses(exact, parts, state) - coarse
            state.num_exact += len(parts)
        state.num_columns += len(parts)

    def _masses(
        self, source: LinearOperator, parts: Sequence[Tensor], state: BlockMassState
    ) -> Tensor:
        """Squares of what products have on each block, a column for each product, float64."""
        state.num_products += len(parts)
        found = []
        for product in source.apply(parts, borrow=True):
            squares = finite(source.domain.dots_by_part(product, product))
            found.append(torch.stack([squares[each].sum() for each in self.blocks.values()]))
        return torch.stack(found, 1)

    def result(self, operator: LinearOperator, state: BlockMassState) -> Found:
        """See Algorithm."""
        run = self._run(operator, state)
        found = run.fraction()
        assert found is not None  # an outcome is one of something
        is_zero = state.outcome == "ZERO_OPERATOR"
        low, high = run.interval(found.value)
        masses, errors, _ = combined([(1.0, each.masses.estimate()) for each in run.levels])
        sizes = list(operator.domain.parts().values())
        return Found(
            result=BlockMassResult(
                blocks=tuple(self.blocks),
                block_sizes=tuple(
                    sum(sizes[number] for number in each) for each in self.blocks.values()
                ),
                masses=tuple(masses.tolist()),
                standard_errors=tuple(errors.tolist()),
                off_block_fraction=found.value,
                standard_error=found.standard_error,
                low=low,
                high=high,
                rounding=run.rounding(found.value),
                outcome=cast("Outcome", state.outcome),
                num_probes=state.samples.count,
                num_products=state.num_products,
                num_exact_products=state.num_exact,
                levels=() if is_zero else (state.samples.level(), state.corrections.level()),
                size=state.size,
                provenance={
                    "seed": str(self.spec.seed),
                    "probe": "Philox4x32-10 by flat index, Rademacher",
                    "probes_in_lockstep": str(self.num_together),
                },
            )
        )
