"""What a result says is certified, in numbers and in sentences."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hvp_client import EigshResult
from hvp_client._results import result_from_proto
from hvp_protos.v1 import eigsh_pb2, job_pb2


def result(
    outcome: str, *, bounds: tuple[float, ...] = (0.1, 0.2), **known: Any
) -> EigshResult[Any]:
    message = job_pb2.JobResult(
        eigsh=eigsh_pb2.EigshResult(
            eigenvalues=[-3.0, 5.0],
            residuals=[0.05, 0.1],
            outcome=eigsh_pb2.EigshResult.Outcome.Value(f"OUTCOME_{outcome}"),
            error_bounds=bounds,
            completeness=eigsh_pb2.EigshResult.Completeness(**known) if known else None,
            num_products=9,
            ritz_values=[0.0],
            ritz_weights=[1.0],
            loss=1.0,
        )
    )
    found = result_from_proto(message, lambda vector: vector)
    assert isinstance(found, EigshResult)
    return found


SHOWN: dict[str, Any] = {
    "shown": True,
    "margin": 0.25,
    "failure_probability": 1e-3,
    "num_products": 4,
}


def test_an_interval_reaches_as_far_as_its_bound() -> None:
    found = result("CONVERGED", **SHOWN)
    np.testing.assert_allclose(found.intervals, [[-3.1, -2.9], [4.8, 5.2]])
    assert found.completeness.margin == 0.25


def test_every_interval_and_completeness_are_said_with_their_confidence() -> None:
    held, complete = result("CONVERGED", **SHOWN).claims
    assert held == "Each interval holds an eigenvalue of the exact operator."
    assert "at least 0.999" in complete
    assert "each of these 2" in complete
    assert "2.5e-01" in complete
    (_, certain) = result("CONVERGED", **(SHOWN | {"failure_probability": 0.0})).claims
    assert "probability" not in certain


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("MULTIPLICITY_UNCERTAIN", "could not be shown within the budget"),
        ("MAX_PRODUCTS", "ran out before every pair met the tolerance"),
        ("NOISE_LIMIT", "too coarse for the tolerance"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(outcome: str, words: str) -> None:
    claims = " ".join(result(outcome, shown=False, margin=math.inf).claims)
    assert words in claims
    assert "None was missed" not in claims


def test_a_margin_of_the_size_of_the_values_is_no_certificate() -> None:
    claims = " ".join(result("CONVERGED", **(SHOWN | {"margin": 3.0})).claims)
    assert "None was missed" not in claims
    assert "3.0e+00" in claims


@pytest.mark.parametrize("known", [{}, {"shown": False, "margin": math.inf}])
def test_of_an_older_server_or_an_unverified_run_nothing_is_claimed(known: dict[str, Any]) -> None:
    found = result("UNVERIFIED", bounds=(), **known)
    assert np.isinf(found.intervals).all()
    assert not found.completeness.shown
    assert "Nothing is claimed" in found.claims[0]
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["intervals"] == [[None, None], [None, None]]
    assert document["completeness"]["margin"] is None
