"""Linear systems from the SDK and the command line, against the dense Hessian."""

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
    InvalidArgumentError,
    NotFoundError,
    Operator,
    SolveResult,
)
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.client.conftest import Server
from tests.client.test_cli import hvp

Array = NDArray[np.float64]


@pytest.fixture
def small(
    server: Server, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> Iterator[Operator]:
    """The Hessian whose matrix is `dense`."""
    with Client(server.address) as client:
        batch = client.upload_batch({"input_ids": small_input_ids})
        yield client.operator(client.upload_checkpoint(small_llama_dir), batch, dtype="float64")


def true_residual(dense: Array, x: Any, b: Any, damping: float) -> float:
    x, b = np.asarray(x), np.asarray(b)
    return float(np.linalg.norm(b - dense @ x - damping * x) / np.linalg.norm(b))


def test_x_is_that_of_the_dense_matrix(small: Operator, dense: Array) -> None:
    damping = -2 * np.linalg.eigvalsh(dense)[0]  # a well-conditioned, definite matrix
    expected = np.linalg.inv(dense + damping * np.eye(len(dense)))
    b, c = small.random_vector(seed=1), small.gradient()
    for method in ("cg", "minres"):
        job = small.solve([b, c], damping=damping, method=method, tol=1e-10)
        found = job.result()
        assert found.outcomes == ("CONVERGED", "CONVERGED")
        assert found.converged
        assert job.headline.startswith(f"solve {method} damping=")
        for x, rhs, residual in zip(found.x, (b, c), found.relative_residuals, strict=True):
            np.testing.assert_allclose(
                x.numpy(), expected @ rhs.numpy(), rtol=1e-7, atol=1e-9 / damping
            )
            assert residual == pytest.approx(
                true_residual(dense, x, rhs, damping), rel=0.1, abs=1e-13
            )
        assert found.provenance["method"] == method
        assert found.provenance["verified_in"] == "float64"
        assert found.loss > 0


def test_an_indefinite_hessian_is_solved_by_minres_and_cg_gives_the_direction(
    small: Operator, dense: Array
) -> None:
    g = small.gradient()
    damping = 0.05 * float(np.abs(np.linalg.eigvalsh(dense)).max())
    found = small.solve(g, damping=damping, max_products=2000).result()
    assert found.provenance["method"] == "minres"
    assert found.outcomes == ("CONVERGED",)
    assert true_residual(dense, found.x[0], g, damping) <= 1e-6
    assert found.direction() is None

    b = small.random_vector(seed=1)
    stopped = small.solve(b, method="cg").result()
    (system,) = stopped.systems
    assert system.outcome == "NEGATIVE_CURVATURE"
    d = stopped.direction()
    assert d is not None
    curvature = float(d.numpy() @ dense @ d.numpy())
    assert curvature < 0
    assert system.curvature == pytest.approx(curvature, rel=1e-6)
    assert d.norm() == pytest.approx(1)
    assert small.quadratic(d) == pytest.approx(curvature, rel=1e-6)
    assert "its curvature is negative" in " ".join(stopped.claims)
    assert stopped.table().rows[0][1] == "NEGATIVE_CURVATURE"


def test_a_gauss_newton_matrix_is_solved_by_cg(
    client: Client, small: Operator, dense_ggn: Any
) -> None:
    G = client.operator(small.checkpoint, small.batch, kind="ggn", dtype="float64")
    found = G.solve(np.ones(G.shape[0]), damping=1e-2).result()
    assert found.provenance["method"] == "cg"
    assert true_residual(dense_ggn, found.x[0], np.ones(G.shape[0]), 1e-2) <= 1e-6
    assert found.outcomes == ("CONVERGED",)
    again = G.solve(np.ones(G.shape[0]), damping=1e-2, x0=found.x).result()
    assert again.num_products == 1


def test_kronecker_factors_save_products_and_change_no_answer(
    client: Client, small: Operator
) -> None:
    G = client.operator(
        small.checkpoint,
        client.upload_batch({"input_ids": np.random.default_rng(1).integers(0, 7, (8, 16))}),
        kind="ggn",
        dtype="float64",
        parameters=["*.down_proj.weight"],
    )
    matrix = G.matmat(np.eye(G.shape[0]))
    damping, b = 1e-4 * float(np.linalg.eigvalsh(matrix)[-1]), G.gradient()
    asked: dict[str, Any] = {"damping": damping, "tol": 1e-9}
    plain = G.solve(b, **asked).result()
    for method in ("cg", "minres"):
        job = G.solve(b, factors="kronecker", method=method, **asked)
        found = job.result()
        assert found.outcomes == ("CONVERGED",)
        assert "kronecker factors" in job.headline
        assert 3 * found.num_products <= 2 * plain.num_products
        assert true_residual(matrix, found.x[0], b, damping) <= 1e-9
        np.testing.assert_allclose(found.x[0].numpy(), plain.x[0].numpy(), rtol=1e-4, atol=1e-9)
        told = found.provenance["preconditioner"]
        assert told.startswith("Kronecker factors of ")
        assert told.endswith("labels drawn by seed 0")
    again = G.solve(b, factors="kronecker", method="minres", **asked).result()
    assert np.array_equal(again.x[0].numpy(), found.x[0].numpy())  # the seed's own
    other = G.solve(b, factors="kronecker", seed=7, **asked).result()
    assert other.provenance["preconditioner"].endswith("labels drawn by seed 7")
    further = job.extend(tol=1e-11).result()
    assert "Kronecker" in further.provenance["preconditioner"]
    F = client.operator(
        small.checkpoint, small.batch, kind="fisher", sample_seed=5, dtype="float64"
    )
    solved = F.solve(F.gradient(), damping=0.1, factors="kronecker").result()
    assert solved.provenance["preconditioner"].endswith("labels drawn by seed 5")
    assert solved.converged


def test_what_has_no_factors_is_refused_with_what_to_do(client: Client, small: Operator) -> None:
    b, damping = small.gradient(), 1.0
    shifted = client.operator(small.checkpoint, small.batch, dtype="float64", damping=0.5)
    cases: list[tuple[Operator, str, str, dict[str, Any]]] = [
        (shifted, "OPERATOR_HAS_NO_FACTORS", "give the damping to solve", {"damping": damping}),
        (2 * small, "OPERATOR_HAS_NO_FACTORS", "a vector or a low_rank", {"damping": damping}),
        (small, "FACTORS_INVALID", "leave out one", {"damping": damping, "preconditioner": b}),
        (small, "FACTORS_UNSUPPORTED", "kronecker", {"damping": damping, "factors": "tensor"}),
        (small, "DAMPING_INVALID", "more than 0", {"damping": 0.0}),
        (small, "DAMPING_INVALID", "more than 0", {"damping": -1.0, "method": "minres"}),
        (small, "SEED_INVALID", "0 or more", {"damping": damping, "seed": -1}),
    ]
    for operator, reason, lever, asked in cases:
        with pytest.raises(InvalidArgumentError, match=lever) as refusal:
            operator.solve(b, **{"factors": "kronecker", **asked})
        assert refusal.value.reason == reason
    plain = small.plan("solve", b=b, damping=damping)
    factored = small.plan("solve", b=b, damping=damping, factors="kronecker")
    assert factored.max_products == plain.max_products


def test_numbers_are_taken_as_matvec_takes_them_and_leave_nothing(
    small: Operator, dense: Array, server: Server
) -> None:
    rhs = np.random.default_rng(0).standard_normal((len(dense), 2))
    damping = -2 * float(np.linalg.eigvalsh(dense)[0])
    found = small.solve(rhs, damping=damping, x0=0.1 * rhs, tol=1e-8).result()
    for x, column in zip(found.x, rhs.T, strict=True):
        assert true_residual(dense, x, column, damping) <= 1e-8
    with Client(server.address) as other:
        kept = {each.name for each in other.vectors()}
    assert {each.name for each in found.x} <= kept
    plan = small.plan("solve", b=rhs[:, 0], max_products=30)
    assert plan.fits
    assert plan.max_products == 30
    with small.random_vector(seed=2) as b:
        assert small.plan("solve", b=[b], max_products=30) == plan


def test_what_cannot_be_asked_is_refused(small: Operator) -> None:
    b = small.random_vector(seed=1)
    for asked, reason, field in (
        ({"b": []}, "VECTORS_MISSING", "b"),
        ({"b": np.ones(3)}, "SHAPE_MISMATCH", "b"),
        ({"b": b, "tol": 0.0}, "TOL_INVALID", "tol"),
        ({"b": b, "damping": -1.0, "method": "cg"}, "DAMPING_INVALID", "damping"),
        ({"b": b, "x0": [b, b]}, "X0_INVALID", "x0"),
        ({"b": "name"}, "DTYPE_UNSUPPORTED", "b"),
        ({"b": [b, 3]}, "VECTOR_EXPECTED", "b"),
    ):
        with pytest.raises(InvalidArgumentError) as refusal:
            small.solve(**asked)
        assert (refusal.value.reason, refusal.value.field) == (reason, field)
    norms = small.restrict("*norm*")
    with pytest.raises(InvalidArgumentError) as refusal:
        norms.solve(b)
    assert refusal.value.reason == "VECTOR_SPACE_MISMATCH"
    b.delete()
    with pytest.raises(NotFoundError):
        small.solve(b)


def test_a_vector_may_go_as_soon_as_the_job_is_queued(small: Operator, dense: Array) -> None:
    b = small.random_vector(seed=4)
    rhs = b.numpy()
    damping = -2 * float(np.linalg.eigvalsh(dense)[0])
    job = small.solve(b, damping=damping)
    b.delete()
    assert true_residual(dense, job.result().x[0], rhs, damping) <= 1e-6


async def test_the_awaited_side_solves_too(server: Server, small: Operator) -> None:
    async with AsyncClient(server.address) as client:
        H = await client.operator(small.checkpoint, small.batch, dtype="float64")
        b = await H.random_vector(seed=1)
        found: SolveResult[Any] = await (await H.solve([b], damping=5.0)).result()
        assert found.outcomes == ("CONVERGED",)
        rest = b.axpy(-5.0, found.x[0])
        applied = await H.matvec(found.x[0])
        left = await (await rest).axpy(-1.0, applied)
        assert await left.norm() <= 1.01e-6 * await b.norm()


def test_the_command_takes_names_and_files(
    server: Server, small: Operator, dense: Array, tmp_path: Path
) -> None:
    n, damping = len(dense), -2 * float(np.linalg.eigvalsh(dense)[0])
    rhs = np.random.default_rng(1).standard_normal(n)
    np.save(tmp_path / "b.npy", rhs)
    tensors = {
        each.name: rhs[each.offset : each.offset + each.num_elements].reshape(each.shape)
        for each in small.parameter_tensors
    }
    save_file(tensors, tmp_path / "b.safetensors")
    kept = small.vector(rhs, keep=True)
    common = [
        *("solve", "--checkpoint", small.checkpoint, "--ids", small.batch, "--dtype", "float64"),
        *("--damping", str(damping), "--address", server.address),
    ]
    given = ["--b", kept.name]
    for name in ("b.npy", "b.safetensors"):
        given += ["--b", str(tmp_path / name)]
    done = hvp(*common, *given, "--format", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [each["outcome"] for each in told["systems"]] == ["CONVERGED"] * 3
    with Client(server.address) as client:
        found = [client.vector(name).numpy() for name in told["x"]]
    assert true_residual(dense, found[0], rhs, damping) <= 1e-6
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6, atol=1e-9)

    shown = hvp(*common, *given[:2])
    assert "CONVERGED" in shown.stdout
    plan = hvp(*common, *given[:2], "--plan")
    assert "it fits" in plan.stdout
    assert hvp(*common).returncode == 2  # no right-hand side
    assert "neither a file" in hvp(*common, "--b", "nothing.npy").stderr
    assert ".safetensors or .npy" in hvp(*common, "--b", str(Path(__file__))).stderr
