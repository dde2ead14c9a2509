"""The SDK against a real server process on a tiny Llama."""

from __future__ import annotations

import gc
import math
import signal
import uuid
from pathlib import Path

import numpy as np
import pytest
from hvp_client import (
    AsyncClient,
    Batch,
    Checkpoint,
    Client,
    DeadlineExceededError,
    HvpError,
    InvalidArgumentError,
    JobCancelledError,
    NotFoundError,
    Operator,
    Vector,
)
from numpy.typing import NDArray

from tests.client.conftest import Server

EPS = np.finfo(np.float64).eps


def close(actual: NDArray[np.float64] | float, wanted: NDArray[np.float64] | float) -> None:
    # Every figure here is a sum of under a thousand terms, each of rounding error EPS.
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e4 * EPS * scale)


def test_the_sdk_does_what_its_example_says(
    server: Server, llama_dir: Path, input_ids: NDArray[np.int64]
) -> None:
    labels = input_ids.copy()
    labels[0, :3] = -100
    array = np.random.default_rng(1).standard_normal
    with Client(server.address) as client:
        checkpoint = client.upload_checkpoint(llama_dir)
        batch = client.upload_batch({"input_ids": input_ids, "labels": labels})
        H = client.operator(checkpoint, batch, kind="hessian", dtype="float64", micro_batch_size=2)
        n = checkpoint.num_parameters
        assert H.shape == (n, n)
        assert isinstance(H.loss(), float)
        g = H.gradient()
        assert isinstance(g, Vector)
        product = H @ array(n)
        assert isinstance(product, np.ndarray)
        assert product.shape == (n,)
        assert (H @ array((n, 2))).shape == (n, 2)
        v = H.random_vector(seed=1, distribution="rademacher")
        w = H @ v
        assert isinstance(w, Vector)
        u = H.vector(array(n))
        assert v.dot(w) == pytest.approx(float(v.numpy() @ w.numpy()), rel=1e-9)
        assert v.norm() == pytest.approx(np.sqrt(n))
        job = H.eigsh(k=4, which="BE", max_products=80)
        result = job.result(timeout_s=600)
        assert result.eigenvalues.shape == result.residuals.shape == (4,)
        assert result.outcome == "CONVERGED"
        assert result.num_products <= 80
        for value, y, residual in zip(
            result.eigenvalues, result.eigenvectors, result.residuals, strict=True
        ):
            assert (H @ y).axpy(-value, y).norm() == pytest.approx(residual, abs=1e-12)
        events = list(job.watch())
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert {event.state for event in events} - {""} == {"QUEUED", "RUNNING", "SUCCEEDED"}
        job.cancel()
        assert job.state == "SUCCEEDED"
        assert job.name in [job.name for job in client.jobs()]
        assert client.job(job.name).state == "SUCCEEDED"
        assert u.shape == (n,)


def test_every_handle_shows_its_size_its_kind_and_its_dtype(
    H: Operator, checkpoint: Checkpoint, batch: Batch, client: Client
) -> None:
    v = H.zeros()
    job = H.eigsh(k=1, which="LA", max_products=20)
    job.result(timeout_s=300)
    assert [repr(each) for each in (H, v, checkpoint, batch, job, client)] == [
        f"<Operator hessian n=752 float64 of {checkpoint.name}>",
        f"<Vector n=752 float64 {v.name}>",
        f"<Checkpoint LlamaForCausalLM n=752 F32 {checkpoint.name}>",
        f"<Batch 3 x 7 tokens, 18 targets {batch.name}>",
        f"<Job eigsh hessian float64 SUCCEEDED {job.name}>",
        f"<Client {client.address}>",
    ]


def test_the_operator_is_symmetric_and_linear(H: Operator) -> None:
    u = H.random_vector(seed=1, distribution="gaussian")
    v = H.random_vector(seed=2, distribution="sphere")
    close(u.dot(H @ v), v.dot(H @ u))
    close((H @ (2.0 * u - v / 4)).numpy(), 2 * (H @ u).numpy() - (H @ v).numpy() / 4)


def test_arrays_columns_and_vectors_give_the_same_products(H: Operator) -> None:
    n = H.shape[0]
    V = np.random.default_rng(0).standard_normal((n, 3))
    W = H @ V
    for column in range(3):
        close(H @ V[:, column], W[:, column])
    vectors = [H.vector(column) for column in V.T]
    products = H @ vectors
    close(np.stack([w.numpy() for w in products], axis=1), W)
    close(H.matvec(V[:, :1]), W[:, :1])
    assert (H @ V[:, :0]).shape == (n, 0)


