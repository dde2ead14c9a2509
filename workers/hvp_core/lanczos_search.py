"""The search for extremal eigenpairs, until none of the wanted can be missing.

Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
Anal. Appl. 22 (2000). One starting vector sees one copy of a repeated eigenvalue. So when the
wanted pairs have converged they are taken out, and the run begins afresh from a random vector:
until it has found something that belongs to the wanted, which then has to converge too, or
`completeness` shows that there is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, final

import torch
from torch import Tensor

from hvp_core.completeness import Claim, Deflated, Recurrence, hold
from hvp_core.eigenpairs import Plan, Progress, Stage, wanted
from hvp_core.krylov_basis import Dots, KrylovBasis

Matvec = Callable[[Tensor], Tensor]

#: Probability with which one fresh start may overlook something.
FAILURE = 1e-3
#: Where a fresh run ends in rounding, what it has not seen it tells only from so many times that.
_BLUR = 2000
#: Others are taken out with the wanted pairs if their residuals are this part of what may leak.
_SETTLED = 0.1
_ROOM = 4  # rows that a fresh run has at least, where there are so many


@final
class LanczosSearch:
    """Thick-restart Lanczos, and the fresh runs that look for what it missed.

    Law: what `fresh` is set against (`deflated`, the first `basis.origin` rows) stays as it is for
    as long as the fresh run lasts, and holds the wanted pairs.

    Args:
        matvec: See `hvp_core.lanczos.eigsh`, like the following.
        start: See there.
        dimension: See there.
        plan: See there.
        dots: See there.
        random: See there.
        agree: See there.
    """

    def __init__(
        self,
        matvec: Matvec,
        start: Tensor,
        dimension: int,
        plan: Plan,
        dots: Dots,
        random: Callable[[int], Tensor],
        agree: Callable[[Any], Any],
    ):
        self.matvec, self.agree, self.plan = matvec, agree, plan
        # A fresh run has to have room for two vectors beside the wanted ones.
        capacity = min(max(plan.num_vectors, plan.k + 2), dimension)
        self.basis = KrylovBasis(start, capacity, dimension, dots, random, plan.noise)
        self.scale = 0.0  # max |θ| met: the operator's norm as far as it is known
        self.num_products = self.num_restarts = 0
        self.first_ritz: tuple[Tensor, Tensor] | None = None
        # The fresh run that looks for what was missed:
        self.fresh: Recurrence | None = None
        self.deflated: Deflated | None = None
        self.reference = torch.zeros(0, dtype=torch.float64)  # wanted values when it began
        self.has_slid = False  # the basis has lost some of its vectors
        self.must_move = False  # it has seen something that the basis does not show yet
        self.blur = 1
        self.num_rounds = 0
        self.num_fresh_products = 0
        self.is_complete = self.has_converged = False
        self._solve()

    def _solve(self) -> None:
        """Ritz values and T's eigenvectors for the current size."""
        size = self.basis.size
        self.values, self.vectors = self.agree(tuple(torch.linalg.eigh(self.basis.T[:size, :size])))
        self.index = wanted(self.values, self.plan.k, self.plan.which)
        self.scale = max(self.scale, float(self.values.abs().max()) if size else 0.0)

    @property
    def estimates(self) -> Tensor:
        """Residual norms of the wanted Ritz pairs, in exact arithmetic, or a little more."""
        return self.basis.residuals(self.vectors[:, self.index])

    def tolerance(self, least: float) -> float:
        """The largest residual that counts as converged; `least` relative to max |θ|."""
        return max(self.plan.tol, least) * self.scale

    @property
    def margin(self) -> float:
        """How far beyond the i-th wanted value the i-th eigenvalue may lie."""
        return self.tolerance(self.blur * self.basis.rounding)

    def progress(self, stage: Stage) -> Progress:
        """Where the run stands; no estimate is below what its products can show."""
        estimates = self.estimates.clamp(min=self.basis.eps * self.scale)
        return Progress(
            stage=stage,
            num_products=self.num_products,
            num_restarts=self.num_restarts,
            ritz_values=tuple(self.values[self.index].tolist()),
            residual_estimates=tuple(estimates.tolist()),
        )

    # Searching ----------------------------------------------------------------------------------

    def iterate(self) -> Generator[Progress, None, None]:
        """Extend and restart until the wanted pairs are complete or the budget is spent."""
        basis, budget = self.basis, self.plan.max_products - self.plan.k
        while True:
            exhausted = self._extend()
            is_searching = self.fresh is None or self._moved()
            yield self.progress("iterating" if is_searching else "completeness")
            if basis.whole:
                self.has_converged = self.is_complete = True
            elif is_searching:
                self.has_converged = self._converged()
            else:
                self.is_complete = self.agree(self._complete(exhausted))
            if self.is_complete or self.num_products >= budget:
                break
            if is_searching and self.has_converged and not self._ends():
                self.is_complete = True  # nothing can lie beyond
                break
            if is_searching and self.has_converged and self.agree(self._is_ready()):
                self._look_for_missed()
            elif exhausted:
                self._start_afresh()
            elif basis.full:
                self._make_room()
        self._keep_first_ritz()
        if self.fresh is not None and not basis.whole and not self._moved():
            self._take_back()

    def _extend(self) -> bool:
        """One product and one new basis vector; true when the Krylov space was exhausted."""
        alpha, beta = self.basis.extend(self.matvec)
        self.num_products += 1
        if self.fresh is not None:
            self.fresh.append(alpha, beta)
            self.num_fresh_products += 1
        self._solve()
        return beta == 0 and not self.basis.whole

    def _converged(self) -> bool:
        """Whether the wanted pairs are those of the tolerance."""
        enough = self.basis.size >= self.plan.k and (self._moved() or not self.must_move)
        return enough and bool((self.estimates <= self.tolerance(4 * self.basis.eps)).all())

    def _moved(self) -> bool:
        """Whether the fresh run has found something beyond what was wanted when it began."""
        if not len(self.reference) or self.has_slid:
            return False
        gap = (self.values[self.index] - self.reference).abs().max()
        return float(gap) > self.margin

    def _keep_first_ritz(self) -> None:
        if self.first_ritz is None:
            self.first_ritz = (self.values.clone(), self.vectors[0].square())

    def _make_room(self) -> None:
        """A full basis: restart it, or let a fresh run that has found nothing yet go on."""
        if self.fresh is None or self._moved():
            self._restart()
        elif not self.has_slid and len(self._settled()) > self.basis.origin:
            # Something lies at the edge of the wanted: once it is known as well, without it.
            if self._converged() and self._is_ready():
                self._look_for_missed()
            else:
                self._restart()
        elif not self._sees_more():
            self.basis.slide()
            self.has_slid = True
        else:
            self._take_back()
            self.basis.start_afresh()
            self.must_move = True

    def _take_back(self) -> None:
        """Forget the fresh run, and go back to what it was set against."""
        assert self.deflated is not None
        self.basis.size = self.basis.origin
        self.basis.leaks = self.deflated.leaks
        self.basis.T[self.basis.size, :] = self.basis.T[:, self.basis.size] = 0
        self.fresh, self.has_slid = None, False
        self._solve()

    def _start_afresh(self) -> None:
        """The Krylov space is exhausted: search on from a random vector."""
        self._keep_first_ritz()
        if self.has_slid:
            self._take_back()
        self.fresh = None
        if self.basis.full:
            self._restart()
        self.basis.start_afresh()

    def _restart(self) -> None:
        """Compress the basis to the wanted Ritz vectors and as many more as half the rest."""
        self._keep_first_ritz()
        capacity, k = self.basis.capacity, self.plan.k
        keep = min(k + (capacity - k) // 2, capacity - 1)
        index = wanted(self.values, keep, self.plan.which)
        self.basis.compress(self.values[index], self.vectors[:, index])
        self.fresh = None
        self.num_restarts += 1

    # Looking for what was missed ----------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Whether the wanted pairs are known well enough to be shown complete.

        What pairs leak when a fresh run begins they leak for ever, and with (t - θ) (t - μ) above
        the square of all that leaks, nothing of it matters. So the first round may leak a quarter
        of the margin, and each one after it half as much as the one before.
        """
        leak = self.basis.coupling @ self.vectors[:, self._settled()]
        return float(leak.norm()) <= self._leak

    @property
    def _leak(self) -> float:
        return self.margin * 0.5 ** (self.num_rounds + 2)

    def _look_for_missed(self) -> None:
        """Take the wanted pairs, and what has settled beside them, out; start a fresh run."""
        self._keep_first_ritz()
        basis, index = self.basis, self._settled()
        basis.compress(self.values[index], self.vectors[:, index])
        basis.start_afresh()
        self.reference = self.values[self.index]
        self.deflated = Deflated(basis.T[: basis.size, : basis.size].clone(), basis.leaks.clone())
        self.fresh = Recurrence(basis.dimension - basis.size, basis.rounding)
        self.must_move, self.has_slid, self.blur = False, False, 1
        self.num_rounds += 1

    def _settled(self) -> Tensor:
        """Indices of the wanted Ritz pairs and of others that are known even better."""
        ends = self.values[self.index]
        distance = (self.values[:, None] - ends).abs().amin(1)
        settled = self.basis.residuals(self.vectors) <= _SETTLED * self._leak
        settled[self.index] = True
        room = self.basis.capacity - self.plan.k
        most = self.plan.k + max(0, min(room // 2, room - _ROOM))
        # The nearest to the wanted ends first; these themselves have distance zero.
        nearest = distance.argsort(stable=True)
        found: Tensor = nearest[settled[nearest]][:most].sort().values
        return found

    def _ends(self) -> list[tuple[int, list[Claim]]]:
        """What has to hold for the wanted values to be complete.

        Returns:
            The sign of an end and, of the operator times it, what has to hold upwards.
        """
        known = self.fresh is not None and not self._moved()
        values = self.reference if known else self.values[self.index]
        k, which, margin = self.plan.k, self.plan.which, self.margin
        num_low = {"LA": 0, "SA": k, "BE": k // 2, "LM": int((values < 0).sum())}[which]
        low, high = (-values[:num_low]).tolist(), values[num_low:].flip(0).tolist()
        up, down = (
            [Claim(value + margin, most) for most, value in enumerate(end)] for end in (high, low)
        )
        if which == "LM":
            least = float(values.abs().min()) + margin
            up.append(Claim(least, k - num_low))
            down.append(Claim(least, num_low))
        if self.plan.semidefinite:  # nothing lies below zero
            down = [claim for claim in down if claim.t < 0]
        return [(sign, end) for sign, end in ((1, up), (-1, down)) if end]

    def _complete(self, exhausted: bool) -> bool:
        """Whether the fresh run has shown that nothing was missed."""
        assert self.fresh is not None
        assert self.deflated is not None
        self.blur = _BLUR if exhausted else 1
        ends = self._ends()
        for sign, claims in ends:
            run, deflated = self.fresh, self.deflated
            if sign < 0:
                run, deflated = run.mirrored(), deflated.mirrored()
            if not hold(claims, deflated, run.bound(FAILURE / len(ends))):
                return False
        return True

    def _sees_more(self) -> bool:
        """Whether the fresh run has values beyond the wanted ones that its basis has lost."""
        assert self.fresh is not None
        return bool(
            self.agree(
                any(
                    (self.fresh if sign > 0 else self.fresh.mirrored()).has_beyond(
                        min(claim.t for claim in claims)
                    )
                    for sign, claims in self._ends()
                )
            )
        )
