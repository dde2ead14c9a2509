"""Quadrature rules and bounds on forms of functions, against dense matrices."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.krylov.orthogonality import rounding
from hvp_core.stochastic.density_probe import Probe
from hvp_core.stochastic.functions import Bracket, Ends, bracket
from hvp_core.stochastic.quadrature import Jacobi, Rule, share_bounds
from hvp_operations.trace_of import TraceOfSpec
from torch import Tensor

from tests.core.dense import DenseSpace
from tests.core.spectra import matrix

#: A bulk, outliers, gaps, a multiple eigenvalue.
SPECTRUM = torch.cat(
    (torch.linspace(0.05, 1, 24) ** 2, torch.tensor([1.5, 1.5, 1.5, 2.5, 4.0]))
).double()
N = len(SPECTRUM)
NO_ENDS = Ends(-math.inf, math.inf)
FUNCTIONS: dict[str, Any] = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "inverse": torch.reciprocal,
    "exp": torch.exp,
}


def lanczos(a: Tensor, num_steps: int, seed: int = 0) -> tuple[Probe, Jacobi]:
    """A probe after so many steps, or fewer if its Krylov space is exhausted."""
    space = DenseSpace(len(a), a.dtype)
    probe = Probe.begin(space, a.new_empty(num_steps + 1, len(a)), True, seed)
    while len(probe.alphas) < num_steps and not probe.is_done:
        probe.extend(space, a @ probe.newest, num_steps + 1)
    return probe, probe.jacobi


def seen(a: Tensor, probe: Probe) -> tuple[Tensor, Tensor]:
    """Eigenvalues, and the measure that the probe sees of each."""
    values, u = torch.linalg.eigh(a.double())
    return values, (u.T @ probe.rows[0].double()).square()


def integral(rule: Rule, degree: int) -> float:
    return math.fsum(w * t**degree for t, w in zip(*rule, strict=True))


# Rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5, 11])
def test_rules_are_exact_up_to_their_degrees_and_no_further(num_steps: int) -> None:
    a = matrix(SPECTRUM) / 4
    probe, run = lanczos(a, num_steps)
    values, weights = seen(a, probe)
    true = [float((weights * values**degree).sum()) for degree in range(2 * num_steps + 2)]
    most = 2 * num_steps - 1
    for degree in range(most + 1):
        assert integral(run.gauss, degree) == pytest.approx(true[degree], rel=1e-11)
    if num_steps <= 5:
        assert integral(run.gauss, most + 1) < (1 - 1e-9) * true[most + 1]
    for node in (-0.3, 0.0, 0.33, 1.2):
        rule = run.radau(node)
        assert rule is not None
        assert min(abs(node - each) for each in rule.nodes) < 1e-12
        assert math.fsum(rule.weights) == pytest.approx(1)
        for degree in range(most + 2):
            assert integral(rule, degree) == pytest.approx(true[degree], rel=1e-11)
        if num_steps <= 5:  # of higher degrees rounding hides it
            assert abs(integral(rule, most + 2) - true[most + 2]) > 1e-9 * true[most + 2]


def test_a_node_that_is_a_ritz_value_has_no_rule_of_its_own() -> None:
    _, run = lanczos(matrix(SPECTRUM), 5)
    assert run.radau(run.gauss.nodes[2]) is None
    assert run.radau(run.gauss.nodes[2] + 1e-9) is None
    assert Jacobi(run.alphas, run.betas[:-1], False).radau(0.0) is None
    exhausted = Jacobi(run.alphas, run.betas[:-1], True)
    assert exhausted.radau(0.0) == exhausted.gauss


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, N])
def test_the_measure_below_a_point_lies_within_its_bounds(num_steps: int) -> None:
    a = matrix(SPECTRUM)
    widths = []
    for seed in range(4):
        probe, run = lanczos(a, num_steps, seed)
        values, weights = seen(a, probe)
        points = [-math.inf, -1e9, -0.1, 0.01, 0.2, 0.9, 1.2, 1.49, 1.51, 3.0, 5.0, 1e9, math.inf]
        beside = [node + shift for node in run.gauss.nodes for shift in (-1e-9, 1e-9)]
        for point in [*points, *beside, *([] if run.is_exhausted else run.gauss.nodes)]:
            low, high = share_bounds(run, point)
            below, up_to = (float(weights[at].sum()) for at in (values < point, values <= point))
            assert low - 1e-9 <= below + 1e-9
            assert up_to <= high + 1e-9, (point, seed)
            widths.append(high - low)
        assert share_bounds(run, math.inf) == pytest.approx((1, 1))
        low, high = share_bounds(run, 3.0)  # in a gap
        assert high - low < (2 if num_steps < 5 else 0.1 if num_steps < 12 else 1e-6)
    assert min(widths) >= -1e-12


def test_a_node_at_the_point_bounds_a_share_better_than_the_nodes_beside_it() -> None:
    _, run = lanczos(matrix(SPECTRUM), 8)
    without = Jacobi(run.alphas, run.betas[:-1], False)
    for point in (0.6, 1.2, 2.0, 3.0):
        (low, high), (lower, higher) = share_bounds(run, point), share_bounds(without, point)
        assert lower <= low <= high <= higher
        assert high - low < 0.9 * (higher - lower)


# Brackets --------------------------------------------------------------------------------------


def bracket_of(
    a: Tensor, num_steps: int, seed: int, ends: Ends, **spec: Any
) -> tuple[Bracket, float]:
    """The bracket, and the number that it is of."""
    probe, run = lanczos(a, num_steps, seed)
    values, weights = seen(a, probe)
    if spec["function"] == "count":
        low, high = (spec.get(end) for end in ("low", "high"))
        inside = torch.ones_like(values, dtype=torch.bool)
        inside &= values > (-math.inf if low is None else low)
        inside &= values <= (math.inf if high is None else high)
        true = float(weights[inside].sum())
    else:
        true = float((weights * FUNCTIONS[spec["function"]](values + spec["damping"])).sum())
    moved = max(rounding(torch.finfo(a.dtype).eps), num_steps * torch.finfo(a.dtype).eps)
    return bracket(TraceOfSpec(**spec), run, ends, moved * run.size), true


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_bounds_hold_the_truth_at_every_step_and_close_in(
    function: str, damping: float, dtype: torch.dtype
) -> None:
    a = matrix(SPECTRUM)
    ends = Ends(0.0015, 4.2)
    for seed in range(3):
        widths = []
        for num_steps in (1, 2, 4, 8, 16, N):
            found, true = bracket_of(
                a.to(dtype), num_steps, seed, ends, function=function, damping=damping
            )
            assert found.low <= true <= found.high
            assert found.krylov_low <= found.value <= found.krylov_high
            slack = abs(true) * (1e-12 if dtype == torch.float64 else 1e-4)
            assert found.krylov_low - slack <= true <= found.krylov_high + slack
            widths.append(found.krylov_high - found.krylov_low)
        assert all(after <= before + 1e-12 for before, after in pairwise(widths))
        assert widths[2] < widths[0]
        assert widths[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shares_hold_the_truth_at_every_step(dtype: torch.dtype) -> None:
    a = matrix(SPECTRUM)
    for low, high in ((None, 0.3), (0.3, 2.0), (1.2, None), (3.0, 3.5), (5.0, None)):
        for num_steps in (1, 2, 4, 8, 16, N):
            found, true = bracket_of(
                a.to(dtype),
                num_steps,
                1,
                NO_ENDS,
                function="count",
                low=low,
                high=high,
            )
            assert found.low <= true <= found.high
            assert 0 <= found.low <= found.high <= 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_end_that_is_not_known_leaves_one_side_open(function: str) -> None:
    found, true = bracket_of(matrix(SPECTRUM), 6, 0, NO_ENDS, function=function, damping=0.0)
    if function in ("log", "sqrt"):
        assert found.low == -math.inf
        assert true <= found.high == pytest.approx(found.value, rel=1e-9)
    else:
        assert found.high == math.inf
        assert found.value == found.krylov_low <= true
        assert found.low == (0 if function == "exp" else pytest.approx(found.value, rel=1e-9))


def test_the_root_of_a_matrix_with_a_null_space_is_bounded_in_spite_of_rounding() -> None:
    spectrum = torch.cat((torch.zeros(15), torch.linspace(0.5, 3, 14))).double()
    for dtype in (torch.float64, torch.float32):
        a = matrix(spectrum).to(dtype)
        for num_steps in (3, 8, 16, N):
            probe, run = lanczos(a, num_steps)
            values, weights = seen(a, probe)
            true = float((weights * values.clamp_min(0).sqrt()).sum())
            eps = rounding(torch.finfo(dtype).eps) * run.size
            spec = TraceOfSpec(function="sqrt")
            found = bracket(spec, run, Ends(0.0, math.inf), eps)
            assert found.low <= true <= found.high
            assert found.high - found.low < (1.5 if num_steps < 16 else 4 * math.sqrt(eps))


def test_an_exponential_that_is_no_float64_is_refused_with_the_damping_that_helps() -> None:
    a = 1000 * matrix(SPECTRUM)
    with pytest.raises(CurvatureError, match=r"NON_FINITE.*damping") as caught:
        bracket_of(a, 8, 0, Ends(0.0, 4001.0), function="exp", damping=0.0)
    assert "-4000" in caught.value.message or "-39" in caught.value.message
    found, true = bracket_of(a, 25, 0, Ends(0.0, 4001.0), function="exp", damping=-4000.0)
    assert found.low <= true <= found.high


@pytest.mark.parametrize("function", ["log", "inverse", "sqrt", "exp"])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_allow_for_products_that_are_off_by_as_much_as_rounding(
    function: str, seed: int
) -> None:
    """Products of A + E, with every E of a norm that is allowed: the bounds are those of A."""
    a = matrix(SPECTRUM)
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(N, N, generator=generator, dtype=torch.float64)
    e = e + e.T
    for size in (1e-8, 1e-4, 1e-3):
        moved = e * size / torch.linalg.matrix_norm(e, 2)
        for sign in (1, -1):
            for shift in (moved, size * torch.eye(N)):
                off = a + sign * shift
                probe, run = lanczos(off, 20, seed)
                values, weights = seen(a, probe)
                true = float((weights * FUNCTIONS[function](values)).sum())
                spec = TraceOfSpec(function=function)  # type: ignore[arg-type]
                found = bracket(spec, run, Ends(0.0025, 4.0), size)
                assert found.low <= true <= found.high