def test_vectors_do_arithmetic_where_they_are(H: Operator) -> None:
    theta, v = H.parameters(), H.random_vector(seed=3)
    a, b = theta.numpy(), v.numpy()
    assert set(b) == {-1.0, 1.0}
    close((theta + v).numpy(), a + b)
    close((theta - v).numpy(), a - b)
    close((np.float64(3) * v).numpy(), 3 * b)
    close((-v / 2).numpy(), -b / 2)
    close(theta.axpy(0.5, v).numpy(), a + b / 2)
    assert H.zeros().norm() == 0
    with pytest.raises(TypeError):
        _ = v * v  # type: ignore[operator]


def test_scipy_takes_the_operator_as_its_own(H: Operator) -> None:
    from scipy.sparse.linalg import aslinearoperator, eigsh

    v = np.random.default_rng(5).standard_normal(H.shape[0])
    close(aslinearoperator(H) @ v, H @ v)
    largest, _ = eigsh(H, k=1, which="LA", v0=v, tol=1e-6)
    ours = H.eigsh(k=1, which="LA", max_products=80).result(timeout_s=300)
    np.testing.assert_allclose(ours.eigenvalues, largest, rtol=1e-7)


def test_float32_products_are_float32_and_near_the_float64_ones(
    client: Client, checkpoint: Checkpoint, batch: Batch, H: Operator
) -> None:
    H32 = client.operator(checkpoint.name, batch.name)
    v = np.ones(H.shape[0])
    assert H32.dtype == np.float32
    assert (H32 @ v).dtype == np.float32
    exact = H @ v
    assert np.linalg.norm(H32 @ v - exact) < 1e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [None, np.float32, "float32"])
def test_an_operator_is_float32_unless_told_otherwise(
    client: Client, checkpoint: Checkpoint, batch: Batch, dtype: object
) -> None:
    assert client.operator(checkpoint, batch, dtype=dtype).dtype == np.float32


