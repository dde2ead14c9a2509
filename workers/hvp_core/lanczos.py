"""Extremal eigenpairs of a symmetric operator from its products: thick-restart Lanczos.

Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
Anal. Appl. 22 (2000), with full reorthogonalisation. Nothing here knows of models or ranks: the
operator is a function, and a vector is whatever part of it this process holds.

One starting vector sees one copy of a repeated eigenvalue, and a residual certifies an eigenvalue,
not the k-th. So when the wanted pairs have converged, the run goes on from a fresh random vector,
orthogonal to them, until either something new is found among the wanted ends, which then has to
converge too, or `completeness` shows that there is nothing. The pairs are then verified by products
of their own, which may be more exact than those of the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from hvp_core.completeness import Claim, Deflated, Recurrence, hold
from hvp_core.krylov_basis import Dots, KrylovBasis, rounding

Which = Literal["LA", "SA", "LM", "BE"]
Stage = Literal["iterating", "completeness", "verifying"]
Outcome = Literal[
    "CONVERGED", "MAX_PRODUCTS", "MULTIPLICITY_UNCERTAIN", "NOISE_LIMIT", "UNVERIFIED"
]
Matvec = Callable[[Tensor], Tensor]

#: A residual is trusted to this many times what rounding leaves.
_TRUSTED = 10
#: Probability with which one fresh start may overlook something.
_FAILURE = 1e-3
#: Where a fresh run ends in rounding, what it has not seen it tells only from so many times that.
_BLUR = 2000
#: Others are taken out with the wanted pairs if their residuals are this part of what may leak.
_SETTLED = 0.1
_ROOM = 4  # rows that a fresh run has at least, where there are so many


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to look for and what it may cost.

    Attributes:
        k: Number of eigenpairs, 1 <= k < n, or k = n.
        which: LA, SA, LM or BE, as in SciPy.
        tol: Stop when each residual estimate is at most tol · max |θ|, 0 <= tol < 1; 0 means
            rounding.
        max_products: Upper bound on products, the k of the verification included; at least 2k.
        num_vectors: Rows of the basis, k < num_vectors <= n (k = num_vectors only where k = n).
        semidefinite: The operator is known to have no negative eigenvalue.
        noise: Relative error of one product of the search, where that is more than the rounding of
            the vectors' dtype: the search does not try to see below it.

    Raises:
        ValueError: tol is 1 or more: every vector of the space would do.
    """

    k: int
    which: Which
    tol: float
    max_products: int
    num_vectors: int
    semidefinite: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tol < 1:
            raise ValueError(f"tol is {self.tol}; 0 <= tol < 1 is possible")


@final
@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands after a product."""

    stage: Stage
    num_products: int
    num_restarts: int
    ritz_values: tuple[float, ...]  # the wanted ones, ascending
    residual_estimates: tuple[float, ...]  # |β s| for each


@final
@dataclass(frozen=True, kw_only=True)
class Completeness:
    """What is known of eigenvalues that the pairs do not show.

    Attributes:
        shown: With the i-th wanted eigenvalue at most `margin` further out than the i-th of the
            pairs, counted from its end: none was missed.
        margin: In units of the eigenvalues: the tolerance, and the search's own noise.
        failure_probability: That `shown` is wrong, by bad luck of the random starts; 0 where the
            basis spans the whole space.
        num_products: Spent on it.
    """

    shown: bool
    margin: float
    failure_probability: float
    num_products: int


@final
@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """The result, ascending."""

    eigenvalues: Tensor  # (k,) float64, Rayleigh quotients of the verifying products
    eigenvectors: Tensor  # (k, local) rows, orthonormal
    residuals: Tensor  # (k,) float64, ‖Ay − θy‖ / ‖y‖ from the verifying products
    #: (k,) float64: [θ − bound, θ + bound] holds an eigenvalue of A; (0,) where nothing is claimed.
    error_bounds: Tensor
    num_products: int
    outcome: Outcome
    completeness: Completeness
    symmetry_defect: float  # largest |u·Av − v·Au| / ‖Av‖ met between basis vectors
    ritz_values: Tensor  # (m,) float64 of the first basis, before any restart
    ritz_weights: Tensor  # (m,) squared overlaps with the starting vector; they sum to one

    @property
    def converged(self) -> bool:
        """Every pair meets the tolerance and none was missed."""
        return self.outcome == "CONVERGED"


def wanted(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices of the k wanted among ascending values, ascending."""
    m = len(values)
    k = min(k, m)
    if which == "LA":
        return torch.arange(m - k, m)
    if which == "SA":
        return torch.arange(k)
    if which == "LM":
        return values.abs().argsort(descending=True)[:k].sort().values
    low = k // 2
    return torch.cat((torch.arange(low), torch.arange(m - (k - low), m)))


