"""Multiples, sums, shifts and preconditioned operators, computed on the ranks, against matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import (
    AsyncClient,
    Checkpoint,
    Client,
    InvalidArgumentError,
    JobFailedError,
    NotFoundError,
    Operator,
)
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from tests.client.conftest import Server

Matrix = NDArray[np.float64]


@pytest.fixture(name="small")
def small_hessian(
    client: Client, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> Operator:
    """The Hessian of the small model, n = 184, in float64."""
    batch = client.upload_batch({"input_ids": small_input_ids})
    return client.operator(client.upload_checkpoint(small_llama_dir), batch, dtype="float64")


def ggn(client: Client, H: Operator, **more: Any) -> Operator:
    return client.operator(H.checkpoint, H.batch, kind="ggn", dtype="float64", **more)


def numbers(n: int, columns: int = 2) -> Matrix:
    return np.random.default_rng(1).standard_normal((n, columns))


def diagonal(n: int) -> Matrix:
    return np.exp(np.random.default_rng(2).uniform(-3, 3, n))


def close(found: Any, expected: Any) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * scale)


def test_sums_and_multiples_are_operators_on_the_server_with_the_products_of_the_matrices(
    client: Client, small: Operator, dense: Matrix, dense_ggn: Matrix
) -> None:
    H, G = small, ggn(client, small)
    eye_H, n = client.identity(H), H.shape[0]
    V, eye, d = numbers(n), np.eye(n), diagonal(n)
    root = d**-0.5
    P = H.preconditioned(d)
    dense_p = root[:, None] * dense * root
    cases: list[tuple[Operator, Matrix, str]] = [
        (2.0 * H + 1e-3 * eye_H, 2 * dense + 1e-3 * eye, "2 hessian + 0.001 identity"),
        (H - G, dense - dense_ggn, "hessian - ggn"),
        (-(H + G) / 4, -(dense + dense_ggn) / 4, "-0.25 hessian - 0.25 ggn"),
        (eye_H * 3.5, 3.5 * eye, "3.5 identity"),
        (sum([G, eye_H], start=H), dense + dense_ggn + eye, "hessian + ggn + identity"),
        (P, dense_p, "D^-1/2 (hessian) D^-1/2"),
        (
            (H + 0.5 * eye_H).preconditioned(d) + 0.25 * eye_H,
            root[:, None] * (dense + 0.5 * eye) * root + 0.25 * eye,
            "D^-1/2 (hessian + 0.5 identity) D^-1/2 + 0.25 identity",
        ),
        (0.5 * eye_H - 2 * P, 0.5 * eye - 2 * dense_p, "D^-1/2 (-2 hessian) D^-1/2 + 0.5 identity"),
    ]
    for A, matrix, formula in cases:
        assert type(A) is type(H)
        assert A.kind == formula
        assert formula in repr(A)
        close(A @ V, matrix @ V)
        close(A.quadratic(V), np.einsum("ij,ij->j", V, matrix @ V))
        v = H.vector(V[:, 0])
        close((A @ v).numpy(), matrix @ V[:, 0])
    assert (2 * H - H).kind == "hessian"  # which a sum that comes to it is
    assert np.abs((H - H) @ V).max() == 0
    assert (H - H + eye_H).kind == "identity"


def test_questions_of_a_sum_are_answered_of_the_sum(
    client: Client, small: Operator, dense: Matrix, dense_ggn: Matrix
) -> None:
    H, G = small, ggn(client, small)
    n = H.shape[0]
    difference = (H - G).eigsh(3, "BE").result()
    values = np.linalg.eigvalsh(dense - dense_ggn)
    np.testing.assert_allclose(
        difference.eigenvalues, [values[0], *values[-2:]], rtol=0, atol=1e-9 * np.abs(values).max()
    )
    assert difference.outcome == "CONVERGED"
    assert difference.provenance["operator"] == "hessian - ggn"

    damped = client.operator(H.checkpoint, H.batch, kind="ggn", dtype="float64", damping=1e-3)
    trace = damped.trace(rtol=1e-6, max_products=4 * n).result()
    expected = np.trace(dense_ggn) + 1e-3 * n
    assert trace.low <= expected <= trace.high
    (smallest,) = damped.eigsh(1, "SA").result().eigenvalues  # the whole null space is there
    assert smallest == pytest.approx(1e-3, rel=1e-6)

    b = numbers(n)[:, 0]
    system = damped.solve(b, damping=2e-3, tol=1e-8).result()
    x = np.linalg.solve(dense_ggn + 3e-3 * np.eye(n), b)
    np.testing.assert_allclose(system.x[0].numpy(), x, rtol=0, atol=1e-6 * np.abs(x).max())


def test_a_job_has_its_preconditioner_until_it_ends_and_finds_the_eigenpairs(
    client: Client, small: Operator, dense: Matrix
) -> None:
    n = small.shape[0]
    d = diagonal(n)
    root = d**-0.5
    vector = small.vector(d)
    P = small.preconditioned(vector)
    job = P.eigsh(2, "LA")
    vector.delete()
    found = job.result()
    values, vectors = np.linalg.eigh(root[:, None] * dense * root)
    np.testing.assert_allclose(found.eigenvalues, values[-2:], rtol=1e-9)
    assert found.outcome == "CONVERGED"
    for interval, value in zip(found.intervals, values[-2:], strict=True):
        assert interval[0] <= value <= interval[1]
    (pair,) = [found.eigenvectors[1].numpy()]
    assert abs(pair @ vectors[:, -1]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(NotFoundError):
        P @ d


@pytest.mark.parametrize("wrong", [0.0, -1.0])
def test_a_diagonal_that_is_not_positive_is_refused_with_its_place(
    small: Operator, wrong: float
) -> None:
    d = diagonal(small.shape[0])
    d[7] = wrong
    P = small.preconditioned(d)
    for ask in (lambda: P @ d, lambda: P.quadratic(d)):
        with pytest.raises(InvalidArgumentError, match="element 7 of the preconditioner") as error:
            ask()
        assert error.value.reason == "PRECONDITIONER_INVALID"
        assert error.value.metadata["index"] == "7"
    with pytest.raises(JobFailedError, match="element 7"):
        P.eigsh(1).result()
    d[7] = np.nan
    with pytest.raises(InvalidArgumentError) as refused:
        small.preconditioned(d)
    assert refused.value.reason == "NON_FINITE"


def test_what_is_no_sum_is_refused_or_scipys(
    client: Client, small: Operator, H: Operator, checkpoint: Checkpoint
) -> None:
    d = diagonal(small.shape[0])
    P = small.preconditioned(d)
    with pytest.raises(InvalidArgumentError) as twice:
        P.preconditioned(d)
    assert twice.value.reason == "TERMS_INVALID"
    with pytest.raises(InvalidArgumentError) as other:
        small.preconditioned(H.random_vector(seed=0))
    assert other.value.reason == "VECTOR_SPACE_MISMATCH"
    assert other.value.field == "operator.precondition"
    with pytest.raises(InvalidArgumentError) as part:
        P.restrict("*norm*")
    assert part.value.reason == "VECTOR_SPACE_MISMATCH"
    for bad in (float("nan"), float("inf"), 1e308):
        with pytest.raises(InvalidArgumentError) as number:
            10.0 * (bad * small)
        assert number.value.reason == "COEFFICIENT_INVALID"
    with pytest.raises(InvalidArgumentError) as damping:
        client.operator(small.checkpoint, small.batch, damping="1")  # type: ignore[arg-type]
    assert damping.value.reason == "COEFFICIENT_INVALID"
    with pytest.raises(InvalidArgumentError) as handle:
        client.identity(checkpoint)  # type: ignore[arg-type]
    assert handle.value.reason == "OPERATOR_EXPECTED"
    seeds = [
        client.operator(small.checkpoint, small.batch, kind="fisher", sample_seed=i)
        for i in range(17)
    ]
    with pytest.raises(InvalidArgumentError, match="at most 16") as many:
        sum(seeds)
    assert many.value.reason == "TERMS_INVALID"

    # One of another dtype, a diagonal that is not for both, an operator of SciPy's.
    single = client.operator(small.checkpoint, small.batch)
    outside = aslinearoperator(np.eye(small.shape[0]))
    for left, right in ((small, single), (small, P), (small, outside), (outside, small)):
        mixed = left + right
        assert isinstance(mixed, LinearOperator)
        assert not isinstance(mixed, Operator)
    close((small + outside) @ d, small @ d + d)
    close((small @ small) @ d, small @ (small @ d))
    with pytest.raises(TypeError):
        small + "H"


def test_the_server_refuses_what_no_sdk_would_send(client: Client, small: Operator) -> None:
    twin = small._twin
    spec_type = type(twin._spec)

    def refusal(**fields: Any) -> InvalidArgumentError:
        spec = spec_type()
        spec.CopyFrom(twin._spec)
        for name, value in fields.items():
            if name == "terms":
                spec.terms.extend(spec_type.Term(**each) for each in value)
            else:
                setattr(spec, name, value)
        wrong = type(twin)(twin._session, spec, twin._domain, twin._codomain, twin._tensors)
        with pytest.raises(InvalidArgumentError) as refused:
            client._portal.run(wrong.loss())
        return refused.value

    kinds = spec_type.Kind
    hessian = {"kind": kinds.Value("KIND_HESSIAN"), "coefficient": 1.0}
    none = kinds.Value("KIND_UNSPECIFIED")
    assert refusal(terms=[hessian]).reason == "TERMS_INVALID"  # a kind too
    assert refusal(kind=none).reason == "KIND_UNSPECIFIED"
    assert refusal(kind=none, terms=[hessian] * 17).reason == "TERMS_INVALID"
    jacobian = kinds.Value("KIND_JACOBIAN")
    assert refusal(kind=jacobian, damping=1.0).reason == "OPERATOR_NOT_SYMMETRIC"
    wrong = refusal(kind=none, terms=[hessian, {"kind": jacobian}])
    assert (wrong.reason, wrong.field) == ("KIND_UNSPECIFIED", "operator.terms[1].kind")
    wrong = refusal(kind=none, terms=[{**hessian, "coefficient": float("nan")}])
    assert (wrong.reason, wrong.field) == (
        "COEFFICIENT_INVALID",
        "operator.terms[0].coefficient",
    )
    assert refusal(damping=float("inf")).reason == "COEFFICIENT_INVALID"
    assert refusal(shift=1.0).reason == "TERMS_INVALID"
    wrong = refusal(kind=none, terms=[{**hessian, "sample_seed": 3}])
    assert (wrong.reason, wrong.field) == ("SEED_INVALID", "operator.terms[0].sample_seed")


async def test_awaited_operators_have_the_same_algebra(
    server: Server, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> None:
    async with AsyncClient(server.address) as client:
        batch = await client.upload_batch({"input_ids": small_input_ids})
        checkpoint = await client.upload_checkpoint(small_llama_dir)
        H = await client.operator(checkpoint, batch, dtype="float64")
        A = 2 * H - 0.5 * client.identity(H)
        v = numbers(H.shape[0])[:, 0]
        close(await (A @ v), 2 * await (H @ v) - 0.5 * v)
        with pytest.raises(TypeError, match="unsupported operand"):
            H + await client.operator(checkpoint, batch)
