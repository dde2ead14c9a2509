"""An operator is one of SciPy's: its arithmetic and its solvers, against the dense matrix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import Client, InvalidArgumentError, Operator, Vector
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh, lobpcg

Array = NDArray[np.float64]


@pytest.fixture
def llama_dir(small_llama_dir: Path) -> Path:
    return small_llama_dir


@pytest.fixture
def input_ids(small_input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return small_input_ids


def identity(H: Operator) -> Any:
    return aslinearoperator(np.eye(H.shape[0]))


def close(one: Any, other: Any) -> None:
    scale = np.abs(other).max()
    np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11 * scale)


def test_an_operator_is_scipys_and_ours(H: Operator) -> None:
    assert isinstance(H, LinearOperator)
    assert isinstance(H, Operator)
    assert aslinearoperator(H) is H
    assert type(H).__name__ == "Operator"


Combine = Callable[[Any, Any], Any]


@pytest.mark.parametrize(
    "combine",
    [
        lambda H, E: H + 1e-3 * E,
        lambda H, E: 1e-3 * E + H,
        lambda H, E: H - 1e-3 * E,
        lambda H, E: 2 * H,
        lambda H, E: H * 2.5,
        lambda H, E: np.float64(2) * H,
        lambda H, E: H / 4,
        lambda H, E: -H,
        lambda H, E: H @ H,
        lambda H, E: H * H,
        lambda H, E: E @ H + H @ E,
        lambda H, E: H**2,
        lambda H, E: H.T,
        lambda H, E: (2 * H + E).T,
        lambda H, E: H.T @ H + E,
    ],
    ids=range(15),
)
def test_arithmetic_of_operators_is_that_of_the_matrices(
    H: Operator, dense: Array, combine: Combine
) -> None:
    combined = combine(H, identity(H))
    expected = combine(aslinearoperator(dense), identity(H)) @ np.eye(H.shape[0])
    V = np.random.default_rng(0).standard_normal((H.shape[0], 2))
    assert isinstance(combined, LinearOperator)
    close(combined @ V, expected @ V)
    close(combined.matvec(V[:, 0]), expected @ V[:, 0])
    close(combined.rmatvec(V[:, 1]), expected.T @ V[:, 1])
    close(combined.H.matmat(V), expected.T @ V)


def test_it_is_its_own_transpose_and_adjoint(H: Operator) -> None:
    assert H.T is H
    assert H.H is H
    operator: Any = H  # what is SciPy's own, its types do not tell
    assert operator.transpose() is operator.adjoint() is H
    assert operator.ndim == 2
    v = H.random_vector(seed=1)
    assert isinstance(H.T @ v, Vector)
    assert isinstance(H.dot(v), Vector)
    assert isinstance(H.dot([v])[0], Vector)


def test_scipys_solvers_go_the_way_that_they_go_with_the_matrix(H: Operator, dense: Array) -> None:
    n = H.shape[0]
    rng = np.random.default_rng(5)
    v, b, X = rng.standard_normal(n), rng.standard_normal(n), rng.standard_normal((n, 2))
    largest = [eigsh(A, k=1, which="LA", v0=v, tol=1e-3)[0] for A in (H, dense)]
    np.testing.assert_allclose(largest[0], largest[1], rtol=1e-8)
    np.testing.assert_allclose(largest[0], np.linalg.eigvalsh(dense)[-1:], rtol=1e-3)
    with pytest.warns(UserWarning, match="Exited"):  # five steps are few
        blocks = [lobpcg(A, X, maxiter=5)[0] for A in (H, dense)]
    np.testing.assert_allclose(blocks[0], blocks[1], rtol=1e-8)
    shifted = (H + 30.0 * identity(H), dense + 30.0 * np.eye(n))  # positive definite
    solutions = [cg(A, b, rtol=1e-6) for A in shifted]
    assert [failed for _, failed in solutions] == [0, 0]
    close(solutions[0][0], solutions[1][0])


def test_what_does_not_fit_is_refused_as_before(H: Operator) -> None:
    for wrong in (np.ones(3), np.ones((3, 2)), 2.0, None):
        with pytest.raises(InvalidArgumentError):
            _ = H @ wrong


def test_without_scipy_an_operator_is_ours_alone(client: Client, H: Operator) -> None:
    code = f"""
import sys
sys.modules["scipy"] = None  # as if it were not installed
from hvp_client import Client, Operator
with Client("{client.address}") as client:
    H = client.operator("{H.checkpoint}", "{H.batch}")
    assert type(H) is Operator and H.T is H and H.H is H
    assert (H @ H.zeros()).norm() == 0
    assert type(2 * H - H) is Operator  # on the server; all else would be SciPy's
    try:
        H + (lambda v: v)
    except TypeError:
        print("no other arithmetic")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no other arithmetic\n"
