"""Runs on vectors in shards, of two and three processes, give what one gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.krylov.solve import Solve
from hvp_core.linop.block_diagonal import BlockDiagonal
from hvp_core.linop.compositions import Preconditioned, Scaled, Shifted, Sum
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.linop.selection import Restricted, Selection
from hvp_core.runs.algorithm import Algorithm, Budget, drive
from hvp_core.sharding.collective import Alone, Collective, Distributed
from hvp_core.sharding.layout import Layout
from hvp_core.stochastic.block_mass import BlockMass
from hvp_core.stochastic.density import Density
from hvp_core.stochastic.diagonal import Diagonal
from hvp_core.stochastic.low_rank import LowRank
from hvp_core.stochastic.trace import Trace
from hvp_core.stochastic.trace_of import TraceOf
from hvp_core.vectors.space import ParameterSpace
from hvp_operations.block_mass import BlockMassSpec
from hvp_operations.checking import Seed
from hvp_operations.density import DensityResult, DensitySpec
from hvp_operations.diagonal import DiagonalSpec
from hvp_operations.eigsh import EigshSpec
from hvp_operations.low_rank import LowRankSpec
from hvp_operations.partition import Partition
from hvp_operations.registry import operations
from hvp_operations.solve import Method, SolveSpec
from hvp_operations.svds import SvdsSpec
from hvp_operations.trace import TraceSpec
from hvp_operations.trace_of import TraceOfSpec
from torch import Tensor

from tests.core.extended import answer, going_on
from tests.core.ranks import run_ranks
from tests.core.references import relative_error
from tests.core.spectra import matrix
from tests.core.written import is_same, run

CPU = torch.device("cpu")
SPECTRUM = torch.cat(
    (torch.tensor([-3.0, -3.0]), torch.linspace(-1, 1, 85), torch.tensor([1.05, 1.1, 1.1, 4.0]))
).double()
SHAPES = {"first": (5, 7), "second": (11,), "third": (9, 5)}  # 91 parameters


class ShardedMatrix(LinearOperator):
    """A dense matrix, the same on every rank, on vectors in shards."""

    symmetric = True

    def __init__(self, a: Tensor, collective: Collective):
        layout = Layout(SHAPES, [["first", "second"], ["second", "third"]], collective.world_size)
        self.domain = self.codomain = self.space = ParameterSpace(layout, collective, a.dtype, CPU)
        self._a = a

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        return [self.space.from_flat(self._a @ self.space.to_flat(v)) for v in vectors]


def numbers(collective: Collective) -> dict[str, Tensor]:
    """What must not depend on the number of ranks; on each of them, written states are checked."""
    operator = ShardedMatrix(matrix(SPECTRUM), collective)
    spec = DensitySpec(num_probes=3, num_steps=9, seed=Seed(2))
    found: dict[str, Tensor] = {}
    for name, num_vectors in (("all", 10**6), ("groups", 25), ("two rows", 6)):
        budget = Budget(max_products=27, num_vectors=num_vectors)
        result: DensityResult = drive(Density.configure(spec, operator, budget), operator).result
        for index, quadrature in enumerate(result.quadratures):
            found[f"nodes {index}, {name}"] = torch.tensor(quadrature.nodes, dtype=torch.float64)
            found[f"weights {index}, {name}"] = torch.tensor(
                quadrature.weights, dtype=torch.float64
            )
    search = Eigsh(spec=EigshSpec(k=4, which="BE", tol=1e-7), max_products=300, num_vectors=12)
    pairs = drive(search, operator).result
    found["eigenvalues"] = torch.tensor(pairs.eigenvalues, dtype=torch.float64)
    assert pairs.outcome == "CONVERGED"
    for name, size, given in (("blocks", 3, ()), ("given vectors", 2, (5, 6, 7))):
        search = Eigsh(
            spec=EigshSpec(k=4, which="BE", tol=1e-7, block_size=size),
            max_products=300,
            num_vectors=14,
            starts=[operator.space.random(seed, "gaussian") for seed in given],
        )
        block = drive(search, operator).result
        assert block.outcome == "CONVERGED"
        found[f"eigenvalues, {name}"] = torch.tensor(block.eigenvalues, dtype=torch.float64)
    search = Eigsh(
        spec=EigshSpec(k=4, which="BE", tol=1e-7),
        max_products=400,
        num_vectors=6,
        method="two_pass",
    )
    passes = drive(search, operator).result
    assert passes.outcome == "CONVERGED"
    found["eigenvalues, two passes"] = torch.tensor(passes.eigenvalues, dtype=torch.float64)
    positive = ShardedMatrix(matrix(SPECTRUM.abs() + 0.1), collective)
    bs = [operator.space.random(seed, "gaussian") for seed in (1, 2)]
    methods: tuple[Method, ...] = ("cg", "minres")
    for method in methods:
        solving = Solve.configure(
            SolveSpec(("b", "b"), method=method, tol=1e-10, damping=0.1),
            positive,
            Budget(
                max_products=400, num_vectors=99, inputs={"b": bs, "x0": (), "preconditioner": ()}
            ),
        )
        solved = drive(solving, positive)
        assert [each.outcome for each in solved.result.systems] == ["CONVERGED"] * 2
        for index, x in enumerate(solved.vectors):
            found[f"x {index} of {method}"] = operator.space.to_flat(x)
    runs = operator.space.layout.runs(collective.rank)
    part = Restricted(operator, Selection(operator.space, runs, [(3, 40), (50, 80)]))
    search = Eigsh(spec=EigshSpec(k=2, which="LA", tol=1e-7), max_products=200, num_vectors=30)
    found["of a part"] = torch.tensor(drive(search, part).result.eigenvalues, dtype=torch.float64)
    found |= traces(operator) | diagonals(operator) | functions(operator, positive)
    blocks = BlockDiagonal(operator, [(0, 2), (1,)])
    v = operator.space.random(4, "gaussian")
    found["of blocks"] = operator.space.to_flat(blocks.apply([v])[0])
    a = matrix(SPECTRUM)
    a[35:46, :35] = a[35:46, 46:] = a[:35, 35:46] = a[46:, 35:46] = 0  # the second tensor's
    assert relative_error(found["of blocks"], a @ operator.space.to_flat(v)) < 1e-14
    found |= low_rank(positive, collective) | compositions(operator, positive)
    found |= extended(operator, positive)
    found |= masses(operator)
    # Each step is several messages between ranks: of them one type is enough.
    for dtype in (torch.float32, torch.float64)[: 2 if collective.world_size == 1 else 1]:
        check_written(ShardedMatrix(matrix(SPECTRUM).to(dtype), collective))
    return found


def compositions(operator: ShardedMatrix, positive: ShardedMatrix) -> dict[str, Tensor]:
    """Products and eigenvalues of operators that are made of others."""
    space = operator.space
    root = space.from_flat(torch.linspace(0.5, 2, space.dimension, dtype=torch.float64))
    made = {
        "sum": Shifted(Sum(Scaled(operator, 2.0), Scaled(operator, -0.5)), 0.3),
        "preconditioned": Shifted(Preconditioned(positive, root), 0.1),
    }
    found: dict[str, Tensor] = {}
    for name, composed in made.items():
        vectors = [space.random(seed, "gaussian") for seed in (3, 4)]
        for index, product in enumerate(composed.apply(vectors)):
            found[f"product {index} of a {name}"] = space.to_flat(product)
        search = Eigsh(spec=EigshSpec(k=3, tol=1e-7), max_products=300, num_vectors=12)
        pairs = drive(search, composed).result
        assert pairs.outcome == "CONVERGED"
        found[f"eigenvalues of a {name}"] = torch.tensor(pairs.eigenvalues, dtype=torch.float64)
    return found


def low_rank(operator: ShardedMatrix, collective: Collective) -> dict[str, Tensor]:
    """Low-rank matrices, and systems that have them, and a diagonal, for a preconditioner."""
    found: dict[str, Tensor] = {}
    space, b = operator.space, operator.space.random(3, "gaussian")
    diagonal = space.from_flat(matrix(SPECTRUM.abs() + 0.1).diagonal().contiguous())
    given: list[tuple[str, Sequence[Tensor], tuple[float, ...]]] = [("diagonal", [diagonal], ())]
    operator.semidefinite = True
    asked, budget = LowRankSpec(7, seed=Seed(1)), Budget(max_products=120, num_vectors=60)
    made = drive(LowRank.configure(asked, operator, budget), operator)
    assert made.result.method == "nystrom"
    values = torch.tensor(made.result.eigenvalues, dtype=torch.float64)
    u = torch.stack([space.to_flat(each) for each in made.vectors])
    found["A_k"] = u.T @ torch.diag(values) @ u
    found["error"] = torch.tensor([made.result.error, made.result.error_bound])
    given.append(("low rank", [each.clone() for each in made.vectors], made.result.eigenvalues))
    for name, vectors, numbers in given:
        spec = SolveSpec(
            ("b",),
            damping=0.0,
            tol=1e-11,
            method="cg",
            preconditioner=("p",) * len(vectors),
            preconditioner_values=numbers,
        )
        inputs = {"b": [b], "x0": (), "preconditioner": vectors}
        budget = Budget(max_products=400, num_vectors=99, inputs=inputs)
        solved = drive(Solve.configure(spec, operator, budget), operator)
        assert solved.result.systems[0].outcome == "CONVERGED"
        found[f"x with {name}"] = space.to_flat(solved.vectors[0])
    diagonal[0] = -1.0  # an element of each rank's own
    inputs = {"b": [b], "x0": (), "preconditioner": [diagonal]}
    budget = Budget(max_products=400, num_vectors=99, inputs=inputs)
    wrong = Solve.configure(SolveSpec(("b",), preconditioner=("p",)), operator, budget)
    with pytest.raises(CurvatureError, match=f"NOT_POSITIVE: {collective.world_size} of 91"):
        drive(wrong, operator)
    return found


def extended(operator: ShardedMatrix, positive: ShardedMatrix) -> dict[str, Tensor]:
    """Runs that go on from others."""
    found: dict[str, Tensor] = {}
    positive.semidefinite = True
    cases: list[tuple[str, LinearOperator, Any, dict[str, Any]]] = [
        ("diagonal", operator, DiagonalSpec("hutchinson", per="layer", rtol=1e-6), {}),
        ("diagonal", operator, DiagonalSpec("xdiag", rtol=1e-6), {}),
        ("low_rank", positive, LowRankSpec(5), {"k": 9, "seed": Seed(1)}),
        ("svds", operator, SvdsSpec(3, tol=1e-9), {"k": 5, "tol": 1e-6, "seed": Seed(1)}),
        ("trace_of", positive, TraceOfSpec("log", damping=0.1, rtol=1e-9), {}),
    ]
    for index, (name, of, spec, changes) in enumerate(cases):
        most = {"max_products": 400 if name == "svds" else 48, "num_vectors": 90}
        short = answer(going_on(operations()[name], spec, of, None, **most), of)
        longer = answer(
            going_on(operations()[name], replace(spec, **changes), of, short, **most), of
        )
        result, flat = longer.result, [operator.space.to_flat(each) for each in longer.vectors]
        if name == "diagonal":
            found[f"extended {index}"] = torch.cat((flat[0], flat[1] + 1))
        elif name == "low_rank":
            u, values = torch.stack(flat), torch.tensor(result.eigenvalues, dtype=torch.float64)
            found[f"extended {index}"] = u.T @ torch.diag(values) @ u
        else:
            numbers = result.singular_values if name == "svds" else (result.value, result.low)
            found[f"extended {index}"] = torch.tensor(numbers, dtype=torch.float64)
    return found


def masses(operator: ShardedMatrix) -> dict[str, Tensor]:
    """Masses of blocks of tensors, of which two begin and end within a rank's part."""
    spec = BlockMassSpec(Partition.of([["first", "third"], "second"]), num_probes=9, rtol=1e-9)
    budget = Budget(max_products=18, num_vectors=5)
    result = drive(BlockMass.configure(spec, operator, budget), operator).result
    assert (result.num_probes, result.block_sizes) == (9, (80, 11))
    ends = [result.off_block_fraction, result.standard_error + 1, result.low, result.high]
    return {
        "masses": torch.tensor(result.masses, dtype=torch.float64),
        "off-block fraction": torch.tensor(ends, dtype=torch.float64),
    }


