"""Blocks of products, and vectors to begin with: right whatever they are, and worth their while."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.krylov.krylov_basis import KrylovBasis
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.krylov.lanczos_state import wanted
from hvp_core.runs.algorithm import Advance, Budget, drive
from hvp_operations.checking import Seed
from hvp_operations.eigsh import EigshSpec, Which
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace
from tests.core.spectra import Run, matrix, random, run
from tests.core.test_certificates import WHICHES, claims_are_true, prescribed

OUTLIERS = torch.cat(
    (torch.tensor([-9.0, -4.0, -2.5]), torch.linspace(-1, 1, 150), torch.tensor([3.0, 5.0, 11.0]))
).double()


class Counting(DenseOperator):
    """A matrix that notes how many vectors come in each call."""

    def __init__(self, a: Tensor):
        super().__init__(a)
        self.calls: list[int] = []

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        self.calls.append(len(vectors))
        return super().apply(vectors, borrow=borrow)


def searched(found: Run) -> int:
    """Products before completeness, and before verification."""
    return next(
        (each.num_products for each in reversed(found.reported) if each.stage == "iterating"), 0
    )


def eigenvectors(a: Tensor, k: int, which: Which) -> Tensor:
    """The wanted eigenvectors of a dense matrix, (k, n)."""
    values, vectors = torch.linalg.eigh(a)
    return vectors[:, wanted(values, k, which)].T


@pytest.mark.parametrize("which", WHICHES)
@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_blocks_claim_nothing_that_is_false(block_size: int, which: Which) -> None:
    for seed, dtype, tol in ((0, torch.float32, 1e-2), (3, torch.float64, 1e-2)):
        spectrum, k = prescribed(seed)
        claims_are_true(matrix(spectrum, seed).to(dtype), k, which, tol, seed, block_size)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(2))
def test_random_operators_never_give_a_wrong_k_in_blocks_or_from_given_vectors(part: int) -> None:
    outcomes = []
    for seed in range(part * 7, part * 7 + 7):
        spectrum, k = prescribed(seed)
        a = matrix(spectrum, seed)
        for number, which in enumerate(WHICHES):
            for dtype in (torch.float64, torch.float32):
                block_size = 1 + (seed + number) % 4
                every = eigenvectors(a, len(a), "SA").to(dtype)
                near = eigenvectors(a, k, which) + 1e-3 * random(len(a), seed=seed) / len(a) ** 0.5
                tol = [0.0, 1e-2][seed % 2]
                given: tuple[Sequence[Tensor], ...] = ((), list(every[:k]), list(near.to(dtype)))
                for starts in given:
                    outcomes.append(
                        claims_are_true(a.to(dtype), k, which, tol, seed, block_size, starts)
                    )
    assert outcomes.count("CONVERGED") > 0.7 * len(outcomes)
    assert "NOISE_LIMIT" not in outcomes


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_block_sees_as_many_copies_at_once_as_it_has_vectors(block_size: int) -> None:
    spectrum = torch.cat((torch.linspace(0, 1, 120), torch.full((4,), 3.0))).double()
    found = run(matrix(spectrum), 4, "LA", tol=1e-8, block_size=block_size)
    assert found.pairs.converged
    assert found.pairs.eigenvalues.tolist() == pytest.approx([3.0] * 4)
    rounds = [each.stage for each in found.reported]
    begun = sum(a != "completeness" == b for a, b in itertools.pairwise(rounds))
    assert begun <= {1: 4, 2: 2, 4: 1}[block_size]


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_products_come_in_blocks_and_are_counted_one_by_one(block_size: int) -> None:
    operator = Counting(matrix(OUTLIERS))
    spec = EigshSpec(k=6, which="LM", tol=1e-8, block_size=block_size)
    budget = Budget(max_products=300, num_vectors=99, inputs={"v0": ()})
    reported: list[Advance] = []
    found = drive(Eigsh.configure(spec, operator, budget), operator, reported.append).result
    assert found.outcome == "CONVERGED"
    assert found.num_products == operator.count == sum(operator.calls)
    search = [size for size, each in zip(operator.calls, reported, strict=True)
              if each.stage == "iterating"]  # fmt: skip
    assert search[:-1] == [block_size] * (len(search) - 1)
    assert found.completeness.num_products == sum(
        each.stage == "completeness" for each in reported
    )  # taken singly: so they are fewest


@pytest.mark.parametrize(("block_size", "most"), [(2, 1.5), (4, 2.2)])
def test_blocks_take_fewer_calls_and_not_many_more_products(block_size: int, most: float) -> None:
    for spectrum, k in (
        (OUTLIERS, 6),
        (torch.cat((torch.linspace(0, 1, 300), 1.2 + torch.linspace(0, 1e-3, 8))).double(), 8),
    ):
        single = run(matrix(spectrum), k, "LM", tol=1e-6)
        block = run(matrix(spectrum), k, "LM", tol=1e-6, block_size=block_size)
        assert len(block.reported) < len(single.reported)
        assert block.count <= most * single.count


@pytest.mark.parametrize("block_size", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 3, 5, 9])
def test_a_block_that_does_not_fit_into_the_space_is_as_wide_as_that(
    n: int, block_size: int
) -> None:
    a = matrix(torch.arange(n).double())
    found = run(a, n, "SA", block_size=block_size)
    torch.testing.assert_close(
        found.pairs.eigenvalues, torch.arange(n).double(), rtol=0, atol=1e-13
    )
    assert found.count == 2 * n


@pytest.mark.parametrize("block_size", [1, 3])
def test_the_budget_is_kept_in_blocks_too(block_size: int) -> None:
    for most in (12, 13, 14, 29):
        found = run(matrix(OUTLIERS), 6, "LM", max_products=most, block_size=block_size)
        assert found.count == found.pairs.num_products == most
        assert not found.pairs.converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_basis_keeps_its_law_with_several_vectors_waiting(dtype: torch.dtype) -> None:
    a, eps = matrix(OUTLIERS).to(dtype), torch.finfo(dtype).eps
    space = DenseSpace(len(a), dtype)
    basis = KrylovBasis.begin(space, 20, 3, width=3, starts=[random(len(a), dtype)])
    for _ in range(30):
        basis.extend(space, a @ basis.pending[0])
        size, end = basis.size, basis.num_rows
        rows, T = basis.rows[:end], basis.T[:end, :size].to(dtype)
        assert float((rows @ rows.T - torch.eye(end)).abs().max()) < 20 * eps
        assert float((a @ rows[:size].T - rows.T @ T).abs().max()) < 100 * eps
        assert torch.equal(basis.T[:size, :size], basis.T[:size, :size].T)
        if basis.full:
            values, vectors = torch.linalg.eigh(basis.T[:size, :size])
            basis.compress(values[-8:], vectors[:, -8:])


# Vectors to begin with


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_from_eigenvectors_a_search_takes_a_product_for_each(
    block_size: int, dtype: torch.dtype
) -> None:
    copies = torch.cat((torch.linspace(0, 1, 200), torch.full((6,), 1.3))).double()
    for spectrum, which in ((OUTLIERS, "LM"), (copies, "LA")):
        a = matrix(spectrum)
        y = eigenvectors(a, 6, "LM").to(dtype)
        found = run(a.to(dtype), 6, "LM", block_size=block_size, tol=1e-5, starts=list(y))
        assert found.pairs.converged, which
        assert searched(found) <= 6 + block_size
        assert found.count < run(a.to(dtype), 6, "LM", block_size=block_size, tol=1e-5).count


def test_from_vectors_near_the_eigenvectors_it_takes_fewer_products_than_from_random_ones() -> None:
    a = matrix(torch.cat((torch.linspace(0, 1, 250), torch.tensor([1.05, 1.1, 1.2]))).double())
    y = eigenvectors(a, 5, "LA")
    noise = torch.stack([random(len(a), seed=seed) for seed in range(5)]) / len(a) ** 0.5
    cold = run(a, 5, "LA", tol=1e-6)
    counts = [
        run(a, 5, "LA", tol=1e-6, starts=list(y + eps * noise)).count for eps in (1e-2, 1e-4, 0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] < cold.count
    assert counts[1] < 0.7 * cold.count


@pytest.mark.parametrize("which", WHICHES)
@pytest.mark.parametrize("block_size", [1, 2])
def test_vectors_orthogonal_to_the_wanted_ones_hide_nothing(block_size: int, which: Which) -> None:
    # Coordinates are the eigenvectors: what they lack, no product with them ever has.
    spectrum = torch.cat((OUTLIERS[:3], torch.linspace(-1, 1, 50).double(), OUTLIERS[-3:]))
    operator, k = torch.diag(spectrum), 3
    outer = wanted(spectrum.sort().values, 2 * k, which)
    for dtype in (torch.float64, torch.float32):
        hidden = spectrum.sort().values[wanted(spectrum.sort().values, k, which)]
        few = [index for index in range(len(spectrum)) if spectrum[index] not in hidden]
        inner = [index for index in few if spectrum[index] in spectrum.sort().values[outer]]
        starts = [DenseSpace(len(spectrum), dtype).coordinate(index) for index in inner or few[:k]]
        for given in (starts, starts[:1], [sum(starts[1:], starts[0])]):
            pairs = run(
                operator.to(dtype), k, which, tol=1e-5, block_size=block_size, starts=given
            ).pairs
            assert pairs.converged
            torch.testing.assert_close(pairs.eigenvalues, hidden, rtol=0, atol=2e-4)


def test_some_of_the_copies_do_not_hide_the_others() -> None:
    spectrum = torch.cat((torch.linspace(0, 1, 60), torch.full((5,), 2.0))).double()
    starts = [DenseSpace(65).coordinate(index) for index in (60, 61, 62)]
    for k in (3, 5):
        pairs = run(torch.diag(spectrum), k, "LA", tol=1e-8, starts=starts).pairs
        assert pairs.converged
        assert pairs.eigenvalues.tolist() == pytest.approx([2.0] * k)


@pytest.mark.parametrize("block_size", [1, 2])
def test_vectors_that_depend_on_one_another_add_nothing_and_do_no_harm(block_size: int) -> None:
    a = matrix(OUTLIERS)
    one, other = random(len(a), seed=1), random(len(a), seed=2)
    tiny = 1e-30 * other
    for starts in ([one, one], [one, -one], [one, -3 * one, other], [one, tiny], [one] * 9,
                   [one, other, one + 1e-9 * other]):  # fmt: skip
        pairs = run(a, 3, "LM", tol=1e-8, block_size=block_size, starts=starts).pairs
        assert pairs.converged
        assert pairs.eigenvalues.tolist() == pytest.approx([-9, 5, 11])


def test_more_vectors_than_the_basis_or_the_space_has_are_no_harm() -> None:
    a = matrix(OUTLIERS)
    vectors = torch.linalg.eigh(a).eigenvectors
    pairs = run(a, 2, "LM", tol=1e-8, num_vectors=6, starts=list(vectors.T[-30:])).pairs
    assert pairs.converged
    assert pairs.eigenvalues.tolist() == pytest.approx([-9, 11])
    small = matrix(torch.arange(5).double())
    found = run(small, 2, "LA", starts=[random(5, seed=seed) for seed in range(9)])
    assert found.pairs.eigenvalues.tolist() == pytest.approx([3, 4])


def test_a_vector_of_zeros_is_refused() -> None:
    a = matrix(OUTLIERS)
    with pytest.raises(CurvatureError, match="V0_INVALID"):
        run(a, 2, "LA", starts=[random(len(a)), torch.zeros(len(a)).double()])


def test_vectors_to_begin_with_are_not_written_to() -> None:
    a = matrix(OUTLIERS)
    starts = list(eigenvectors(a, 4, "LM"))
    before = [start.clone() for start in starts]
    for given in (starts, starts[:1]):
        run(a, 4, "LM", starts=given, tol=1e-6)
    assert all(map(torch.equal, starts, before))


def test_a_run_that_is_given_vectors_shows_completeness_from_random_ones_of_its_own() -> None:
    space = DenseSpace(300)
    cold = KrylovBasis.begin(space, 5, 3)
    warm = KrylovBasis.begin(space, 5, 3, starts=[cold.rows[0].clone()])
    cold.start_afresh(space)
    warm.start_afresh(space)
    assert abs(float(cold.pending[0] @ warm.pending[0])) < 0.5


def test_a_spec_takes_memory_for_its_block_and_its_vectors() -> None:
    seed = Seed(0)
    for k, block_size, num_given in ((3, 1, 0), (3, 4, 0), (3, 2, 7)):
        spec = EigshSpec(k, block_size=block_size, seed=seed, v0=("v",) * num_given)
        operator = DenseOperator(matrix(OUTLIERS))
        starts = [random(len(OUTLIERS), seed=seed) for seed in range(num_given)]
        budget = Budget(max_products=300, num_vectors=60, inputs={"v0": starts})
        algorithm = Eigsh.configure(spec, operator, budget)
        rows = algorithm.begin(operator).basis.rows
        # Beside the rows: products, their vectors' copies in the check, one to work in, results.
        assert len(rows) + 2 * block_size + 1 + k <= budget.num_vectors
        assert len(rows) == algorithm.num_vectors + max(block_size, num_given)
