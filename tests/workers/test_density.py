"""The density of a real model's curvature through the engine, where it is known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hvp_operations.density import DensityResult, DensitySpec
from hvp_workers.backend import RunProgress
from hvp_workers.opening import open_backend

from tests.workers.test_certificates import blank_head, closed_form, written


async def test_nodes_and_weights_of_a_gauss_newton_matrix_are_its_eigenvalues_and_their_share(
    tmp_path: Path,
) -> None:
    backend = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await backend.start()
    model = blank_head()
    ids = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    operator = written(model, tmp_path, ids, "float64", kind="ggn")
    steps, result = [], None
    spec = DensitySpec(num_probes=20, num_steps=60)
    async for step in backend.run(operator, "density", spec, []):
        if isinstance(step, RunProgress):
            steps.append(step)
        else:
            result = step
    await backend.close()
    assert isinstance(result, DensityResult)
    true = closed_form(model, ids)
    n = int(result.provenance["num_parameters"])
    # Hidden states have eight coordinates: as many eigenvalues besides zero, each four times.
    distinct = torch.cat((torch.zeros(1).double(), true.unique()))
    assert len(distinct) == 9
    weights = np.zeros((20, 9))
    for row, quadrature in zip(weights, result.quadratures, strict=True):
        distances = (torch.tensor(quadrature.nodes, dtype=torch.float64)[:, None] - distinct).abs()
        # Angles of positions are rounded to float32.
        assert float(distances.amin(1).max()) < 1e-6 * float(true[0])
        assert len(quadrature.nodes) < 60  # the Krylov space was exhausted
        np.add.at(row, distances.argmin(1).numpy(), np.array(quadrature.weights))
    error = weights.std(0, ddof=1) / np.sqrt(20)
    share = np.array([1 - 32 / n, *[4 / n] * 8])
    assert (np.abs(weights.mean(0) - share) <= 4.5 * error).all()
    assert steps[-1].num_products == result.num_products <= 20 * 60
    assert result.orthogonality_defect < 1e-13
    assert result.provenance["probe"] == "Philox4x32-10 by flat index, Rademacher"
    assert result.loss > 0