TRACES = (
    TraceSpec(method="hutchinson"),
    TraceSpec(method="hutch++"),
    TraceSpec(method="xtrace"),
    TraceSpec(per="tensor"),
    TraceSpec(per="layer", rtol=1e-6),  # beyond the samples: each coordinate takes its turn
)


def traces(operator: ShardedMatrix) -> dict[str, Tensor]:
    """Traces by every method, and of each tensor's diagonal block."""
    found = {}
    for spec in TRACES:
        budget = Budget(max_products=140 if spec.rtol < 1e-3 else 40, num_vectors=40)
        result = drive(Trace.configure(spec, operator, budget), operator).result
        numbers = [result.value, result.standard_error + 1, result.low, result.high]
        for part in result.parts:
            numbers += [part.value, part.standard_error + 1, part.low, part.high]
        assert [each.name for each in result.parts] == (list(SHAPES) if spec.per else [])
        assert math.fsum(each.value for each in result.parts) in (0, pytest.approx(result.value))
        found[f"trace {spec}"] = torch.tensor(numbers, dtype=torch.float64)
        if result.method == "exact":
            sizes = [math.prod(shape) for shape in SHAPES.values()]
            blocks = matrix(SPECTRUM).diagonal().split(sizes)
            for part, block in zip(result.parts, blocks, strict=True):
                assert part.value == pytest.approx(float(block.sum()), rel=1e-10, abs=1e-12)
                assert (part.num_parameters, part.standard_error) == (len(block), 0)
    assert result.method == "exact"
    return found


