"""The empirical Fisher matrix against the gradients of single targets and single sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hvp_client import Checkpoint, Client
from numpy.typing import NDArray

IGNORED = -100
LABELS = np.array([[0, 3, 5, 2, IGNORED, 7, 1], [0, 2, IGNORED, IGNORED, 4, 4, 9], [0] * 7])


def gradients(
    client: Client, checkpoint: Checkpoint, ids: NDArray[np.int64], *, by: str
) -> NDArray[np.float64]:
    """Gradients (units, n) of the summed losses of units."""
    found = []
    for row, labels in enumerate(LABELS):
        # The first label is of no token before it.
        targets = [place for place in range(1, 7) if labels[place] != IGNORED]
        for unit in [[place] for place in targets] if by == "token" else [targets]:
            chosen = np.full(7, IGNORED)
            chosen[unit] = labels[unit]
            batch = client.upload_batch({"input_ids": ids[row : row + 1], "labels": chosen[None]})
            H = client.operator(checkpoint, batch, dtype="float64")
            found.append(len(unit) * H.gradient().numpy())
    return np.array(found)


@pytest.mark.parametrize("by", ["token", "sequence"])
def test_it_is_the_sum_of_outer_products_over_the_number_of_targets(
    client: Client, checkpoint: Checkpoint, input_ids: NDArray[np.int64], by: str
) -> None:
    batch = client.upload_batch({"input_ids": input_ids, "labels": LABELS})
    kind = f"empirical_fisher_{by}"
    F = client.operator(checkpoint, batch, kind=kind, dtype="float64", micro_batch_size=2)
    assert (F.kind, F.shape[0]) == (kind, checkpoint.num_parameters)
    g = gradients(client, checkpoint, input_ids, by=by)
    assert len(g) == {"token": batch.num_targets, "sequence": 3}[by]
    dense = g.T @ g / batch.num_targets
    X = np.random.default_rng(0).standard_normal((len(dense), 3))
    np.testing.assert_allclose(F @ X, dense @ X, rtol=0, atol=1e-10 * np.abs(dense @ X).max())

    largest = F.eigsh(2, "LA").result()
    expected = np.linalg.eigvalsh(dense)[-2:]
    np.testing.assert_allclose(largest.eigenvalues, expected, rtol=1e-9)
    assert largest.outcome == "CONVERGED"
    assert largest.provenance["operator"] == kind
    trace = F.density(num_probes=8, num_steps=4).result().trace()
    assert abs(trace.value - np.trace(dense)) <= 5 * trace.standard_error
