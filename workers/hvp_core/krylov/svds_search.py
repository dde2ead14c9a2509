"""The search for the largest singular triplets, until none of the wanted can be missing.

One starting vector sees one copy of a repeated singular value. So when the wanted triplets have
converged they are taken out, and the bidiagonalisation begins afresh from a random vector, until
`completeness` shows that nothing lies beyond, or something turns up, which then has to converge.

The bound is that of the symmetric operator S = (0 A; Aᵀ 0), whose eigenvalues are the singular
values of A, their negatives, and zeros. Bidiagonalisation from v is Lanczos on S from (0, v): its
coefficients are 0 on the diagonal, and α, β, α, β ... beside it. An eigenvector of S is
(u, v) / √2, so that a start which is random in v alone has the part (v·x) / √2 along it: as much
as a random start in twice the dimension. With the triplets (U, Σ, V) taken out, S without its
subspace {(U, 0), (0, V)} is the same matrix of (I − UUᵀ) A (I − VVᵀ), which is what the bases run
on; and of that subspace only the vectors (U, 0) leak, by what AᵀU has outside V.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from hvp_core.krylov.bidiagonal_basis import Coefficients
from hvp_core.krylov.completeness import Claim, Deflated, Recurrence, hold
from hvp_core.krylov.lanczos_search import FAILURE
from hvp_core.krylov.lanczos_state import Stage, Standing
from hvp_core.krylov.svds_state import Checked, SvdsState
from hvp_core.linop.linear_operator import LinearOperator

#: A fresh run that ends in rounding resolves only gaps of so many times what rounding leaves.
_BLUR = 2000
#: Other triplets are taken out with the wanted ones if their residuals are this part of the leak
#: that is allowed.
_SETTLED = 0.1
#: A bound is of use if it is below the least of the wanted values by so much.
_BELOW = 0.9
_TOLD = 64  # triplets, of a search that is under way


@final
class SvdsSearch:
    """A step of thick-restart bidiagonalisation, and of the runs that look for what it missed.

    All that lasts is in the state; this object is made for one step and holds its Ritz values.

    Args:
        k: Number of triplets that are sought.
        tol: The largest residual that counts as converged, relative to the largest Ritz value.
        max_products: Upper bound on products, those of the verification included.
        operator: A, no wider than it is tall.
        state: State of the search; each step changes it.
    """

    def __init__(
        self, k: int, tol: float, max_products: int, operator: LinearOperator, state: SvdsState
    ):
        self.k, self.tol, self.max_products = k, tol, max_products
        self.operator, self.state, self.basis = operator, state, state.basis

    def step(self) -> tuple[Stage, Standing]:
        """Make two products and act on them: go on, restart, begin a fresh run, or end the search.

        Returns:
            The stage that the products were for, and where the search stood after them.

        Raises:
            CurvatureError: NON_FINITE.
        """
        state, basis = self.state, self.basis
        found = basis.extend(self.operator)
        state.num_products += 2
        if state.fresh is not None:
            state.num_fresh_products += 2
            _append(state.fresh, found, self.basis.rounding * state.scale)
        self._solve()
        is_searching = state.fresh is None or self._moved()
        stage: Stage = "iterating" if is_searching else "completeness"
        standing = self._standing()
        exhausted = 0.0 in found and not basis.whole
        if self._is_over(is_searching, exhausted):
            state.checked = Checked(standing)
            basis.rotate(self.left[:, : self.k], self.right[:, : self.k])
            return stage, standing
        if is_searching or exhausted:
            state.fresh = None  # what was found has to converge before the next fresh run
        if is_searching and state.has_converged and self._is_ready():
            self._look_for_missed()
            return stage, standing
        if basis.full:
            self._make_room()
        if found.beta == 0:
            basis.start_afresh(self.operator.domain)
        return stage, standing

    def _solve(self) -> None:
        """Ritz values, descending, and their coefficients in both bases."""
        found = self.operator.domain.agree(self.basis.triplets())
        self.values, self.left, self.right = found
        self.state.scale = max(self.state.scale, float(self.values[0]))

    @property
    def estimates(self) -> Tensor:
        """Residual norms of the wanted triplets, in exact arithmetic, or a little more."""
        return self.basis.residuals(self.left[:, : self.k])

    def tolerance(self, least: float) -> float:
        """The largest residual that counts as converged; `least` relative to the largest value."""
        return max(self.tol, least) * self.state.scale

    def margin(self, blur: int = 1) -> float:
        """How far beyond the i-th wanted value the i-th singular value may lie."""
        return self.tolerance(blur * self.basis.rounding)

    def _standing(self) -> Standing:
        """Where the search stands: of many triplets those furthest from done, in their order."""
        values = self.values[: self.k].tolist()
        estimates = self.estimates.clamp(min=self.basis.eps * self.state.scale).tolist()
        worst = sorted(range(len(estimates)), key=lambda index: -estimates[index])[:_TOLD]
        return Standing(
            num_restarts=self.state.num_restarts,
            ritz_values=tuple(values[index] for index in sorted(worst)),
            residual_estimates=tuple(estimates[index] for index in sorted(worst)),
        )

    def _is_over(self, is_searching: bool, exhausted: bool) -> bool:
        """Whether the wanted triplets are complete or the budget is spent."""
        state = self.state
        if self.basis.whole:
            state.has_converged = state.is_complete = True
            state.shown_margin = self.margin()
        elif is_searching:
            enough = self.basis.size >= self.k
            limit = self.tolerance(4 * self.basis.eps)
            state.has_converged = enough and bool((self.estimates <= limit).all())
            # A product with a random vector that is exactly zero shows that there is nothing.
            if state.has_converged and state.scale == 0:
                state.is_complete, state.shown_margin = True, 0.0
        else:
            state.is_complete = self.operator.domain.agree(self._complete(exhausted))
        # The next step takes two products, and the verification two for each triplet.
        left = self.max_products - state.num_products - 2 * self.k
        return state.is_complete or left < 2

    def _moved(self) -> bool:
        """Whether the fresh run has changed the wanted values by more than the margin."""
        gap = (self.values[: self.k] - self.state.reference).abs().max()
        return float(gap) > self.margin()

    def _make_room(self) -> None:
        """Compress the bases, to the wanted triplets and half as many more as there is room for.

        A fresh run that has filled them, and shown nothing, was too short to tell the wanted values
        from the next ones: the next run is one without some of these.
        """
        state, capacity = self.state, len(self.basis.B)
        keep = min(self.k + (capacity - self.k) // 2, capacity - 1)
        if state.fresh is not None:
            state.fresh = None
            state.num_beyond = min(keep - self.k, 2 * state.num_beyond + 1)
        self.basis.compress(self.values[:keep], self.left[:, :keep], self.right[:, :keep])
        state.num_restarts += 1

    # Looking for what was missed ----------------------------------------------------------------

    @property
    def _leak(self) -> float:
        """What all triplets that are taken out may newly leak: half as much each round.

        What they have leaked before stays, and whether it matters is seen when the claims are.
        """
        return self.margin() * 0.5 ** (self.state.num_rounds + 2)

    def _settled(self) -> int:
        """Number of the first triplets that are known well enough to be taken out.

        The wanted ones are among them; room for a fresh run is left.
        """
        most = min(self.k + (len(self.basis.B) - self.k) // 2, self.basis.size)
        known = (self.basis.coupling @ self.left[:, :most]).abs() <= _SETTLED * self._leak
        known[: self.k] = True
        return int(known.int().cumprod(0).sum())

    def _is_ready(self) -> bool:
        """Whether the triplets to take out are known well enough to be shown complete."""
        settled = self._settled()
        if settled < min(self.k + self.state.num_beyond, self.basis.size):
            return False
        return float((self.basis.coupling @ self.left[:, :settled]).norm()) <= self._leak

    def _look_for_missed(self) -> None:
        """Take out the wanted triplets and others that have settled; begin a fresh run."""
        state, basis, r = self.state, self.basis, self._settled()
        state.reference = self.values[: self.k].clone()
        basis.compress(self.values[:r], self.left[:, :r], self.right[:, :r])
        basis.start_afresh(self.operator.domain)
        sigma, zero = torch.diag(self.values[:r]), torch.zeros(r, r, dtype=torch.float64)
        state.deflated = Deflated(
            torch.cat((torch.cat((zero, sigma), 1), torch.cat((sigma, zero), 1))),
            torch.cat((basis.leaks, torch.zeros_like(basis.leaks)), 1),
        )
        state.fresh = Recurrence(2 * (basis.dimension - r), basis.rounding)
        state.num_rounds += 1

    def _complete(self, exhausted: bool) -> bool:
        """Whether the fresh run has shown that nothing was missed."""
        state = self.state
        assert state.fresh is not None
        assert state.deflated is not None
        margin = self.margin(_BLUR if exhausted else 1)
        claims = [
            Claim(value + margin, most) for most, value in enumerate(state.reference.tolist())
        ]
        bound = state.fresh.bound(FAILURE, within=claims[-1].t * _BELOW)
        if not hold(claims, state.deflated, bound):
            return False
        state.shown_margin = margin
        return True


def _append(run: Recurrence, found: Coefficients, rounding: float) -> None:
    """Note a step of the bidiagonalisation as two of Lanczos; the run ends where α is zero.

    A coefficient of zero may be what rounding leaves of the operator's norm, in a direction that
    has a part of 1/√n along any one vector.
    """
    least = rounding / math.sqrt(run.dimension)
    run.append(0.0, max(found.alpha, least))
    if found.alpha > 0:
        run.append(0.0, max(found.beta, least))
