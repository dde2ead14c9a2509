"""Operators made of operators, against the same made of dense matrices; and the laws of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.krylov.orthogonality import rounding
from hvp_core.linop.block_diagonal import BlockDiagonal
from hvp_core.linop.compositions import Identity, Preconditioned, Scaled, Shifted, Sum
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.linop.selection import Restricted, Selection, Stretch
from hvp_core.runs.algorithm import Budget, drive
from hvp_core.sharding.layout import Run
from hvp_core.stochastic.density import Density
from hvp_operations import diagonal, low_rank, trace, trace_of
from hvp_operations.density import DensitySpec
from hvp_operations.eigsh import EigshSpec
from hvp_operations.operation import Facts, Operation, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace, InParts
from tests.core.spectra import matrix

N = 12
SPACE = InParts(dict.fromkeys(map(str, range(N)), 1))  # each coordinate is a part
ALL = [Run(shard_offset=0, flat_start=0, flat_stop=N)]


class Lender(DenseOperator):
    """Lends its products in memory of its own, which all lenders share, as a curvature's kinds do.

    Writing to what it has lent is found out at the next product.
    """

    memory: tuple[list[Tensor], list[Tensor]] = ([], [])  # what was lent, and as it was

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        lent, before = Lender.memory
        assert all(map(torch.equal, lent, before)), "a product that was lent was written to"
        for each in lent:
            each.fill_(math.nan)  # it is good no more
        products = super().apply(vectors)
        Lender.memory = (products, [each.clone() for each in products]) if borrow else ([], [])
        return products


@dataclass(frozen=True)
class Case:
    """A composition and the matrix that it is."""

    operator: LinearOperator
    dense: Tensor


def symmetric(seed: int, rank: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(N, rank, generator=generator, dtype=torch.float64)
    return half @ half.T


def leaf(seed: int, kind: str) -> Case:
    a = symmetric(seed)
    if kind == "indefinite":
        a = a - symmetric(seed + 1000)
    if kind == "not symmetric":
        a = a.triu()
    operator = Lender(lambda v: a @ v, SPACE, semidefinite=kind == "semidefinite")
    operator.symmetric = kind != "not symmetric"
    return Case(operator, a)


def selection(stretches: Sequence[Stretch]) -> Selection:
    return Selection(SPACE, ALL, stretches)


def projector(stretches: Sequence[Stretch]) -> Tensor:
    p = torch.zeros(N, N, dtype=torch.float64)
    for start, stop in stretches:
        p[range(start, stop), range(start, stop)] = 1
    return p


SELECTIONS: list[list[Stretch]] = [[(0, 5)], [(2, 3), (7, 12)], [(0, 12)], [(1, 4), (4, 6)]]
NUMBERS = st.floats(-4, 4, allow_subnormal=False)
LEAVES = st.builds(
    leaf, st.integers(0, 50), st.sampled_from(["semidefinite", "indefinite", "not symmetric"])
)


def block_diagonal(case: Case, cut: int) -> Case:
    blocks = range(cut), range(cut + 1, N)
    ends = [projector([(each.start, each.stop)]) for each in blocks]
    dense = torch.stack([each @ case.dense @ each for each in ends]).sum(0)
    return Case(BlockDiagonal(case.operator, blocks), dense)


def compositions(inner: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    eye = torch.eye(N, dtype=torch.float64)
    return st.one_of(
        st.builds(lambda a, s: Case(Scaled(a.operator, s), s * a.dense), inner, NUMBERS),
        st.builds(lambda a, s: Case(Shifted(a.operator, s), a.dense + s * eye), inner, NUMBERS),
        st.builds(
            lambda terms: Case(
                Sum(*(each.operator for each in terms)),
                torch.stack([each.dense for each in terms]).sum(0),
            ),
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(block_diagonal, inner, st.integers(1, N - 2)),
        st.builds(preconditioned, inner, st.integers(0, 50)),
        st.just(Case(Identity(SPACE), eye)),
    )


def preconditioned(case: Case, seed: int) -> Case:
    root = (SPACE.random(seed, "gaussian") / 2).exp()
    return Case(Preconditioned(case.operator, root), root[:, None] * case.dense * root)


def restricted(case: Case, stretches: list[Stretch]) -> Case:
    p = projector(stretches)
    return Case(Restricted(case.operator, selection(stretches)), p @ case.dense @ p)


INNER = st.recursive(LEAVES, compositions, max_leaves=4)
CASES = INNER | st.builds(restricted, INNER, st.sampled_from(SELECTIONS))


def vectors(count: int, seed: int) -> list[Tensor]:
    return [SPACE.random(seed * 10 + index, "gaussian") for index in range(count)]


def close(one: Tensor, other: Tensor, case: Case) -> bool:
    size = 1 + float(case.dense.abs().sum())
    return bool((one - other).abs().max() <= 1e-12 * size * 10)


@settings(max_examples=200, deadline=None)
@given(case=CASES, seed=st.integers(0, 1000), count=st.integers(1, 3), borrow=st.booleans())
def test_products_are_those_of_the_matrix_one_by_one_or_many_at_once(
    case: Case, seed: int, count: int, borrow: bool
) -> None:
    given_ = vectors(count, seed)
    before = [each.clone() for each in given_]
    together = [each.clone() for each in case.operator.apply(given_, borrow=borrow)]
    assert all(map(torch.equal, given_, before))
    for v, product in zip(given_, together, strict=True):
        assert close(product, case.dense @ v, case)
        (alone,) = case.operator.apply([v], borrow=borrow)
        assert close(alone, product, case)


@settings(max_examples=100, deadline=None)
@given(case=CASES, seed=st.integers(0, 1000), a=NUMBERS, b=NUMBERS)
def test_every_composition_is_linear(case: Case, seed: int, a: float, b: float) -> None:
    u, v = vectors(2, seed)
    au, av = case.operator.apply([u, v])
    (both,) = case.operator.apply([a * u + b * v])
    assert close(both, a * au + b * av, case)


@settings(max_examples=100, deadline=None)
@given(case=CASES, seed=st.integers(0, 1000))
def test_what_is_said_of_symmetry_and_sign_is_so(case: Case, seed: int) -> None:
    size = 1 + float(case.dense.abs().sum())
    if case.operator.symmetric:
        u, v = vectors(2, seed)
        au, av = case.operator.apply([u, v])
        assert abs(float(u @ av - v @ au)) <= 1e-11 * size
    if case.operator.semidefinite:
        assert float(torch.linalg.eigvalsh(case.dense)[0]) >= -1e-12 * size


class Forms(LinearOperator):
    """A matrix whose forms are told without a product."""

    symmetric = semidefinite = True

    def __init__(self, a: Tensor):
        self.domain = self.codomain = SPACE
        self._a = a

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        raise AssertionError("a form takes no product")

    def forms(self, vectors: Sequence[Tensor]) -> list[float]:
        return [float(v @ self._a @ v) for v in vectors]


def test_forms_of_what_is_semidefinite_take_no_product() -> None:
    a, b, root = symmetric(1), symmetric(2), SPACE.random(3, "gaussian").exp()
    inner = Sum(Scaled(Forms(a), 2.0), Forms(b), Scaled(Identity(SPACE), 0.25))
    operator = Shifted(Preconditioned(Shifted(inner, 0.5), root), 3.0)
    eye = torch.eye(N, dtype=torch.float64)
    dense = root[:, None] * (2 * a + b + 0.75 * eye) * root + 3 * eye
    given_ = vectors(3, 0)
    expected = [float(v @ dense @ v) for v in given_]
    assert operator.forms(given_) == pytest.approx(expected, rel=1e-13)
    for none in (
        Scaled(Forms(a), -1.0),
        Shifted(Forms(a), -1.0),
        Sum(Forms(a), leaf(0, "semidefinite").operator),
        Sum(Forms(a), Scaled(Forms(a), -1.0)),
        Preconditioned(leaf(0, "semidefinite").operator, root),
    ):
        assert none.forms(given_) is None


def test_where_terms_cancel_rounding_goes_by_their_sizes() -> None:
    a = symmetric(1)
    norm = float(torch.linalg.matrix_norm(a, 2))
    top = torch.linalg.eigh(a).eigenvectors[:, -1]
    almost = DenseOperator(-(1 - 1e-6) * a)
    cases: list[tuple[LinearOperator, float]] = [
        (Sum(DenseOperator(a), almost), 2 * norm),
        (Scaled(Sum(DenseOperator(a), almost), -3.0), 6 * norm),
        (Shifted(DenseOperator(a), -norm), 2 * norm),
        (Sum(Scaled(DenseOperator(a, semidefinite=True), 2.0)), 0.0),
        (Sum(DenseOperator(a, semidefinite=True), Identity(DenseSpace(N))), 0.0),
        (Shifted(DenseOperator(a, semidefinite=True), 1.0), 0.0),
        # What a diagonal does to all terms alike changes no ratio.
        (Preconditioned(Sum(DenseOperator(a), almost), torch.full_like(top, 10)), 200 * norm),
    ]
    for operator, size in cases:
        assert operator.size == 0
        operator.apply([top])
        assert operator.size == pytest.approx(size, rel=1e-5)


def test_intervals_of_terms_that_cancel_hold_the_eigenvalues_of_the_exact_sum() -> None:
    """In float32, a difference that is a millionth of its terms is known to a tenth or so."""
    n = 60
    a = matrix(torch.linspace(1, 2, n).double())
    difference = 1e-6 * matrix(torch.linspace(-1, 1, n).double())
    true = torch.linalg.eigvalsh(difference)

    def term(exact: Tensor) -> DenseOperator:
        space = DenseSpace(n, torch.float32)
        return DenseOperator(lambda v: (exact @ v.double()).float(), space)

    operator = Sum(term(a + difference), term(-a))
    search = Eigsh(spec=EigshSpec(k=2, which="BE"), max_products=200, num_vectors=20)
    found = drive(search, operator).result
    assert found.outcome == "NOISE_LIMIT"  # the tolerance is relative to the difference
    for value, bound in zip(found.eigenvalues, found.error_bounds, strict=True):
        assert float((true - value).abs().min()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_bounded_of_terms_that_cancel_allows_for_their_rounding(dtype: torch.dtype) -> None:
    n, eps = 60, torch.finfo(dtype).eps
    a = matrix(torch.linspace(1, 2, n).double())
    difference = 10 * eps * matrix(torch.linspace(-1, 1, n).double())

    def known(operation: Operation[Any], spec: Any) -> Any:
        left, right = (a + difference).to(dtype), (-a).to(dtype)
        operator = Sum(DenseOperator(left), DenseOperator(right))
        cost = operation.cost(spec, Facts(num_parameters=n, kind="hessian"))
        budget = Budget(max_products=cost.max_products, num_vectors=cost.wished_vectors)
        algorithm = load(operation.algorithm).configure(spec, operator, budget)
        return drive(algorithm, operator).result

    least = rounding(eps) * 2  # each product is rounded as those of A are, of norm 2
    assert known(trace.OPERATION, trace.TraceSpec(method="hutchinson")).rounding >= n * least
    assert known(diagonal.OPERATION, diagonal.DiagonalSpec()).rounding >= least
    below = trace_of.TraceOfSpec("count", high=0.0)
    assert known(trace_of.OPERATION, below).high == n  # nothing is known of any sign
    found = known(low_rank.OPERATION, low_rank.LowRankSpec(3))
    assert found.error == 0
    assert found.error_bound >= least


@settings(max_examples=50, deadline=None)
@given(case=CASES, seed=st.integers(0, 1000))
def test_products_that_are_the_callers_own_stay_as_they_are(case: Case, seed: int) -> None:
    u, v = vectors(2, seed)
    (product,) = case.operator.apply([u])
    before = product.clone()
    case.operator.apply([v], borrow=True)
    assert torch.equal(product, before)
    product.add_(1)  # and are nobody else's
    (again,) = case.operator.apply([u])
    assert torch.equal(again, before)


@pytest.mark.parametrize("make", [lambda a: a, lambda a: Scaled(a, 2), lambda a: Shifted(a, 1)])
def test_flags_follow_from_the_parts(make: Callable[[LinearOperator], LinearOperator]) -> None:
    semidefinite, indefinite, general = (
        make(leaf(0, kind).operator) for kind in ("semidefinite", "indefinite", "not symmetric")
    )
    assert (semidefinite.symmetric, semidefinite.semidefinite) == (True, True)
    assert (indefinite.symmetric, indefinite.semidefinite) == (True, False)
    assert (general.symmetric, general.semidefinite) == (False, False)
    assert semidefinite.most_together is None
    bounded = [noisy(seed, 0.0) for seed in (1, 2)]
    bounded[0].most_together, bounded[1].most_together = 5, 3
    assert make(bounded[0]).most_together == 5
    assert Sum(*map(make, bounded), semidefinite).most_together == 3
    assert Sum(semidefinite, semidefinite).semidefinite
    assert not Sum(semidefinite, indefinite).semidefinite
    assert not Sum(semidefinite, general).symmetric
    for wrong in (Scaled(semidefinite, -1), Shifted(semidefinite, -1)):
        assert wrong.symmetric
        assert not wrong.semidefinite


def noisy(seed: int, noise: float, *, known: bool = True) -> DenseOperator:
    """A matrix whose products are off by so much, and which may know better."""
    a = symmetric(seed)
    return DenseOperator(
        lambda v: (1 + noise) * (a @ v),
        SPACE,
        noise=noise,
        exact=(lambda v: a @ v) if known else None,
    )


COMPOSITIONS: dict[str, Callable[[LinearOperator], tuple[LinearOperator, Any]]] = {
    "scaled": lambda a: (Scaled(a, -2), lambda d: -2 * d),
    "shifted": lambda a: (Shifted(a, 3), lambda d: d + 3 * torch.eye(N)),
    "preconditioned": lambda a: (
        Preconditioned(a, torch.full((N,), 2.0, dtype=torch.float64)),
        lambda d: 4 * d,
    ),
    "sum": lambda a: (Sum(a, noisy(2, 0.01)), lambda d: d + symmetric(2)),
    "restricted": lambda a: (
        Restricted(a, selection([(2, 9)])),
        lambda d: projector([(2, 9)]) @ d @ projector([(2, 9)]),
    ),
    "block-diagonal": lambda a: (
        BlockDiagonal(a, [range(2, 9)]),
        lambda d: projector([(2, 9)]) @ d @ projector([(2, 9)]),
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_exact_operator_is_composed_of_the_exact_ones(name: str) -> None:
    operator, dense = COMPOSITIONS[name](noisy(1, 0.01))
    assert operator.noise == (0.02 if name == "sum" else 0.01)
    exact = operator.exact()
    assert exact is not None
    assert exact is operator.exact()  # what it takes to make one is not taken twice
    assert exact.noise == 0
    assert exact.domain == operator.domain
    v = SPACE.random(1, "gaussian")
    torch.testing.assert_close(exact.apply([v])[0], dense(symmetric(1)) @ v, rtol=1e-13, atol=1e-12)
    assert COMPOSITIONS[name](noisy(1, 0.01, known=False))[0].exact() is None


def test_operators_between_different_spaces_have_no_sum() -> None:
    other = DenseOperator(torch.eye(3).double())
    with pytest.raises(ValueError, match="between the same spaces"):
        Sum(leaf(0, "semidefinite").operator, other)
    with pytest.raises(ValueError, match="no operators"):
        Sum()
    rectangular = leaf(0, "semidefinite").operator
    rectangular.codomain = DenseSpace(3)
    with pytest.raises(ValueError, match="another space"):
        Shifted(rectangular, 1.0)


# Selections ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stretches", [[], [(3, 3), (2, 5)], [(0, 13)], [(-1, 2)], [(0, 4), (3, 6)], [(5, 2)]]
)
def test_stretches_that_are_not_coordinates_are_refused(stretches: list[Stretch]) -> None:
    with pytest.raises(ValueError, match=r"not disjoint|no coordinate"):
        selection(stretches)


def test_blocks_that_overlap_are_refused() -> None:
    a = leaf(0, "semidefinite").operator
    with pytest.raises(ValueError, match="in common"):
        BlockDiagonal(a, [(0, 1, 2, 3, 8), (3, 4)])


def test_vectors_of_a_selection_are_those_of_the_whole_without_the_rest() -> None:
    space = Restricted(leaf(0, "semidefinite").operator, selection([(2, 5), (7, 9)])).domain
    p = projector([(2, 5), (7, 9)])
    assert space.dimension == 5
    for distribution in ("gaussian", "rademacher"):
        whole = SPACE.random(3, distribution)
        assert torch.equal(space.random(3, distribution), p @ whole)
    sphere = space.random(3, "sphere")
    assert float(sphere.norm()) == pytest.approx(1, abs=1e-15)
    assert torch.equal(p @ sphere, sphere)


def test_eigenpairs_and_density_of_a_restriction_are_those_of_the_submatrix() -> None:
    n = 60
    a = matrix(torch.linspace(-2, 3, n).double())
    runs = [Run(shard_offset=0, flat_start=0, flat_stop=n)]
    chosen = [*range(5, 20), *range(40, 55)]
    operator = Restricted(DenseOperator(a), Selection(DenseSpace(n), runs, [(5, 20), (40, 55)]))
    true = torch.linalg.eigvalsh(a[chosen][:, chosen])
    search = Eigsh(spec=EigshSpec(k=4, which="BE"), max_products=200, num_vectors=20)
    found = drive(search, operator)
    expected = torch.cat((true[:2], true[-2:]))
    torch.testing.assert_close(
        torch.tensor(found.result.eigenvalues, dtype=torch.float64), expected, rtol=0, atol=1e-11
    )
    assert all(float(v[20:40].abs().max()) == 0 for v in found.vectors)
    budget = Budget(max_products=90, num_vectors=10**6)
    spec = DensitySpec(num_probes=3, num_steps=100)
    density = drive(Density.configure(spec, operator, budget), operator).result
    for quadrature in density.quadratures:
        torch.testing.assert_close(
            torch.tensor(quadrature.nodes, dtype=torch.float64), true, rtol=0, atol=1e-11
        )
    assert density.num_products == 90


def test_a_selection_lies_on_each_rank_where_its_coordinates_do() -> None:
    # Two ranks, of which each has a stretch of either of two segments, padded.
    of_ranks = [
        [Run(shard_offset=offset, flat_start=start, flat_stop=stop) for offset, start, stop in runs]
        for runs in ([(0, 0, 4), (4, 7, 10)], [(0, 4, 7), (4, 10, 12)])
    ]
    first, second = (Selection(SPACE, runs, [(3, 5), (6, 11)]).mask for runs in of_ranks)
    assert first.nonzero().flatten().tolist() == [3, 4, 5, 6]
    assert second.nonzero().flatten().tolist() == [0, 2, 4]
