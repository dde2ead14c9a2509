"""The search for extremal eigenpairs with hardly more vectors than there are wanted pairs.

Where a basis has a few rows beside the wanted pairs, each restart of Lanczos throws away most of
what its products have found. But the recurrence takes two vectors alone, and its coefficients tell
when the wanted values have converged. So it is run twice from the same start: the first pass keeps
the coefficients, and the second, which makes the same products, sums up the wanted Ritz vectors.
That takes twice the products of Lanczos with a basis of any size, and two vectors beside the pairs.

The vectors of such a recurrence lose their orthogonality, and two passes with products that differ
by noise part from one another. Neither touches what is claimed: the new vectors are made
orthonormal and get a product each with A, of which their Ritz pairs, and bounds on the residuals,
are made, so that the basis keeps the law of `KrylovBasis`. Pairs that have converged are kept, and
the recurrence runs orthogonal to them; with those that have not it starts again. In the end the
basis goes to `LanczosSearch` for the fresh run that looks for what was missed, which takes two rows
beside the pairs too; what that sees is searched for in two passes in its turn.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from hvp_core.krylov.lanczos_search import LanczosSearch
from hvp_core.krylov.lanczos_state import Stage, Standing, wanted
from hvp_core.krylov.orthogonality import (
    finite_dots,
    finite_norm,
    leave_outside,
    random_outside,
)
from hvp_core.krylov.two_pass import Seen, TwoPass, seen
from hvp_core.runs.algorithm import derived_seed

#: A pair's residual may be so many times the rounding of a product.
_ROUNDINGS = 16
#: The first pass goes on until its own estimates are this part of what will do.
_DEEPER = 0.25
#: Pairs are worth going on from if their residuals are this part of the largest value.
_NEAR = 1e-3
#: A Ritz value with less weight in the start than this part of what a random one has of an
#: eigenvector is a ghost that comes out of rounding: one in a thousand eigenvectors has less.
_WEIGHTLESS = 1e-6
#: The first pass looks at its Ritz values again after this part more products.
_LOOK_AGAIN = 0.08
#: A pass makes no more products: looking at its Ritz values takes time of their third power.
_MOST_STEPS = 1500


@final
class TwoPassSearch:
    """A step of the search in two passes; all that lasts is in the state.

    Args:
        search: The search by Lanczos of the same state, which begins and ends this one.
    """

    def __init__(self, search: LanczosSearch):
        self.search, self.state, self.basis = search, search.state, search.basis
        self.space, self.operator, self.sought = search.space, search.operator, search.sought
        self.passes = self.state.two_pass or TwoPass()
        self.state.two_pass = self.passes

    def step(self) -> tuple[Stage, Standing]:
        """Make one product, and act on it.

        Returns:
            The stage that the product was for, and where the search stood after it.

        Raises:
            CurvatureError: NON_FINITE.
        """
        passes = self.passes
        if not passes.is_on:
            return self._step_of_lanczos()
        if passes.unknown:
            stage: Stage = "iterating"
            self._measure(passes.unknown.pop())
        elif passes.num_left:
            stage = "iterating"
            self._take_in()
        elif passes.num_done or len(passes.weights):
            stage = "second_pass"
            self._second()
        else:
            stage = "first_pass"
            self._first()
        self._see()
        standing = self.search.standing()
        if passes.num_kept < 0:
            self._go_on()
        return stage, standing

    def _step_of_lanczos(self) -> tuple[Stage, Standing]:
        """A step of the first basis or of a fresh run; where rows are full, begin the passes."""
        state = self.state
        num_restarts, must_move = state.num_restarts, state.must_move
        told = self.search.step()
        has_restarted = state.num_restarts > num_restarts or (state.must_move and not must_move)
        if has_restarted and state.verification is None and not state.num_given:
            self.basis.give_up()
            self.search.solve()
            self._keep(self.search.values, self.search.vectors)
            self._go_on()
        return told

    # What the rows are ---------------------------------------------------------------------------

    def _keep(self, values: Tensor, vectors: Tensor) -> None:
        """Make these Ritz vectors the rows, each with a bound on its residual."""
        bounds = self.basis.residuals(vectors)
        self.basis.compress(values, vectors)
        # The norm of A is not known, but a bound beyond what is known of it would say nothing.
        self.basis.leaks = torch.diag(bounds.clamp(max=2 * self.state.rounded_by))
        self.passes.is_on, self.passes.num_kept, self.passes.known = True, -1, []
        self._see()

    def _see(self) -> None:
        """Let the search see the rows as what they are: Ritz vectors."""
        search, size = self.search, self.basis.size
        search.values = self.basis.T[:size, :size].diagonal().clone()
        search.vectors = torch.eye(size, dtype=torch.float64)
        order = search.values.argsort()
        search.index = order[wanted(search.values[order], self.sought.k, self.sought.which)]

    @property
    def _enough(self) -> float:
        """The residual of a pair that will do: all together leak a quarter of the margin."""
        margin = self.search.margin
        rounding = _ROUNDINGS * self.basis.eps * self.state.rounded_by
        return min(margin, max(margin / (4 * math.sqrt(self.sought.k)), rounding))

    def _go_on(self) -> None:
        """Begin two passes for the wanted pairs that have not converged; else look for others."""
        search, state = self.search, self.state
        bounds = self.basis.leaks.diagonal()
        settled, is_near = bounds <= self._enough, bounds <= _NEAR * self.state.scale
        rows = search.index.tolist()
        kept = [row for row in rows if settled[row]]
        rest = [row for row in rows if not settled[row]]
        self.passes.unknown = [row for row in rest if is_near[row] and row not in self.passes.known]
        if self.passes.unknown and not search.is_spent:
            return  # a product each tells more than a bound that every rotation has added to
        self.passes.unknown = []
        left = self.search.max_products - self.sought.k - state.num_products
        most = min((left - self.sought.k) // 2, _MOST_STEPS)
        if state.must_move:  # the fresh run has seen what there is in fewer
            most = min(most, 4 * state.num_fresh_products + 50)
        if not rest and not state.must_move and len(rows) == self.sought.k:
            self._look_for_missed()
        elif most < 2:
            self._end()
        else:
            self._begin(kept, rest, most)

    def _measure(self, row: int) -> None:
        """Note the true residual of a row's pair, of a product with it."""
        basis, rest = self.basis, self.basis.rows[self.basis.size]
        (product,) = self.operator.apply([basis.rows[row]], borrow=True)
        self.search.count(1)
        value = float(basis.T[row, row])
        torch.add(product, basis.rows[row], alpha=-value, out=rest)
        basis.leaks[row, row] = finite_norm(self.space, rest)
        self.passes.known.append(row)
        if not self.passes.unknown:
            self.passes.num_kept = -1

    def _begin(self, kept: list[int], rest: list[int], most: int) -> None:
        """Begin the first pass: with a random vector, or the sum of what passes have left to do.

        The sum of Ritz vectors of one basis may lack any eigenvector: passes have to have found the
        pairs, and to have come nearer with the last ones.
        """
        basis, passes = self.basis, self.passes
        helped = 0 < len(rest) < passes.num_unsettled and self._can_be_summed(rest)
        order = torch.tensor(kept + rest, dtype=torch.long)
        leaks = basis.leaks.diagonal()[order]
        basis.compress(self.search.values[order], self.search.vectors[:, order])
        basis.leaks = torch.diag(leaks)
        passes.num_kept = len(kept)
        passes.alphas, passes.betas = [], []
        passes.weights, passes.num_done, passes.num_left = passes.weights[:0, :0], 0, 0
        passes.most, passes.next_look = most, min(most, len(rest) + 2)
        passes.start = -1
        passes.num_unsettled = len(rest) if helped else self.sought.k + 1
        if not helped:
            basis.num_starts += 1
            passes.start = basis.num_starts
        self._start(basis.size)

    def _can_be_summed(self, rest: list[int]) -> bool:
        """Whether a recurrence that starts with the sum of these rows has them all, and apart."""
        least = _NEAR * self.state.scale
        values = self.search.values[rest].sort().values
        near = self.basis.leaks.diagonal()[rest] <= least
        return bool(near.all()) and bool((values.diff() > _NEAR * least).all())

    def _start(self, row: int) -> None:
        """Put the start of the recurrence into the second of two rows, and zeros into the first."""
        basis, passes = self.basis, self.passes
        known, z = basis.rows[: passes.num_kept], basis.rows[basis.size + 1]
        if passes.start < 0:
            torch.sum(basis.rows[passes.num_kept : basis.size], 0, out=z)
            leave_outside(self.space, known, z)
        else:
            part, passes.start = random_outside(
                self.space,
                known,
                lambda index: self.space.random(derived_seed(basis.seed, index), "gaussian"),
                passes.start,
            )
            basis.num_starts = max(basis.num_starts, passes.start)
            z.copy_(part)
        if row != basis.size:  # the rows that had not converged have done their part
            basis.rows[row + 1] = z
        basis.rows[row].zero_()
        basis.num_pending = max(0, row + 2 - basis.size)

    # The two passes ------------------------------------------------------------------------------

    def _recur(self, row: int, num_done: int, beta: float) -> tuple[float, float]:
        """Make the product with the recurrence's present vector, and of it the one that follows.

        Args:
            row: Index of the first of the two rows that the vectors take in turn.
            num_done: Products of this pass before this one.
            beta: Coupling of the present vector to the one before.

        Returns:
            α, and the coupling of the present vector to the next: 0 where only rounding is left.
        """
        basis, known = self.basis, self.basis.rows[: self.passes.num_kept]
        present = row + (num_done + 1) % 2
        z, w = basis.rows[present], basis.rows[row + num_done % 2]
        (product,) = self.operator.apply([z], borrow=True)
        self.search.count(1)
        w.mul_(-beta).add_(product)
        alpha = float(finite_dots(self.space, z.unsqueeze(0), w)[0])
        w.add_(z, alpha=-alpha)
        w.addmv_(known.T, finite_dots(self.space, known, w).to(w), alpha=-1)
        following = finite_norm(self.space, w)
        if following <= basis.rounding * max(self.state.scale, abs(alpha), beta):
            return alpha, 0.0
        w.div_(following)
        return alpha, following

    def _first(self) -> None:
        """A step of the first pass; at its end, prepare the second."""
        passes = self.passes
        before = passes.betas[-1] if passes.betas else 0.0
        alpha, beta = self._recur(self.basis.size, len(passes.alphas), before)
        passes.alphas.append(alpha)
        passes.betas.append(beta)
        steps = len(passes.alphas)
        if steps < passes.next_look and beta:
            return
        passes.next_look = min(passes.most, steps + max(1, int(_LOOK_AGAIN * steps)))
        found = self.space.agree(self._look(is_last=steps >= passes.most or not beta))
        if found is not None:
            passes.weights = found
            self._start_second()

    def _look(self, *, is_last: bool) -> Tensor | None:
        """The coefficients of the new vectors, once the wanted values have converged."""
        basis, passes = self.basis, self.passes
        found = seen(
            passes.alphas,
            passes.betas,
            basis.rounding * max(self.state.scale, max(map(abs, passes.alphas))),
            min(basis.eps, _WEIGHTLESS / basis.dimension),
        )
        self.state.scale = max(self.state.scale, float(found.values.abs().max()))
        index = self._needed(found)
        has_converged = found.residuals[index] <= _DEEPER * self._enough
        if is_last and passes.num_kept + int(has_converged.sum()) >= self.sought.k:
            index = index[has_converged]
        elif not is_last and not (len(index) and bool(has_converged.all())):
            return None
        return found.weights[:, index]

    def _needed(self, found: Seen) -> Tensor:
        """Which of the values seen are wanted, beside those that are known."""
        num_kept, size = self.passes.num_kept, self.basis.size
        known = self.basis.T[:size, :size].diagonal()[:num_kept]
        values, order = torch.cat((known, found.values)).sort(stable=True)
        chosen = order[wanted(values, self.sought.k, self.sought.which)]
        found_index = (chosen[chosen >= num_kept] - num_kept).sort().values
        room = self.basis.capacity - 1 - num_kept
        return found_index[wanted(found.values[found_index], room, self.sought.which)]

    def _start_second(self) -> None:
        """Begin the second pass, or none if there is nothing to make."""
        basis, passes = self.basis, self.passes
        kept, count = passes.num_kept, passes.weights.shape[1]
        if not count:  # what was seen before is not there
            self.state.must_move = False
            basis.num_pending, passes.num_kept = 0, -1
            return
        self._start(kept + count)
        basis.rows[kept : kept + count].zero_()
        self._add()

    def _add(self) -> None:
        """Add the present vector of the second pass to all that are made of it."""
        kept, (steps, count) = self.passes.num_kept, self.passes.weights.shape
        z = self.basis.rows[kept + count + (self.passes.num_done + 1) % 2]
        for row, weight in enumerate(self.passes.weights[self.passes.num_done].tolist()):
            self.basis.rows[kept + row].add_(z, alpha=weight)
        if self.passes.num_done == steps - 1:
            self._make_orthonormal()

    def _second(self) -> None:
        """A step of the second pass."""
        passes = self.passes
        row = passes.num_kept + passes.weights.shape[1]
        before = passes.betas[-1] if passes.num_done else 0.0
        _, following = self._recur(row, passes.num_done, before)
        passes.betas = [following]
        passes.num_done += 1
        if following:
            self._add()
        else:  # products that differ: there is no more to add
            self._make_orthonormal()

    def _make_orthonormal(self) -> None:
        """Let what the passes have made wait for its products, orthonormal."""
        basis, passes = self.basis, self.passes
        basis.size = basis.origin = end = passes.num_kept
        basis.leaks = basis.leaks[:end, :end]
        for row in range(end, end + passes.weights.shape[1]):
            if leave_outside(self.space, basis.rows[:end], basis.rows[row]):
                if row != end:
                    basis.rows[end] = basis.rows[row]
                end += 1
        basis.num_pending = end - passes.num_kept
        # Where too little was seen, random vectors make up for it: pairs are not to be lost.
        basis.widen(self.space, self.sought.k - passes.num_kept)
        passes.num_left = basis.num_pending
        passes.weights, passes.num_done = passes.weights[:0, :0], 0
        if not passes.num_left:
            passes.num_kept = -1

    def _take_in(self) -> None:
        """The product of a new vector; after the last one, new Ritz pairs."""
        basis, passes = self.basis, self.passes
        (product,) = self.operator.apply([basis.pending[0]], borrow=True)
        self.search.count(1)
        basis.close(self.space, product)
        passes.num_left -= 1
        if passes.num_left:
            return
        self.search.solve()
        self.state.must_move = False
        keep = min(basis.size, basis.capacity - 1)
        index = wanted(self.search.values, keep, self.sought.which)
        self._keep(self.search.values[index], self.search.vectors[:, index])

    # Ending --------------------------------------------------------------------------------------

    def _look_for_missed(self) -> None:
        """Give the basis back to Lanczos, for a fresh run; or end, where nothing can be missing."""
        self.passes.is_on = False
        self.state.has_converged = True
        self.search.solve()
        if self.search.ends():
            self.search.look_for_missed()
        else:
            self.state.is_complete = True
            self.search.end()

    def _end(self) -> None:
        """End the search with what it has, for want of products."""
        self.passes.is_on = self.state.has_converged = False
        self.search.solve()
        self.search.end()
