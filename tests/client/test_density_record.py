"""What the SDK makes of quadratures, against sums written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_operations.density import Quadrature
from hvp_operations.density.record import Count, DensityResult
from numpy.testing import assert_allclose

N = 100


def result(*quadratures: Quadrature, **provenance: str) -> DensityResult:
    return DensityResult(
        quadratures=quadratures,
        orthogonality_defect=1e-15,
        num_products=sum(len(each.nodes) for each in quadratures),
        loss=1.25,
        provenance={"num_parameters": str(N), **provenance},
    )


ONE = Quadrature(nodes=(-1.0, 2.0, 5.0), weights=(0.25, 0.5, 0.25))
OTHER = Quadrature(nodes=(0.0, 4.0), weights=(0.5, 0.5))
BOTH = result(ONE, OTHER, operator="hessian", dtype="float32", precision="tf32")


def error(first: float, second: float) -> float:
    """Standard error of the mean of two."""
    mean = (first + second) / 2
    return math.sqrt((first - mean) ** 2 + (second - mean) ** 2) / math.sqrt(2)


def test_a_probe_that_ended_early_is_filled_up_with_what_weighs_nothing() -> None:
    assert BOTH.nodes.tolist() == [[-1, 2, 5], [0, 4, 4]]
    assert BOTH.weights.tolist() == [[0.25, 0.5, 0.25], [0.5, 0.5, 0]]


def test_moments_are_weighted_sums_of_powers_with_their_standard_errors() -> None:
    first = [1, -0.25 + 1 + 1.25, 0.25 + 2 + 6.25, -0.25 + 4 + 31.25]
    second = [1, 2.0, 8.0, 32.0]
    found = BOTH.moments(3)
    assert_allclose(found.value, [(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert_allclose(found.standard_error, [error(a, b) for a, b in zip(first, second, strict=True)])


def test_the_trace_is_the_mean_node_times_the_order_of_the_operator() -> None:
    found = BOTH.trace()
    assert float(found.value) == pytest.approx(N * 2)
    assert float(found.standard_error) == pytest.approx(N * error(2, 2))
    shifted = result(ONE, Quadrature(nodes=(3.0,), weights=(1.0,))).trace()
    assert float(shifted.value) == pytest.approx(N * 2.5)
    assert float(shifted.standard_error) == pytest.approx(N * error(2, 3))


def test_of_a_single_probe_the_standard_error_is_infinite() -> None:
    assert math.isinf(float(result(ONE).trace().standard_error))
    assert np.isinf(result(ONE).density([0.0, 1.0]).standard_error).all()


def gauss(x: float, width: float) -> float:
    return math.exp(-((x / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("x", [-1.0, 0.3, 4.0])
def test_the_density_is_a_sum_of_gaussians(x: float) -> None:
    first = 0.25 * gauss(x + 1, 0.5) + 0.5 * gauss(x - 2, 0.5) + 0.25 * gauss(x - 5, 0.5)
    second = 0.5 * gauss(x, 0.5) + 0.5 * gauss(x - 4, 0.5)
    found = BOTH.density(x, sigma=0.5)
    assert float(found.value) == pytest.approx((first + second) / 2)
    assert float(found.standard_error) == pytest.approx(error(first, second))


def test_the_density_integrates_to_one_whatever_the_kernel() -> None:
    x = np.linspace(-10, 15, 20_001)
    for sigma in (None, 0.05, 1.0):
        assert np.trapezoid(BOTH.density(x, sigma).value, x) == pytest.approx(1, abs=1e-6)
    # By default a fiftieth of the spectrum, which here is 6 wide.
    assert_allclose(BOTH.density(x).value, BOTH.density(x, 0.12).value)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_a_kernel_without_width_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="a width above 0"):
        BOTH.density(0.0, sigma)


def test_counts_are_of_an_interval_open_below_and_closed_above() -> None:
    assert BOTH.count(-1, 5).value == pytest.approx(N * (0.75 + 1) / 2)
    assert BOTH.count(-2, 2).value == pytest.approx(N * (0.75 + 0.5) / 2)
    assert BOTH.count(-2, 2).standard_error == pytest.approx(N * error(0.75, 0.5))


def test_a_count_says_what_nodes_beside_its_ends_may_hide() -> None:
    # Up to 1: of the first probe between -1 (0.25) and 2 (0.5), of the other 0 (0.5) and 4 (0.5).
    assert BOTH.count(-math.inf, 1).resolution == pytest.approx(N * (0.5 + 0.5) / 2)
    # Beyond the last node, only that one may hide something.
    assert BOTH.count(-math.inf, 9).resolution == pytest.approx(N * (0.25 + 0.5) / 2)
    assert BOTH.count(-math.inf, math.inf) == Count(N, 0, 0, N, N)
    # Both ends: one way the node above 1 and that below 3 less, the other way more.
    assert result(ONE).count(1, 3).resolution == pytest.approx(N * (0.5 + 0.5))


def test_the_table_says_everything_with_its_error() -> None:
    table = BOTH.table()
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["trace"].startswith("200 ± ")
    assert rows["share of eigenvalues ≤ 0"].startswith("0.375 ± 0.12, resolved to 0.5")
    assert rows["smallest Ritz value"] == "-1"
    assert rows["largest Ritz value"] == "5"
    assert "2 probes, 3 steps, 5 products, loss 1.25 nats" in table.title
    assert "hessian, float32, tf32, orthogonality defect 1.0e-15" in table.notes[-1]


def test_json_holds_the_quadratures() -> None:
    plain = json.loads(json.dumps(BOTH.to_json()))
    assert plain["quadratures"][1] == {"nodes": [0, 4], "weights": [0.5, 0.5]}
    assert plain["num_products"] == 5


@pytest.mark.parametrize(
    "density",
    [
        BOTH,
        result(ONE),
        result(Quadrature(nodes=(0.0,), weights=(1.0,)), Quadrature(nodes=(0.0,), weights=(1.0,))),
        # A bulk and an outlier: two panels.
        result(
            *[
                Quadrature(
                    nodes=(*np.linspace(-0.1, 0.1, 20).tolist(), top),
                    weights=(*[0.9999 / 20] * 20, 0.0001),
                )
                for top in (9.0, 9.1)
            ],
            operator="ggn",
        ),
    ],
    ids=["two probes", "one probe", "a null operator", "a bulk and an outlier"],
)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_it_can_be_drawn(density: DensityResult, suffix: str, tmp_path: Path) -> None:
    density.plot(tmp_path / f"density{suffix}")
    density.plot(tmp_path / f"smooth{suffix}", sigma=0.3)
    assert (tmp_path / f"density{suffix}").stat().st_size > 5000


def test_what_rounding_cannot_tell_from_zero_is_zero() -> None:
    """A matrix of rank one: float32 gives its null space as values of some 1e-6 of the largest."""
    low_rank = Quadrature(nodes=(-4e-6, 3e-6, 40.0), weights=(0.5, 0.4, 0.1))
    found = result(low_rank, low_rank, dtype="float32", precision="full")
    assert found.nodes.tolist() == [[0, 0, 40]] * 2
    assert found.count(0, math.inf).value == pytest.approx(10)
    wide = result(low_rank, dtype="float64", precision="full")
    assert wide.nodes.tolist() == [[-4e-6, 3e-6, 40]]


def test_a_picture_of_a_null_space_has_no_panel_of_rounding_errors(tmp_path: Path) -> None:
    null = Quadrature(nodes=(-1e-15, 9e-16, 40.0), weights=(0.5, 0.495, 0.005))
    found = result(null, null, dtype="float64", precision="full", operator="ggn")
    found.plot(tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text().count("axes_") == 1


def test_a_picture_has_no_panel_of_a_bulk_that_the_steps_do_not_resolve(tmp_path: Path) -> None:
    """Each probe has two nodes there: their smoothed peaks would look like a spectrum."""
    inside = ((-1e-3, 2e-3), (-2e-3, 1e-3))
    found = result(
        *(
            Quadrature(nodes=(-40.0, *each, 90.0), weights=(0.001, 0.5, 0.498, 0.001))
            for each in inside
        ),
        dtype="float64",
        precision="full",
        operator="hessian",
    )
    found.plot(tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text().count("axes_") == 1


@pytest.mark.parametrize("degree", [-1, 6, 10**6, 2.5, "3", None, True], ids=repr)
def test_a_moment_that_the_steps_do_not_give_is_refused(degree: Any) -> None:
    with pytest.raises(ValueError, match="0 to 5"):
        result(ONE).moments(degree)


def test_an_empty_interval_a_width_that_is_none_and_a_file_without_a_suffix_are_refused() -> None:
    for low, high in ((2, 1), (1, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="low < high"):
            BOTH.count(low, high)
    for sigma in (math.inf, math.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            BOTH.density(0.0, sigma)
    with pytest.raises(ValueError, match="give"):
        BOTH.expectation(np.zeros(3))
    with pytest.raises(ValueError, match="suffix"):
        BOTH.plot("density")


def test_the_interval_of_a_count_is_that_of_its_probes_bounds() -> None:
    """Of each probe by hand: from the node below an end to the one above it."""
    first = Quadrature(nodes=(0.0, 1.0, 10.0), weights=(0.25, 0.25, 0.5))
    second = Quadrature(nodes=(0.0, 1.0, 10.0), weights=(0.25, 0.35, 0.4))
    found = result(first, second, dtype="float64", precision="full").count(5, math.inf)
    # Above 5 is at least nothing, and at most what is not surely below: the nodes 1 and 10.
    low, high = (0.0, 0.0), (0.75, 0.75)
    assert found.low == pytest.approx(N * low[0], abs=1e-4)
    assert found.high == pytest.approx(N * high[0], abs=1e-4)
    assert found.interval == (found.low, found.high)
    assert found.low <= found.value <= found.high
    # Of one probe nothing is known of the others.
    assert result(first).count(5, 7).interval == (0, N)


def test_the_interval_of_a_count_allows_for_rounding_at_its_ends() -> None:
    found = [
        result(*[Quadrature(nodes=(0.0, 1e-4, 4.0, 5.0), weights=(0.25,) * 4)] * 8, dtype=dtype)
        for dtype in ("float64", "float32")
    ]
    wide, coarse = (each.count(2e-4, math.inf) for each in found)
    assert wide.low == pytest.approx(25, abs=1e-3)
    assert wide.high == pytest.approx(75, abs=1e-3)
    assert coarse.low < wide.low
    assert coarse.high > wide.high


def test_the_distance_of_spectra_is_the_mean_way_of_their_eigenvalues() -> None:
    values = (-1.0, 0.5, 2.0, 2.0), (0.0, 0.25, 2.5, 7.0)
    one, two = (
        result(*[Quadrature(nodes=each, weights=(0.25,) * 4)] * 3, dtype="float64")
        for each in values
    )
    found = one.distance(two)
    assert found.value == pytest.approx((1 + 0.25 + 0.5 + 5) / 4)
    assert found.standard_error == 0
    assert found.resolution > 0
    assert two.distance(one).value == pytest.approx(found.value)
    assert one.distance(one).value == 0
    # Quadratures that differ from probe to probe say how far that moves the distance.
    assert BOTH.distance(BOTH).standard_error > 0
    assert math.isinf(result(ONE).distance(BOTH).standard_error)
    point = result(*[Quadrature(nodes=(1.0,), weights=(1.0,))] * 2, dtype="float64")
    assert point.distance(point) == (0, 0, 0)