DIAGONALS = (
    DiagonalSpec(method="hutchinson", per="layer"),
    DiagonalSpec(method="xdiag", rtol=0.01),
    DiagonalSpec(per="tensor", rtol=1e-6),  # beyond the samples: each coordinate takes its turn
)


def diagonals(operator: ShardedMatrix) -> dict[str, Tensor]:
    """Diagonals by every method with their errors, whose sums over parts are the blocks' traces."""
    found = {}
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    for spec in DIAGONALS:
        budget = Budget(max_products=140 if spec.rtol < 1e-3 else 40, num_vectors=40)
        answer = drive(Diagonal.configure(spec, operator, budget), operator)
        diagonal, error = map(operator.space.to_flat, answer.vectors)
        found[f"diagonal {spec}"], found[f"its error {spec}"] = diagonal, error + 1
        assert [each.name for each in answer.result.parts] == (list(SHAPES) if spec.per else [])
        for part, block in zip(answer.result.parts, diagonal.split(sizes), strict=False):
            assert part.value == pytest.approx(float(block.sum()), rel=1e-10, abs=1e-12)
    assert answer.result.method == "exact"
    assert relative_error(diagonal, matrix(SPECTRUM).diagonal()) < 1e-14
    return found


FUNCTIONS = (
    TraceOfSpec("log", damping=0.1),
    TraceOfSpec("exp", num_steps=8),
    TraceOfSpec("count", low=2.0, num_steps=8),
    TraceOfSpec("inverse", damping=2.0),  # which is indefinite
)


