"""Low-rank matrices from the SDK and the command line, against the dense Gauss-Newton matrix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import (
    AsyncClient,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    JobFailedError,
    LowRankResult,
    Operator,
    Vector,
)
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.client.conftest import Server
from tests.client.test_cli import hvp

Array = NDArray[np.float64]
K = 12


@pytest.fixture(name="G")
def gauss_newton(
    server: Server, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> Iterator[Operator]:
    """The Gauss-Newton matrix of the small model, of which `whole` is all."""
    with Client(server.address) as client:
        batch = client.upload_batch({"input_ids": small_input_ids})
        yield client.operator(
            client.upload_checkpoint(small_llama_dir), batch, kind="ggn", dtype="float64"
        )


@pytest.fixture
def whole(dense_ggn: Array) -> Array:
    """All of G."""
    return dense_ggn


def dense(L: LowRankResult[Vector]) -> Array:
    """A_k as a matrix."""
    u = np.stack([each.numpy() for each in L.eigenvectors])
    found: Array = u.T @ np.diag(L.eigenvalues) @ u
    return found


def test_it_is_extended_by_new_random_vectors_alone(G: Operator, whole: Array) -> None:
    job = G.low_rank(K)
    first = job.result()
    longer = job.extend(k=K + 8)
    L = longer.result()
    assert (first.num_products, L.num_products) == (K + 20, 8 + 20)
    error = np.linalg.norm(whole - dense(L), 2)
    assert L.error <= error <= L.error_bound
    assert error <= np.linalg.norm(whole - dense(first), 2)
    scale = np.linalg.norm(whole, 2)
    assert np.linalg.eigvalsh(whole - dense(L)).min() >= -1e-10 * scale
    assert len(L.eigenvalues) == len(L.eigenvectors) == K + 8
    with pytest.raises(FailedPreconditionError, match=f"the job has {K + 8} already"):
        longer.extend(k=K)


def test_it_is_a_matrix_below_the_operator_that_computes_on_the_server(
    G: Operator, whole: Array
) -> None:
    job = G.low_rank(K)
    L = job.result()
    assert (L.method, L.outcome, job.headline) == ("nystrom", "CONVERGED", "low_rank auto k=12")
    n, matrix, damping = G.shape[0], dense(L), 0.03
    norm = float(np.linalg.norm(whole, 2))
    assert np.linalg.eigvalsh(whole - matrix)[0] >= -1e-10 * norm
    assert L.error <= np.linalg.norm(whole - matrix, 2) <= L.error_bound
    assert L.num_products == K + 10 + L.num_check_products == K + 20
    v = G.random_vector(seed=1)
    damped = matrix + damping * np.eye(n)
    np.testing.assert_allclose((L @ v).numpy(), matrix @ v.numpy(), atol=1e-12 * norm)
    x = L.solve(v, damping)
    np.testing.assert_allclose(damped @ x.numpy(), v.numpy(), rtol=1e-9, atol=1e-10)
    assert L.trace() == pytest.approx(np.trace(matrix), rel=1e-10)
    assert L.logdet(damping) == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-10)
    assert L.shape == (n, n)
    assert "exact operator" in L.claims[0]
    assert L.table().rows[0][1] == f"{L.eigenvalues[-1]:.8g}"


def test_preconditioned_cg_takes_at_most_half_the_products_of_plain_cg(
    G: Operator, whole: Array
) -> None:
    damping = 1e-4 * float(np.linalg.eigvalsh(whole)[-1])
    b = G.gradient()
    L = G.low_rank(40).result()
    asked: dict[str, Any] = {"damping": damping, "tol": 1e-6, "max_products": 600}
    plain = G.solve(b, **asked).result()
    helped = G.solve(b, preconditioner=L, **asked).result()
    assert plain.outcomes == helped.outcomes == ("CONVERGED",)
    assert 2 * helped.num_products <= plain.num_products
    damped = whole + damping * np.eye(len(whole))
    expected = np.linalg.solve(damped, b.numpy())
    for found in (plain, helped):
        rest = b.numpy() - damped @ found.x[0].numpy()
        assert np.linalg.norm(rest) <= 1e-6 * np.linalg.norm(b.numpy()) * (1 + 1e-6)
    assert np.linalg.norm(helped.x[0].numpy() - expected) <= 1e-2 * np.linalg.norm(expected)
    assert helped.provenance["preconditioner"] == "low rank, 40 vectors"
    assert "preconditioner" not in plain.provenance
    assert G.plan("solve", b=b, preconditioner=L, **asked).fits

    # The theorem on the condition number, and the damping that is proposed of it.
    suggested = L.suggest_damping(4)
    assert L.condition_bound(suggested) == pytest.approx(4)
    quick = G.solve(b, damping=suggested, preconditioner=L, tol=1e-6).result()
    assert quick.outcomes == ("CONVERGED",)
    assert quick.num_products <= 2 + np.sqrt(4) / 2 * np.log(2 * np.sqrt(4) / 1e-6)


def test_a_vector_is_taken_for_a_diagonal_and_numbers_are_too(G: Operator, whole: Array) -> None:
    b, damping = G.random_vector(seed=2), 0.05
    d = whole.diagonal()
    named = G.vector(d)
    found = G.solve(b, damping=damping, preconditioner=named)
    named.delete()  # the job has it until its end
    by_number = G.solve(b, damping=damping, preconditioner=d).result()
    result = found.result()
    assert result.provenance["preconditioner"] == "diagonal"
    for each in (result, by_number):
        rest = b.numpy() - whole @ each.x[0].numpy() - damping * each.x[0].numpy()
        assert np.linalg.norm(rest) <= 1.001e-6 * np.linalg.norm(b.numpy())


def test_what_makes_no_preconditioner_is_refused(G: Operator) -> None:
    b = G.random_vector(seed=3)
    L = G.low_rank(3).result()
    u = L.eigenvectors
    for asked, reason, field in (
        ({"preconditioner": u}, "PRECONDITIONER_INVALID", "preconditioner"),
        (
            {"preconditioner": u, "preconditioner_values": [1.0]},
            "PRECONDITIONER_VALUES_INVALID",
            "preconditioner_values",
        ),
        (
            {"preconditioner": u, "preconditioner_values": [1.0, 2.0, -1.0]},
            "PRECONDITIONER_VALUES_INVALID",
            "preconditioner_values",
        ),
        ({"preconditioner": [u[0], 3]}, "VECTOR_EXPECTED", "preconditioner"),
        ({"preconditioner": np.ones(3)}, "SHAPE_MISMATCH", "preconditioner"),
    ):
        with pytest.raises(InvalidArgumentError) as refusal:
            G.solve(b, damping=0.1, **asked)
        assert (refusal.value.reason, refusal.value.field) == (reason, field)
    norms = G.restrict("*norm*")
    with pytest.raises(InvalidArgumentError) as refusal:
        norms.solve(norms.random_vector(seed=1), damping=0.1, preconditioner=L)
    assert refusal.value.reason == "VECTOR_SPACE_MISMATCH"
    zeros = G.zeros()
    for given, values, reason in (
        (zeros, (), "PRECONDITIONER_NOT_POSITIVE"),
        ([b, u[0]], (1.0, 1.0), "VECTORS_NOT_ORTHONORMAL"),
    ):
        job = G.solve(b, preconditioner=given, preconditioner_values=values)
        with pytest.raises(JobFailedError) as failure:
            job.result()
        assert failure.value.reason == reason
        assert failure.value.code == "INVALID_ARGUMENT"


def test_of_a_hessian_nystrom_is_refused_and_eigenpairs_are_taken(
    client: Client, G: Operator, dense: Array
) -> None:
    H = client.operator(G.checkpoint, G.batch, dtype="float64")
    with pytest.raises(InvalidArgumentError) as refusal:
        H.low_rank(5, "nystrom")
    assert (refusal.value.reason, refusal.value.field) == ("METHOD_UNSUPPORTED", "method")
    assert "use eigsh" in refusal.value.message
    for asked, reason in (
        ({"k": 0}, "K_INVALID"),
        ({"k": 185}, "K_INVALID"),
        ({"oversampling": -1}, "OVERSAMPLING_INVALID"),
        ({"tol": 1.0}, "TOL_INVALID"),
        ({"max_products": 3}, "MAX_PRODUCTS_INVALID"),
    ):
        with pytest.raises(InvalidArgumentError) as refusal:
            H.low_rank(**asked)
        assert refusal.value.reason == reason
    L = H.low_rank(5).result()
    values = np.linalg.eigvalsh(dense)
    leading = np.sort(values[np.argsort(-np.abs(values))[:5]])
    np.testing.assert_allclose(L.eigenvalues, leading, atol=1e-3 * np.abs(values).max())
    assert L.method == "eigsh"
    if leading.min() < 0:
        with pytest.raises(ValueError, match="negative eigenvalues"):
            L.suggest_damping()
        with pytest.raises(InvalidArgumentError) as refusal:
            H.solve(H.gradient(), damping=100.0, preconditioner=L)
        assert refusal.value.reason == "PRECONDITIONER_VALUES_INVALID"
        with pytest.raises(ValueError, match="not positive definite"):
            L.logdet(1e-9)


def test_it_is_saved_and_brought_back(G: Operator, tmp_path: Path) -> None:
    L = G.low_rank(4, seed=1).result()
    path = tmp_path / "L.safetensors"
    L.save(path)
    tensors = load_file(path)
    assert tensors["eigenvectors"].shape == (4, G.shape[0])
    np.testing.assert_array_equal(tensors["eigenvalues"], L.eigenvalues)
    again = G.load_low_rank(path)
    assert isinstance(again, LowRankResult)
    for old, new in zip(L.eigenvectors, again.eigenvectors, strict=True):
        assert new.name != old.name
        np.testing.assert_array_equal(new.numpy(), old.numpy())
    left, right = L.to_json(), again.to_json()
    assert left.pop("eigenvectors") != right.pop("eigenvectors")
    assert left == right
    v = G.random_vector(seed=1)
    np.testing.assert_array_equal((L @ v).numpy(), (again @ v).numpy())

    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "none.safetensors"):
        with pytest.raises(InvalidArgumentError) as refusal:
            G.load_low_rank(tmp_path / name)
        assert (refusal.value.reason, refusal.value.field) == ("FILE_INVALID", "path")
    with pytest.raises(InvalidArgumentError) as refusal:
        G.restrict("*norm*").load_low_rank(path)
    assert refusal.value.reason == "SHAPE_MISMATCH"
    with pytest.raises(FileNotFoundError):
        L.save(tmp_path / "no" / "folder")
    assert {each.name for each in tmp_path.iterdir()} == {"L.safetensors", "other.safetensors"}


def test_bad_numbers_and_arrays_are_said(G: Operator) -> None:
    L = G.low_rank(2).result()
    v = G.random_vector(seed=1)
    with pytest.raises(ValueError, match="above 0"):
        L.solve(v, 0.0)
    with pytest.raises(ValueError, match="above 0"):
        L.logdet(float("nan"))
    with pytest.raises(ValueError, match="above 1"):
        L.suggest_damping(1.0)
    with pytest.raises(TypeError, match=r"H\.vector"):
        _ = L @ v.numpy()


async def test_the_awaited_side_computes_and_solves_too(
    server: Server, G: Operator, tmp_path: Path
) -> None:
    async with AsyncClient(server.address) as client:
        H = await client.operator(G.checkpoint, G.batch, kind="ggn", dtype="float64")
        L = await (await H.low_rank(6)).result()
        b = await H.random_vector(seed=1)
        product = await (L @ b)
        x = await L.solve(b, 0.1)
        rest = await (await (await (L @ x)).axpy(0.1, x)).axpy(-1.0, b)
        assert await rest.norm() <= 1e-10 * await b.norm()
        solved = await (await H.solve(b, damping=0.1, preconditioner=L)).result()
        assert solved.outcomes == ("CONVERGED",)
        await L.save(tmp_path / "L.safetensors")
        again = await H.load_low_rank(tmp_path / "L.safetensors")
        difference = await (await (again @ b)).axpy(-1.0, product)
        assert await difference.norm() == 0


def test_the_command_shows_the_matrix_and_what_is_certified(server: Server, G: Operator) -> None:
    common = [
        *("low_rank", "--checkpoint", G.checkpoint, "--ids", G.batch, "--operator", "ggn"),
        *("--dtype", "float64", "-k", "3", "--address", server.address),
    ]
    done = hvp(*common, "--format", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["eigenvalues"]) == len(told["eigenvectors"]) == 3
    shown = hvp(*common)
    assert "the norm of the error A - A_k lies between" in " ".join(shown.stdout.split())
    refused = hvp(*common, "--operator", "hessian", "--method", "nystrom")
    assert refused.returncode == 1
    assert "METHOD_UNSUPPORTED" in refused.stderr
    with G.random_vector(seed=1) as b:
        b.keep()
        solving = ["solve", *common[1:9], "--b", b.name, "--damping", "0.1"]
        given = [word for name in told["eigenvectors"] for word in ("--preconditioner", name)]
        given += [
            word for each in told["eigenvalues"] for word in ("--preconditioner-values", str(each))
        ]
        solved = hvp(*solving, *given, "--address", server.address, "--format", "json")
        assert solved.returncode == 0, solved.stderr
        provenance = json.loads(solved.stdout)["provenance"]
        assert provenance["preconditioner"] == "low rank, 3 vectors"
