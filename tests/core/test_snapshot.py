"""A state that is written down after any step and read elsewhere goes on as if nothing happened."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.runs.snapshot import Snapshot, restored, vectors_of_the_space, written
from hvp_operations.checking import Seed
from hvp_operations.eigsh import EigshResult, EigshSpec, Which
from torch import Tensor

from tests.core.dense import DenseOperator
from tests.core.spectra import matrix, random
from tests.core.written import is_same, run, through_bytes

CLUSTERED = torch.cat(
    (torch.tensor([-3.0, -3.0]), torch.linspace(-1, 1, 120), torch.tensor([1.05, 1.1, 1.1, 4.0]))
).double()
THREE_VALUES = torch.tensor([-1.0] * 10 + [0.5] * 25 + [2.0] * 10).double()


def eigsh(
    spectrum: Tensor,
    k: int,
    which: Which,
    dtype: torch.dtype,
    tol: float,
    num_vectors: int,
    max_products: int,
    block_size: int = 1,
    num_starts: int = 0,
) -> tuple[set[str], EigshResult]:
    """Compare a run with one whose state goes through bytes: what happened in it, its result."""
    operator = DenseOperator(matrix(spectrum).to(dtype), exact="itself")
    algorithm = Eigsh(
        spec=EigshSpec(k=k, which=which, tol=tol, seed=Seed(3), block_size=block_size),
        max_products=max_products,
        num_vectors=num_vectors,
        starts=[random(len(spectrum), dtype, seed=seed) for seed in range(num_starts)],
    )
    reported, found, last = run(algorithm, operator, interrupted=False)
    others, again, final = run(algorithm, operator, interrupted=True)
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert is_same(list(found.vectors), list(again.vectors))
    assert is_same(last.basis.T, final.basis.T)
    here, there = written(last), written(final)
    assert is_same([here.tensors, here.values], [there.tensors, there.values])

    happened = {advance.stage for advance in reported}
    state = algorithm.begin(operator)
    while algorithm.step(operator, state) is not None:
        happened |= {
            name
            for name, is_so in (
                ("restarted", state.num_restarts > 0),
                ("slid", state.has_slid),
                ("seen what the basis has lost", state.must_move),
                ("leaked", len(state.basis.leaks) > 0),
                ("begun afresh", state.basis.num_starts > state.num_rounds),
                ("twice looked for what was missed", state.num_rounds > 1),
            )
            if is_so
        }
    assert isinstance(found.result, EigshResult)
    return happened, found.result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_search_with_everything_in_it_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    wide, result = eigsh(CLUSTERED, 3, "LA", dtype, 1e-4, 12, 600)
    assert result.outcome == "CONVERGED"
    narrow, _ = eigsh(CLUSTERED, 4, "BE", dtype, 1e-3, 8, 400)
    exhausted, _ = eigsh(THREE_VALUES, 12, "LA", dtype, 1e-3, 16, 200)
    assert wide | narrow | exhausted >= {
        "iterating",
        "completeness",
        "verifying",
        "restarted",
        "slid",
        "leaked",
        "begun afresh",
        "twice looked for what was missed",
    }


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_each_end_of_the_spectrum_is_the_same_bit_for_bit(which: Which) -> None:
    eigsh(CLUSTERED, 5, which, torch.float64, 0.0, 40, 300)


@pytest.mark.parametrize(("block_size", "num_starts"), [(2, 0), (4, 3), (1, 5)])
def test_blocks_and_given_vectors_are_the_same_bit_for_bit(
    block_size: int, num_starts: int
) -> None:
    happened, result = eigsh(
        CLUSTERED, 4, "LA", torch.float64, 1e-4, 14, 400, block_size, num_starts
    )
    assert result.outcome == "CONVERGED"
    assert happened >= {"iterating", "completeness", "verifying", "restarted", "leaked"}


def test_a_state_is_only_as_long_as_what_it_knows() -> None:
    operator = DenseOperator(matrix(CLUSTERED))
    algorithm = Eigsh(spec=EigshSpec(k=1), max_products=100, num_vectors=40)
    state = algorithm.begin(operator)
    for _ in range(4):
        algorithm.step(operator, state)
    assert {path: each.shape for path, each in written(state).shards.items()} == {
        "basis.rows": (5, len(CLUSTERED))
    }
    assert through_bytes(state).basis.rows.shape == state.basis.rows.shape


@dataclass
class Inner:
    number: float
    words: tuple[str, ...] = ()


@dataclass
class Outer:
    num_used: int
    rows: Tensor = field(metadata=vectors_of_the_space("num_used"))
    small: Tensor
    numbers: list[float]
    inner: Inner | None
    others: list[Inner]
    is_so: bool = True


def test_numbers_words_tensors_and_absence_come_back_as_they_were() -> None:
    state = Outer(
        num_used=2,
        rows=random(20).view(5, 4),
        small=torch.tensor([[math.pi, -math.inf]]),
        numbers=[0.1, 1 / 3, 5e-324, -0.0, math.inf],
        inner=None,
        others=[Inner(-math.inf, ("a", "b")), Inner(2.0)],
    )
    again = through_bytes(state)
    assert (again.num_used, again.inner, again.others) == (2, None, state.others)
    assert again.is_so is True
    assert list(map(float.hex, again.numbers)) == list(map(float.hex, state.numbers))
    assert torch.equal(again.small, state.small)
    assert torch.equal(again.rows[:2], state.rows[:2])
    assert again.rows.shape == (5, 4)
    assert through_bytes(Outer(0, state.rows, state.small, [], Inner(1.5), [])).others == []


def test_what_is_read_is_not_what_was_written() -> None:
    state = Outer(1, random(8).view(2, 4), torch.zeros(3), [1.0], None, [])
    snapshot = written(state)
    again = restored(Outer, Snapshot(snapshot.shards, snapshot.tensors, snapshot.values))
    state.small += 1
    state.rows += 1
    state.numbers.append(2.0)
    assert torch.equal(again.small, torch.zeros(3))
    assert torch.equal(again.rows[:1] + 1, state.rows[:1])
    assert again.numbers == [1.0]
    assert json.loads(json.dumps(snapshot.values)) == snapshot.values


def test_a_function_in_a_state_cannot_be_written() -> None:
    @dataclass
    class Closed:
        product: object

    with pytest.raises(TypeError, match="product is a function"):
        written(Closed(lambda v: v))