def functions(operator: ShardedMatrix, positive: ShardedMatrix) -> dict[str, Tensor]:
    """Traces of functions, with every bound of every probe."""
    found = {}
    for spec in FUNCTIONS:
        of = positive if spec.function == "log" else operator
        budget = Budget(max_products=60, num_vectors=200)
        result = drive(TraceOf.configure(spec, of, budget), of).result
        numbers = [result.smallest, result.largest]
        for probe in result.probes:
            numbers += [*probe.quadrature.nodes, *probe.quadrature.weights]
            numbers += [probe.low, probe.value, probe.high] if spec.function != "inverse" else []
        found[f"function {spec}"] = torch.tensor(numbers, dtype=torch.float64)
    assert result.outcome == "INDEFINITE"
    return found


def check_written(operator: ShardedMatrix) -> None:
    """A state that goes through bytes after every step, on every rank, changes nothing."""
    search = Eigsh(spec=EigshSpec(k=2, which="LA", tol=1e-2), max_products=20, num_vectors=8)
    density = Density.configure(
        DensitySpec(num_probes=3, num_steps=4), operator, Budget(max_products=12, num_vectors=14)
    )
    solving = Solve.configure(
        SolveSpec(("b",), method="minres", tol=0.3),
        operator,
        Budget(
            max_products=16,
            num_vectors=20,
            inputs={
                "b": [operator.space.random(1, "gaussian")],
                "x0": (),
                "preconditioner": (),
            },
        ),
    )
    few = Budget(max_products=16, num_vectors=40)
    estimates = [Trace.configure(replace(spec, rtol=1e-2), operator, few) for spec in TRACES]
    diagonals = [Diagonal.configure(spec, operator, few) for spec in DIAGONALS]
    function = TraceOf.configure(
        TraceOfSpec("exp", num_steps=3), operator, Budget(max_products=30, num_vectors=40)
    )
    masses = BlockMass.configure(
        BlockMassSpec(Partition.of("tensor"), num_probes=8),
        operator,
        Budget(max_products=24, num_vectors=5),
    )
    algorithms: list[Algorithm[Any]] = [
        masses,
        *(search, density, solving, function),
        *estimates,
        *diagonals,
    ]
    for algorithm in algorithms:
        reported, found, _ = run(algorithm, operator, interrupted=False)
        others, again, _ = run(algorithm, operator, interrupted=True)
        assert is_same(reported, others)
        assert is_same(found.result, again.result)
        assert is_same(list(found.vectors), list(again.vectors))


def rank_main(rank: int, world_size: int, folder: Path) -> None:
    torch.save(numbers(Distributed(CPU)), folder / f"{rank}.pt")


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_quadratures_and_eigenvalues_do_not_depend_on_the_number_of_ranks(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(rank_main, world_size, tmp_path)
    alone = numbers(Alone())
    assert len(alone) == 60
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for name, expected in alone.items():
        # The sums of another number of ranks round otherwise; a solution meets its tolerance.
        allowed = 1e-9 if name.startswith("x ") else 1e-11
        assert relative_error(of_ranks[0][name], expected) < allowed, name
        assert all(torch.equal(found[name], of_ranks[0][name]) for found in of_ranks), name
