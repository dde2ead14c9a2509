"""The search for extremal eigenpairs, until none of the wanted can be missing.

Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
Anal. Appl. 22 (2000). Of a repeated eigenvalue so many copies are seen as there are starting
vectors, and nothing of what these are orthogonal to. So when the wanted pairs have converged they
are taken out, and the run begins afresh from one random vector, which takes the fewest products:
until it has found something that belongs to the wanted, which then has to converge too, or
`completeness` shows that there is nothing.

A run that is given more vectors than go into one call begins with combinations of them: each
product then improves every pair, as it would not in a Krylov space of each. Where the combinations'
products show that the vectors span an invariant subspace already, all have their products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.krylov.completeness import Claim, Deflated, Recurrence, hold
from hvp_core.krylov.lanczos_state import (
    LanczosState,
    Sought,
    Stage,
    Standing,
    Verification,
    wanted,
)
from hvp_core.krylov.orthogonality import distance
from hvp_core.linop.linear_operator import LinearOperator

#: Probability with which one fresh start may overlook an eigenvalue.
FAILURE = 1e-3
#: A fresh run that ends in rounding resolves only gaps of so many times what rounding leaves.
_BLUR = 2000
#: Other pairs are taken out with the wanted ones if their residuals are this part of the leak that
#: is allowed.
_SETTLED = 0.1
#: Given vectors span an invariant subspace if products leave it by so many times the tolerance.
_SETTLED_STARTS = 10
_PAIRS_TOLD = 64  # of a search that is under way
_ROOM = 4  # rows that a fresh run has at least, where there are so many


@final
class LanczosSearch:
    """A step of thick-restart Lanczos, and of the fresh runs that look for what it missed.

    All that lasts is in the state; this object is made for one step and holds its Ritz values.

    Args:
        sought: Which eigenpairs the search is for.
        max_products: Upper bound on products, those of the verification included.
        block_size: Number of vectors whose products are taken in one call.
        starts: Vectors that the search was given to begin with, (local,) each.
        operator: The operator whose eigenpairs are sought.
        state: State of the search; each step changes it.
    """

    def __init__(
        self,
        sought: Sought,
        max_products: int,
        block_size: int,
        starts: Sequence[Tensor],
        operator: LinearOperator,
        state: LanczosState,
    ):
        self.sought, self.max_products = sought, max_products
        self.block_size, self.starts = block_size, starts
        self.operator, self.space = operator, operator.domain
        self.state, self.basis = state, state.basis

    def count(self, num_products: int) -> None:
        """Note products that were made."""
        self.state.num_products += num_products
        self.state.size = max(self.state.size, self.operator.size)

    def solve(self) -> None:
        """Ritz values and T's eigenvectors for the current size."""
        state, size = self.state, self.basis.size
        self.values, self.vectors = self.space.agree(
            tuple(torch.linalg.eigh(self.basis.T[:size, :size]))
        )
        self.index = wanted(self.values, self.sought.k, self.sought.which)
        state.scale = max(state.scale, float(self.values.abs().max()) if size else 0.0)

    @property
    def estimates(self) -> Tensor:
        """Residual norms of the wanted Ritz pairs, in exact arithmetic, or a little more."""
        return self.basis.residuals(self.vectors[:, self.index])

    def tolerance(self, least: float) -> float:
        """The largest residual that counts as converged; `least` of what rounding goes by."""
        return max(self.sought.tol * self.state.scale, least * self.state.rounded_by)

    @property
    def margin(self) -> float:
        """How far beyond the i-th wanted value the i-th eigenvalue may lie."""
        return self.tolerance(self.state.blur * self.basis.rounding)

    @property
    def is_spent(self) -> bool:
        """Whether the products that are left are those of the verification."""
        return self.state.num_products >= self.max_products - self.sought.k

    @property
    def leak(self) -> float:
        """The most that the wanted pairs may leak when a fresh run begins.

        The leak that pairs have then stays for ever, and where (t - θ) (t - μ) is above the square
        of all leaks, none of them matters. So the first round may leak a quarter of the margin, and
        each one after it half as much as the one before.
        """
        return self.margin * 0.5 ** (self.state.num_rounds + 2)

    def standing(self) -> Standing:
        """Where the search stands.

        Of many pairs only those furthest from done are told, in their order: an event is stored for
        each product, and k may be thousands.
        """
        values = self.values[self.index].tolist()
        estimates = self.estimates.clamp(min=self.basis.eps * self.state.rounded_by).tolist()
        worst = sorted(range(len(estimates)), key=lambda index: -estimates[index])[:_PAIRS_TOLD]
        return Standing(
            num_restarts=self.state.num_restarts,
            ritz_values=tuple(values[index] for index in sorted(worst)),
            residual_estimates=tuple(estimates[index] for index in sorted(worst)),
        )

    # Searching ----------------------------------------------------------------------------------

    def step(self) -> tuple[Stage, Standing]:
        """Make one call, and act on it: go on, restart, begin a fresh run, or end the search.

        Returns:
            The stage that the products were for, and where the search stood after them.

        Raises:
            CurvatureError: NON_FINITE.
        """
        exhausted = self._extend()
        is_searching = self.state.fresh is None or self._moved()
        if is_searching and self.block_size > 1:
            self.state.fresh = None  # what it has found may have copies
            if self.basis.num_pending:
                self.basis.widen(self.space, self.block_size)
        stage: Stage = "iterating" if is_searching else "completeness"
        standing = self.standing()
        if self._is_over(is_searching, exhausted):
            self.end()
        elif is_searching and self.state.has_converged and self.space.agree(self._is_ready()):
            self.look_for_missed()
        elif exhausted:
            self._start_afresh()
        elif self.basis.full:
            self._make_room()
        return stage, standing

    def _extend(self) -> bool:
        """Make the products of one call; true when the Krylov space is exhausted."""
        state, basis = self.state, self.basis
        left = max(1, self.max_products - self.sought.k - state.num_products)
        count = min(self.block_size, basis.num_pending, basis.capacity - basis.size, left)
        for product in self.operator.apply(list(basis.pending[:count]), borrow=True):
            alpha, beta = basis.extend(self.space, product)
            if state.fresh is not None:  # in such a run a single row waits
                state.fresh.append(alpha, beta)
        self.count(count)
        state.num_fresh_products += count if state.fresh is not None else 0
        state.num_given = max(0, state.num_given - count)
        if state.num_products == count and len(self.starts) > self.block_size:
            self._look_at_starts()
        self.solve()
        return basis.exhausted

    def _look_at_starts(self) -> None:
        """Let all the given vectors have their products, if the operator hardly leaves their span.

        The first products are those of combinations of all of them, and tell that.
        """
        basis, space = self.basis, self.space
        known = basis.T[: basis.num_rows, : basis.size]
        self.state.scale = float(known.norm(dim=0).max())  # at most ‖A‖
        outside = [
            float(coupling.norm()) * distance(space, self.starts, row)
            for coupling, row in zip(known[basis.size :], basis.pending, strict=True)
        ]
        if sum(outside) <= _SETTLED_STARTS * self.tolerance(4 * basis.eps):
            basis.include(space, self.starts)
            self.state.num_given = basis.num_pending

    def _is_over(self, is_searching: bool, exhausted: bool) -> bool:
        """Whether the wanted pairs are complete or the budget is spent."""
        state = self.state
        if self.basis.whole:
            state.has_converged = state.is_complete = True
        elif is_searching:
            state.has_converged = self._converged()
        else:
            state.is_complete = self.space.agree(self._complete(exhausted))
        if state.is_complete or self.is_spent:
            return True
        if is_searching and state.has_converged and (not self.ends() or self._is_zero):
            state.is_complete = True  # nothing can lie beyond
        return state.is_complete

    @property
    def _is_zero(self) -> bool:
        """Whether products with random vectors have all been zero, as those of 0 alone are."""
        return self.state.scale == 0 and not self.starts

    def end(self) -> None:
        """Make the first rows of the basis the wanted Ritz vectors."""
        self._keep_first_ritz()
        if self.state.fresh is not None and not self.basis.whole and not self._moved():
            self._take_back()
        self.state.verification = Verification(self.standing())
        self.basis.rotate(self.vectors[:, self.index])

    def _converged(self) -> bool:
        """Whether the residuals of the wanted pairs meet the tolerance."""
        enough = self.basis.size >= self.sought.k and not self.state.num_given
        enough = enough and (self._moved() or not self.state.must_move)
        return enough and bool((self.estimates <= self.tolerance(4 * self.basis.eps)).all())

    def _moved(self) -> bool:
        """Whether the fresh run has changed the wanted values by more than the margin."""
        if not len(self.state.reference) or self.state.has_slid:
            return False
        gap = (self.values[self.index] - self.state.reference).abs().max()
        return float(gap) > self.margin

    def _keep_first_ritz(self) -> None:
        if not len(self.state.ritz_values):
            self.state.ritz_values = self.values
            self.state.ritz_weights = self.vectors[0].square()

    def _make_room(self) -> None:
        """Make room in a full basis: restart, or let a fresh run that has found nothing go on."""
        if self.state.fresh is None or self._moved():
            self._restart()
        elif not self.state.has_slid and len(self._settled()) > self.basis.origin:
            # Something lies at the edge of the wanted: once it is known as well, without it.
            if self._converged() and self._is_ready():
                self.look_for_missed()
            else:
                self._restart()
        elif not self._sees_more():
            self.basis.slide()
            self.state.has_slid = True
        else:
            self._take_back()
            self.basis.start_afresh(self.space, self.block_size)
            self.state.must_move = True

    def _take_back(self) -> None:
        """Forget the fresh run, and go back to the basis that it was set against."""
        assert self.state.deflated is not None
        self.basis.take_back(self.state.deflated.leaks)
        self.state.fresh, self.state.has_slid = None, False
        self.solve()

    def _start_afresh(self) -> None:
        """Search on from random vectors; called when the Krylov space is exhausted."""
        self._keep_first_ritz()
        if self.state.has_slid:
            self._take_back()
        self.state.fresh = None
        if self.basis.full:
            self._restart()
        self.basis.start_afresh(self.space, self.block_size)

    def _restart(self) -> None:
        """Compress the basis to the wanted Ritz vectors and as many more as half the rest."""
        self._keep_first_ritz()
        capacity, k = self.basis.capacity, self.sought.k
        keep = min(k + (capacity - k) // 2, max(k, capacity - self.block_size))
        index = wanted(self.values, keep, self.sought.which)
        self.basis.compress(self.values[index], self.vectors[:, index])
        self.state.fresh = None
        self.state.num_restarts += 1

    # Looking for what was missed ----------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Whether the wanted pairs are known well enough to be shown complete."""
        leak = self.basis.coupling(self.vectors[:, self._settled()])
        return float(leak.norm()) <= self.leak

    def look_for_missed(self) -> None:
        """Take out the wanted pairs and others that have settled; begin a fresh run."""
        self._keep_first_ritz()
        basis, index = self.basis, self._settled()
        basis.compress(self.values[index], self.vectors[:, index])
        basis.start_afresh(self.space)
        self.state.reference = self.values[self.index]
        self.state.deflated = Deflated(
            basis.T[: basis.size, : basis.size].clone(), basis.leaks.clone()
        )
        self.state.fresh = Recurrence(basis.dimension - basis.size, basis.rounding)
        self.state.must_move, self.state.has_slid, self.state.blur = False, False, 1
        self.state.num_rounds += 1

    def _settled(self) -> Tensor:
        """Indices of the wanted Ritz pairs and of others that are known even better."""
        ends = self.values[self.index]
        distance = (self.values[:, None] - ends).abs().amin(1)
        settled = self.basis.residuals(self.vectors) <= _SETTLED * self.leak
        settled[self.index] = True
        room = self.basis.capacity - self.sought.k
        most = self.sought.k + max(0, min(room // 2, room - _ROOM))
        # The nearest to the wanted ends first; these themselves have distance zero.
        nearest = distance.argsort(stable=True)
        found: Tensor = nearest[settled[nearest]][:most].sort().values
        return found

    def ends(self) -> list[tuple[int, list[Claim]]]:
        """The claims that have to hold for the wanted values to be complete.

        Returns:
            For each end of the spectrum its sign, and claims on the operator times that sign.
        """
        known = self.state.fresh is not None and not self._moved()
        values = self.state.reference if known else self.values[self.index]
        k, which, margin = self.sought.k, self.sought.which, self.margin
        num_low = {"LA": 0, "SA": k, "BE": k // 2, "LM": int((values < 0).sum())}[which]
        low, high = (-values[:num_low]).tolist(), values[num_low:].flip(0).tolist()
        up, down = (
            [Claim(value + margin, most) for most, value in enumerate(end)] for end in (high, low)
        )
        if which == "LM":
            least = float(values.abs().min()) + margin
            up.append(Claim(least, k - num_low))
            down.append(Claim(least, num_low))
        if self.operator.semidefinite:  # nothing lies below zero
            down = [claim for claim in down if claim.t < 0]
        return [(sign, end) for sign, end in ((1, up), (-1, down)) if end]

    def _complete(self, exhausted: bool) -> bool:
        """Whether the fresh run has shown that nothing was missed."""
        assert self.state.fresh is not None
        assert self.state.deflated is not None
        self.state.blur = _BLUR if exhausted else 1
        ends = self.ends()
        for sign, claims in ends:
            run, deflated = self.state.fresh, self.state.deflated
            if sign < 0:
                run, deflated = run.mirrored(), deflated.mirrored()
            if not hold(claims, deflated, run.bound(FAILURE / len(ends))):
                return False
        return True

    def _sees_more(self) -> bool:
        """Whether the fresh run has values beyond the wanted ones that its basis has lost."""
        assert self.state.fresh is not None
        return bool(
            self.space.agree(
                any(
                    (self.state.fresh if sign > 0 else self.state.fresh.mirrored()).has_beyond(
                        min(claim.t for claim in claims)
                    )
                    for sign, claims in self.ends()
                )
            )
        )