def eigsh(
    matvec: Matvec,
    start: Tensor,
    dimension: int,
    plan: Plan,
    *,
    dots: Dots,
    random: Callable[[int], Tensor],
    agree: Callable[[Any], Any] = lambda found: found,
    verifier: Callable[[], Matvec | None] | None = None,
) -> Generator[Progress, None, Eigenpairs]:
    """Run Lanczos as a generator: it yields after every product and returns the eigenpairs.

    Args:
        matvec: v -> Av, on what this process holds of a vector, (local,). What it returns is not
            written to.
        start: Starting vector (local,), not zero.
        dimension: n, the length of a whole vector.
        plan: What to find.
        dots: (rows (m, local), vector (local,)) -> inner products (m,) float64 of whole vectors.
        random: seed -> a random vector (local,), Gaussian: nothing else may depend on it.
        agree: One answer from those of all processes: two machines may solve the same small
            eigenproblem with other signs, and each would rotate its part of the basis its own way.
        verifier: Asked when the search is over, gives v -> Av as exact as the vector's dtype can
            hold it, or None where that cannot be afforded; by default matvec is as exact. Error
            bounds are of this operator.

    Yields:
        Progress after every product.

    Returns:
        The pairs. Their outcome is `CONVERGED` when every true residual meets the tolerance, or
        rounding, and none was missed; `MULTIPLICITY_UNCERTAIN` when the latter could not be shown
        within the budget; `NOISE_LIMIT` when the search had converged and the verifying products
        do not confirm it: more of the same products would not help; `UNVERIFIED` when there were
        none such: nothing is claimed; else `MAX_PRODUCTS`.

    Raises:
        CurvatureError: NON_FINITE.

    Cost: at most plan.max_products products, and 4 m n multiplications for orthogonality in each;
    (num_vectors + 1) vectors of memory. To show that none was missed takes about as many products
    as it takes to separate the wanted ends from the rest: some ten where they stand far apart.
    """
    krylov = _Krylov(matvec, start, dimension, plan, dots, random, agree)
    yield from krylov.iterate()
    exact = matvec if verifier is None else verifier()
    return (yield from krylov.verify(exact))


@final
class _Krylov:
    """A run between two products."""

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
        self.rounding = rounding(torch.finfo(start.dtype).eps)  # of what verifies
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
        return Progress(
            stage=stage,
            num_products=self.num_products,
            num_restarts=self.num_restarts,
            ritz_values=tuple(self.values[self.index].tolist()),
            residual_estimates=tuple(self.estimates.tolist()),
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
            if not hold(claims, deflated, run.bound(_FAILURE / len(ends))):
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

    # Verifying ----------------------------------------------------------------------------------

    def verify(self, exact: Matvec | None) -> Generator[Progress, None, Eigenpairs]:
        """Rayleigh-Ritz vectors and their true residuals, one product each.

        Args:
            exact: The products; None if there are none better than the search's.
        """
        basis, k = self.basis, len(self.index)
        told = self.progress("verifying")
        basis.rotate(self.vectors[:, self.index])
        values, residuals = [], []
        for i in range(k):
            y, rest = basis.rows[i], basis.rows[k]
            w = (exact or self.matvec)(y)
            self.num_products += 1
            squared = float(basis.dots(y.unsqueeze(0), y)[0])
            value = float(basis.dots(y.unsqueeze(0), w)[0]) / squared
            torch.add(w, y, alpha=-value, out=rest)
            values.append(value)
            residuals.append(basis.norm(rest) / math.sqrt(squared))
            yield Progress(
                stage="verifying",
                num_products=self.num_products,
                num_restarts=self.num_restarts,
                ritz_values=told.ritz_values,
                residual_estimates=told.residual_estimates,
            )
        order = self._sort(values)
        found = torch.tensor(values, dtype=torch.float64)[order]
        true = torch.tensor(residuals, dtype=torch.float64)[order]
        meets = bool((true <= self.tolerance(_TRUSTED * self.rounding)).all())
        noise = float(true.max())
        assert self.first_ritz is not None
        return Eigenpairs(
            eigenvalues=found,
            eigenvectors=basis.rows[:k],
            residuals=true,
            error_bounds=true + self.rounding * self.scale if exact else true[:0],
            num_products=self.num_products,
            outcome=self._outcome(meets, exact is not None),
            completeness=self._completeness(found, noise) if exact else self._nothing_known(),
            symmetry_defect=basis.symmetry_defect,
            ritz_values=self.first_ritz[0],
            ritz_weights=self.first_ritz[1],
        )

    def _completeness(self, values: Tensor, noise: float) -> Completeness:
        """What is known of the eigenvalues beyond these, which are known to `noise`."""
        margin, failure = self.margin, min(1.0, _FAILURE * self.num_rounds)
        shown = self.is_complete
        if self.basis.whole:
            failure = 0.0
        elif not shown and self.plan.semidefinite and self.plan.which == "SA":
            # The i-th smallest is at most the i-th Ritz value, and not negative.
            shown, margin, failure = True, max(0.0, float(values[-1])), 0.0
        return Completeness(
            shown=shown,
            margin=margin + noise,
            failure_probability=failure,
            num_products=self.num_fresh_products,
        )

    def _nothing_known(self) -> Completeness:
        return Completeness(
            shown=False,
            margin=math.inf,
            failure_probability=1.0,
            num_products=self.num_fresh_products,
        )

    def _outcome(self, meets: bool, is_verified: bool) -> Outcome:
        if self.has_converged and not is_verified:
            return "UNVERIFIED"
        if meets:
            return "CONVERGED" if self.is_complete else "MULTIPLICITY_UNCERTAIN"
        return "NOISE_LIMIT" if self.has_converged else "MAX_PRODUCTS"

    def _sort(self, values: Sequence[float]) -> Tensor:
        """Bring the first rows of the basis into the order of these values; the permutation."""
        order = torch.tensor(values, dtype=torch.float64).argsort(stable=True)
        rows, spare = self.basis.rows, self.basis.rows[len(values)]
        place = list(range(len(values)))  # which of the vectors lies in a row
        for row, vector in enumerate(order.tolist()):
            other = place.index(vector)
            if other != row:
                spare.copy_(rows[row])
                rows[row].copy_(rows[other])
                rows[other].copy_(spare)
                place[row], place[other] = place[other], place[row]
        return order