def test_vectors_nobody_refers_to_any_more_are_freed(H: Operator, client: Client) -> None:
    def held() -> set[str]:
        return {vector.name for vector in client.vectors()}

    kept = H.random_vector(seed=1)
    lost = {H.random_vector(seed=seed).name for seed in range(2, 5)}
    gc.collect()
    looked_up = client.vector(kept.name)
    new = H.zeros()  # sends the deletes that are due
    assert held().isdisjoint(lost - {new.name})
    del looked_up
    gc.collect()
    H.zeros()
    assert kept.name in held()
    before = held()
    _ = H @ np.ones(H.shape[0])
    assert held() <= before
    with H.zeros() as brief:
        name = brief.name
    with pytest.raises(NotFoundError):
        client.vector(name)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.ones(3), "SHAPE_MISMATCH"),
        (np.ones((3, 2)), "SHAPE_MISMATCH"),
        (np.ones((2, 2, 2)), "SHAPE_MISMATCH"),
        (np.array(1.0), "SHAPE_MISMATCH"),
        (None, "DTYPE_UNSUPPORTED"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(H: Operator, value: object, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        _ = H @ value
    assert (caught.value.reason, caught.value.field) == (reason, "v")


def test_nan_in_a_probe_is_refused_with_its_index(H: Operator) -> None:
    probe = np.ones(H.shape[0])
    probe[7] = np.nan
    with pytest.raises(InvalidArgumentError) as caught:
        _ = H @ probe
    assert caught.value.reason == "NON_FINITE"
    assert caught.value.metadata == {"index": "7"}


def test_vectors_of_different_spaces_do_not_mix(
    client: Client, checkpoint: Checkpoint, batch: Batch, H: Operator
) -> None:
    other = client.operator(checkpoint, batch, dtype="float32").random_vector(seed=1)
    with pytest.raises(InvalidArgumentError) as caught:
        _ = H @ other
    assert caught.value.reason == "VECTOR_SPACE_MISMATCH"
    with pytest.raises(InvalidArgumentError) as caught:
        H.zeros().dot(other)
    assert caught.value.reason == "VECTOR_SPACE_MISMATCH"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"k": 0}, "K_INVALID"),
        ({"k": 10**6}, "K_INVALID"),
        ({"k": 2, "which": "SM"}, "WHICH_UNSUPPORTED"),
        ({"k": 2, "tol": -1.0}, "TOL_INVALID"),
        ({"k": 2, "tol": 1.0}, "TOL_INVALID"),
        ({"k": 2, "tol": math.nan}, "TOL_INVALID"),
        ({"k": 2, "seed": -1}, "SEED_INVALID"),
        ({"k": 2, "max_products": 0}, "MAX_PRODUCTS_INVALID"),
        ({"k": 2, "max_products": 1}, "MAX_PRODUCTS_INVALID"),
        ({"k": 2, "num_lanczos_vectors": 1}, "NUM_LANCZOS_VECTORS_INVALID"),
    ],
)
def test_senseless_jobs_are_refused(H: Operator, arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        H.eigsh(**arguments)  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_operators_are_checked_when_they_are_made(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    for arguments, reason in (
        ({"kind": "hess"}, "KIND_UNSPECIFIED"),
        ({"dtype": "bfloat16"}, "DTYPE_UNSUPPORTED"),
        ({"precision": "half"}, "PRECISION_UNSUPPORTED"),
        ({"precision": "bfloat16", "dtype": "float64"}, "PRECISION_UNSUPPORTED"),
        ({"micro_batch_size": 0}, "MICRO_BATCH_INVALID"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            client.operator(checkpoint, batch, **arguments)
        assert caught.value.reason == reason
    too_large = client.upload_batch({"input_ids": [[1, 10_000]]})
    with pytest.raises(InvalidArgumentError) as caught:
        client.operator(checkpoint, too_large)
    assert caught.value.reason == "TOKEN_ID_OUT_OF_RANGE"


@pytest.mark.parametrize(
    ("batch", "reason", "field"),
    [
        ({"input_ids": [[1, -2]]}, "TOKEN_ID_OUT_OF_RANGE", "input_ids"),
        ({"input_ids": [[1], [2]]}, "BATCH_EMPTY", "input_ids"),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "NO_TARGETS", "labels"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 2]]},
            "BATCH_VALUE_OUT_OF_RANGE",
            "attention_mask",
        ),
    ],
)
def test_a_batch_of_tokens_is_refused_in_the_same_words_with_its_model_and_by_the_operator(
    client: Client, checkpoint: Checkpoint, batch: dict[str, object], reason: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as early:
        client.upload_batch(batch, checkpoint)
    assert (early.value.reason, early.value.field) == (reason, field)
    uploaded = client.upload_batch(batch)
    with pytest.raises(InvalidArgumentError) as late:
        client.operator(checkpoint, uploaded)
    assert (late.value.reason, late.value.message) == (reason, early.value.message)
    assert late.value.metadata["tensor"] == field


def test_unknown_names_are_not_found(client: Client, checkpoint: Checkpoint) -> None:
    missing = uuid.uuid4().hex
    for look_up in (
        lambda: client.job(f"projects/default/jobs/{missing}"),
        lambda: client.vector(f"projects/default/vectors/{missing}"),
        lambda: client.checkpoint(f"projects/default/checkpoints/{missing}"),
        lambda: client.operator(checkpoint, f"projects/default/dataBatches/{missing}"),
        lambda: client.job("nonsense"),
    ):
        with pytest.raises(NotFoundError) as caught:
            look_up()
        assert caught.value.reason == "RESOURCE_NOT_FOUND"


def test_a_second_upload_sends_nothing_and_is_the_same_checkpoint(
    client: Client, llama_dir: Path, checkpoint: Checkpoint
) -> None:
    calls: list[tuple[int, int]] = []
    again = client.upload_checkpoint(llama_dir, lambda done, total: calls.append((done, total)))
    assert again == checkpoint
    assert len(calls) == 1
    assert calls[0][0] == calls[0][1] == sum(p.stat().st_size for p in _model_files(llama_dir))
    assert checkpoint.name in [known.name for known in client.checkpoints()]


def _model_files(directory: Path) -> list[Path]:
    return [directory / "config.json", *directory.glob("*.safetensors")]


def test_a_damaged_checkpoint_is_refused_by_name_of_file(
    client: Client, llama_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    weights = (llama_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(InvalidArgumentError) as caught:
        client.upload_checkpoint(tmp_path)
    assert caught.value.reason == "SAFETENSORS_INVALID"
    assert "model.safetensors" in str(caught.value.metadata) + caught.value.message


def test_waiting_for_a_job_may_be_cut_short_and_the_job_goes_on(H: Operator) -> None:
    job = H.eigsh(k=2, tol=1e-300, max_products=300, labels={"why": "test"})
    with pytest.raises(DeadlineExceededError, match="goes on") as caught:
        job.result(timeout_s=0.0)
    assert isinstance(caught.value, TimeoutError)
    assert job.state in ("QUEUED", "RUNNING")
    assert job.status().state in ("QUEUED", "RUNNING")
    assert job.labels == {"why": "test"}
    job.cancel()
    job.cancel()
    with pytest.raises(JobCancelledError):
        job.result(timeout_s=60)
    assert job.state == "CANCELLED"
    job.delete()
    with pytest.raises(NotFoundError):
        job.status()


def test_jobs_are_listed_by_state(H: Operator, client: Client) -> None:
    job = H.eigsh(k=1, which="LA", max_products=20)
    job.result(timeout_s=300)
    assert job.name in [job.name for job in client.jobs(states=["SUCCEEDED", "FAILED"])]
    assert job.name not in [job.name for job in client.jobs(states=["queued"])]
    with pytest.raises(InvalidArgumentError):
        client.jobs(states=["DONE"])


async def test_the_asynchronous_client_has_the_same_names(
    server: Server, llama_dir: Path, input_ids: NDArray[np.int64]
) -> None:
    async with AsyncClient(server.address) as client:
        checkpoint = await client.upload_checkpoint(llama_dir)
        batch = await client.upload_batch({"input_ids": input_ids})
        H = await client.operator(checkpoint, batch, dtype="float64")
        v = await H.random_vector(seed=1)
        w = await (H @ v)
        array = await (H @ await v.numpy())
        close(await w.numpy(), array)
        total = await (await (2 * v) + w)
        close(await total.dot(v), 2 * await v.dot(v) + await v.dot(w))
        job = await H.eigsh(k=2, which="SA", max_products=60)
        states = [event.state async for event in job.watch() if event.type == "state"]
        assert states == ["QUEUED", "RUNNING", "SUCCEEDED"]
        result = await job.result(timeout_s=300)
        product = await (H @ result.eigenvectors[0])
        close(await product.dot(result.eigenvectors[0]), float(result.eigenvalues[0]))
        async with await H.zeros() as zeros:
            assert await zeros.norm() == 0
        assert (await client.server_info()).dtypes == ("float32", "float64")
        assert [group.state for group in await client.worker_groups()] == ["READY"]


def test_names_say_the_same_of_both_clients() -> None:
    from hvp_client import AsyncJob, AsyncOperator, AsyncVector, Job

    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(Client) == names(AsyncClient)
    assert names(Job) == names(AsyncJob)
    assert names(Vector) == names(AsyncVector)
    only_blocking = {"T", "H", "rmatvec", "rmatmat"}  # SciPy cannot await
    assert names(Operator) == names(AsyncOperator) | only_blocking


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_watcher_and_a_waiter_live_through_a_restart_of_the_server_and_nothing_is_lost(
    tmp_path: Path, llama_dir: Path, input_ids: NDArray[np.int64], how: signal.Signals
) -> None:
    server = Server.start(tmp_path / "state")
    try:
        with Client(server.address) as client:
            checkpoint = client.upload_checkpoint(llama_dir)
            batch = client.upload_batch({"input_ids": input_ids})
            H = client.operator(checkpoint, batch, dtype="float64")
            job = H.eigsh(k=2, which="LA", tol=1e-300, max_products=80)
            sequences, attempts, restarted = [], [], False
            for event in job.watch():
                sequences.append(event.sequence)
                if event.state:
                    attempts.append(event.attempt)
                if event.num_products > 3 and not restarted:
                    restarted = True
                    server.stop(how)
                    server = Server.start(tmp_path / "state", server.address)
            assert sequences == list(range(1, len(sequences) + 1))
            # An attempt that a drain has cut short does not count.
            expected = 2 if how == signal.SIGKILL else 1
            assert max(attempts) == expected
            assert len(job.result(timeout_s=60).eigenvalues) == 2
            assert job.attempt == expected
            assert isinstance(job.error, HvpError | None)
        with Client(server.address) as client:  # who knew nothing of the first server
            found = client.job(job.name)
            assert (found.state, found.attempt) == ("SUCCEEDED", expected)
            result = found.result(timeout_s=60)
            assert np.all(result.residuals < 1e-9)
            again = (
                client.upload_checkpoint(llama_dir),
                client.upload_batch({"input_ids": input_ids}),
            )
            assert again == (checkpoint, batch)
            H = client.operator(*again, dtype="float64")
            for value, vector in zip(result.eigenvalues, result.eigenvectors, strict=True):
                y = vector.numpy()
                np.testing.assert_allclose(H @ y, value * y, rtol=0, atol=1e-9)
    finally:
        assert server.stop() == 0
