"""The 1-D Laplacian of order a million, on four ranks: what is found of it is what is known."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from hvp_client import Client, Operator
from numpy.typing import NDArray

from tests.modules import families, installed
from tests.modules.checkpoints import module_checkpoint
from tests.test_end_to_end import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

N = 1_000_000


@pytest.fixture(scope="module")
def H(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:  # noqa: N802
    """The Hessian of ½ Σ (θᵢ − θᵢ₊₁)²."""
    folder = tmp_path_factory.mktemp("laplacian")
    module_checkpoint(folder / "chain", "laplacian", families.Chain(N), length=N)
    server = Server(folder / "state", workers=4, packages=installed(folder / "site"))
    with Client(server.address) as client:
        checkpoint = client.upload_checkpoint(folder / "chain")
        batch = client.upload_batch({"x": [0.0]}, checkpoint)
        yield client.operator(checkpoint, batch, dtype="float64")
    assert server.end(signal.SIGTERM) == 0


def spectrum() -> NDArray[np.float64]:
    """All eigenvalues, ascending: the arcsine law on [0, 4]."""
    return 2 - 2 * np.cos(np.pi * np.arange(1, N + 1) / (N + 1))


def test_the_density_is_the_arcsine_law_within_its_band_and_no_ritz_value_is_outside(
    H: Operator,
) -> None:
    found = H.density(num_probes=4, num_steps=40, seed=1).result()
    assert found.nodes.min() >= -1e-12
    assert found.nodes.max() <= 4 + 1e-12
    x, sigma, true = np.linspace(0.2, 3.8, 19), 0.2, spectrum()
    law = np.array([np.exp(-(((each - true) / sigma) ** 2) / 2).mean() for each in x])
    law /= sigma * math.sqrt(2 * math.pi)
    estimate = found.density(x, sigma)
    away = np.abs(estimate.value - law) / estimate.standard_error
    assert away.max() < 12  # of Student's t with three degrees of freedom, nineteen times
    assert np.median(away) < 2
    assert (estimate.standard_error < 0.005 * law).all()
    for low, high in ((-math.inf, 1.0), (1.0, 3.0), (2.0, math.inf)):
        count = found.count(low, high)
        inside = int(((true > low) & (true <= high)).sum())
        assert count.low <= inside <= count.high
        # Of each end the interval leaves open the node below it and the one above.
        num_ends = sum(map(math.isfinite, (low, high)))
        assert count.high - count.low < (2 * num_ends + 0.5) / 40 * N


def test_extremal_ritz_values_are_eigenvalues_to_their_bounds(H: Operator) -> None:
    found = H.eigsh(2, "BE", tol=0.02, max_products=60).result()
    assert (found.eigenvalues >= 0).all()
    assert (found.eigenvalues <= 4).all()
    true = spectrum()
    for low, high in found.intervals:
        assert ((true >= low) & (true <= high)).any()


def test_traces_of_functions_hold_their_closed_forms(H: Operator) -> None:
    trace = H.trace(rtol=1e-3, seed=2).result()
    assert trace.low <= 2 * N <= trace.high
    # Products of (λ_j + d) are of Chebyshev's polynomials of the second kind: sinh((n+1)t)/sinh(t).
    damping = 0.5
    t = math.acosh(1 + damping / 2)
    known = (N + 1) * t - math.log(2 * math.sinh(t))
    found = H.logdet(damping=damping, rtol=1e-3, seed=3).result()
    assert found.low <= known <= found.high
    assert found.high - found.low < 0.01 * known


def test_of_the_solution_every_element_is_the_closed_form(H: Operator) -> None:
    b = H.gradient()
    found = H.solve(b, damping=0.5, method="cg", tol=1e-10).result()
    (system,) = found.systems
    assert system.outcome == "CONVERGED"
    v = b.numpy()
    bands = np.array([np.full(N, -1.0), np.full(N, 2.5)])
    from scipy.linalg import solveh_banded

    np.testing.assert_allclose(found.x[0].numpy(), solveh_banded(bands, v), atol=1e-8)
