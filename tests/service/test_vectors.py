"""Vectors and operators: arithmetic on the ranks, and what survives the ranks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name
from hvp_service.calls.paging import PageRequest
from hvp_service.operators import service as operators
from hvp_service.operators.resolver import OperatorRef, check_precision
from hvp_service.storage.state_dir import StateDir
from hvp_service.vectors import service as vectors
from hvp_service.vectors import transfer
from hvp_service.vectors.rows import Vector
from hvp_service.vectors.service import SeededSource
from hvp_service.vectors.transfer import VectorPiece
from hvp_workers.backend import BackendError, Dtype
from safetensors.numpy import save
from structlog.testing import capture_logs

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import (
    PROJECT,
    make_batch,
    make_checkpoint,
    make_operator,
    quadratic,
    upload,
)

GAUSSIAN = SeededSource(seed=3, distribution="DISTRIBUTION_GAUSSIAN")


async def make(deps: Dependencies, ref: OperatorRef, source: Any = GAUSSIAN) -> Vector:
    return await vectors.create(deps, PROJECT, ref.checkpoint, ref.dtype, source)


async def array(deps: Dependencies, vector: Vector, offset: int = 0, limit: int = 0) -> Any:
    pieces = [piece async for piece in transfer.read(deps, vector.name, offset, limit)]
    assert all(google_crc32c.value(piece.data) == piece.crc32c for piece in pieces)
    return np.frombuffer(b"".join(piece.data for piece in pieces), vector.dtype)


async def pieces_of(data: bytes, size: int = 16, item: int = 8) -> AsyncIterator[VectorPiece]:
    for start in range(0, len(data), size):
        part = data[start : start + size]
        yield VectorPiece(element_offset=start // item, data=part, crc32c=google_crc32c.value(part))


async def lose(deps: Dependencies, backend: QuadraticBackend) -> None:
    """Let the ranks die, notice it, and wait until they are back."""
    backend.lose_after = 0
    with pytest.raises(ServiceError, match="WORKER_GROUP_LOST"):
        await deps.group.call(lambda b: b.delete_vectors([]))
    await deps.group.wait_ready()


async def refusal(work: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await work
    return caught.value


async def test_products_gradient_and_loss_are_those_of_the_quadratic(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    tensors = quadratic()
    vector = await make(deps, ref)
    (product,) = await operators.apply(deps, ref, [str(vector.name)])
    gradient = await operators.compute_gradient(deps, ref)
    loss = await operators.evaluate_loss(deps, ref)
    values = await array(deps, vector)
    np.testing.assert_allclose(await array(deps, product), tensors["A"] @ values, rtol=1e-13)
    np.testing.assert_allclose(
        await array(deps, gradient), tensors["A"] @ tensors["theta"], rtol=1e-13
    )
    assert loss.value == pytest.approx(0.5 * tensors["theta"] @ tensors["A"] @ tensors["theta"])
    assert loss.num_targets == 6
    both = [str(vector.name), str(product.name)]
    slopes = await operators.evaluate_forms(deps, ref, "FORM_SLOPE", both)
    forms = await operators.evaluate_forms(deps, ref, "FORM_QUADRATIC", both)
    A, each = tensors["A"], np.array([values, tensors["A"] @ values])
    np.testing.assert_allclose(slopes, each @ A @ tensors["theta"], rtol=1e-12)
    np.testing.assert_allclose(forms, np.diag(each @ A @ each.T), rtol=1e-12)
    assert not product.durable
    assert vector.durable
    inner = await vectors.inner_products(deps, [(str(vector.name), str(product.name))])
    assert inner == [pytest.approx(values @ tensors["A"] @ values)]


async def test_what_is_told_of_the_loss_does_not_depend_on_the_kind(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    jacobian = replace(ref, kind="KIND_JACOBIAN")
    names = [str((await make(deps, ref)).name)]
    for form, told in (("FORM_SLOPE", True), ("FORM_QUADRATIC", False)):
        expected = await operators.evaluate_forms(deps, ref, form, names)
        if told:
            assert await operators.evaluate_forms(deps, jacobian, form, names) == expected
        else:
            error = await refusal(operators.evaluate_forms(deps, jacobian, form, names))
            assert (error.reason, error.field) == ("OPERATOR_NOT_SYMMETRIC", "operator.kind")
    assert await operators.evaluate_loss(deps, jacobian) == await operators.evaluate_loss(deps, ref)
    gradients = [await operators.compute_gradient(deps, each) for each in (ref, jacobian)]
    one, other = [await array(deps, each) for each in gradients]
    np.testing.assert_array_equal(one, other)


async def test_ranges_of_a_vector_are_read_and_others_refused(deps: Dependencies) -> None:
    vector = await make(deps, await make_operator(deps))
    whole = await array(deps, vector)
    np.testing.assert_array_equal(await array(deps, vector, 2, 3), whole[2:5])
    np.testing.assert_array_equal(await array(deps, vector, 6, 0), [])
    for offset, limit in [(0, 7), (7, 0), (-1, 0), (0, -2)]:
        error = await refusal(anext(transfer.read(deps, vector.name, offset, limit)))
        assert error.reason == "READ_RANGE_INVALID"
    assert not list((deps.state_dir.root / "tmp").iterdir())


async def test_a_range_of_a_product_is_all_that_is_written_for_its_reader(
    deps: Dependencies,
) -> None:
    ref = await make_operator(deps)
    product = await operators.compute_gradient(deps, ref)
    whole = quadratic()["A"] @ quadratic()["theta"]
    for offset, limit in [(4, 1), (0, 2), (3, 0)]:
        pieces = transfer.read(deps, product.name, offset, limit)
        piece = await anext(pieces)
        written = [path.stat().st_size for path in (deps.state_dir.root / "tmp").iterdir()]
        assert written == [len(piece.data)] == [8 * (limit or 3)]
        assert piece.offset == offset
        np.testing.assert_allclose(np.frombuffer(piece.data), whole[offset:][: limit or 3])
        await pieces.aclose()  # type: ignore[attr-defined]
    assert not list((deps.state_dir.root / "tmp").iterdir())


async def test_combinations_zeros_and_parameters_are_made_on_the_ranks(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    theta = await make(deps, ref, vectors.ParametersSource())
    zeros = await make(deps, ref, vectors.ZerosSource())
    terms = ((2.0, str(theta.name)), (-1.0, str(theta.name)), (5.0, str(zeros.name)))
    combined = await make(deps, ref, vectors.CombinationSource(terms=terms))
    np.testing.assert_allclose(await array(deps, combined), quadratic()["theta"])
    assert not combined.durable


async def test_an_uploaded_vector_comes_back_bit_for_bit_both_ways(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    data = np.random.default_rng(0).standard_normal(6).tobytes()
    written = await transfer.write(
        deps, PROJECT, ref.checkpoint, "float64", "", pieces_of(data, 16)
    )
    from_blob = await make(deps, ref, await upload(deps, data))
    for vector in (written, from_blob):
        assert vector.durable
        assert (await array(deps, vector)).tobytes() == data
    await deps.blobs.delete(Name(PROJECT, "blobs", (await upload(deps, data)).sha256))
    assert (await array(deps, from_blob)).tobytes() == data


async def test_what_can_be_made_again_survives_the_ranks(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    seeded = await make(deps, ref)
    uploaded = await make(deps, ref, await upload(deps, np.ones(6).tobytes()))
    (product,) = await operators.apply(deps, ref, [str(seeded.name)])
    before = await array(deps, seeded)
    await lose(deps, backend)
    assert not backend.resident
    names = [str(seeded.name), str(uploaded.name)]
    assert len(await operators.apply(deps, ref, names)) == 2
    np.testing.assert_array_equal(await array(deps, seeded), before)
    listed, _ = await deps.vectors.list_page(PROJECT, PageRequest())
    assert product.name not in [vector.name for vector in listed]
    for work in (
        deps.vectors.get(product.name),
        operators.apply(deps, ref, [str(product.name)]),
        operators.evaluate_forms(deps, ref, "FORM_SLOPE", [str(product.name)]),
        vectors.inner_products(deps, [(str(product.name), str(product.name))]),
        anext(transfer.read(deps, product.name, 0, 0)),
        make(deps, ref, vectors.CombinationSource(terms=((1.0, str(product.name)),))),
    ):
        assert (await refusal(work)).reason == "INPUT_MISSING"


async def test_what_can_be_made_again_survives_a_restart(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir
) -> None:
    ref = await make_operator(deps)
    seeded = await make(deps, ref)
    before = await array(deps, seeded)
    (product,) = await operators.apply(deps, ref, [str(seeded.name)])
    await deps.close()
    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        np.testing.assert_array_equal(await array(again, seeded), before)
        assert (await refusal(again.vectors.get(product.name))).reason == "INPUT_MISSING"
    finally:
        await again.close()


async def test_a_call_that_loses_the_ranks_says_so_and_the_next_works(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    vector = await make(deps, ref)
    backend.lose_after = 0
    error = await refusal(operators.apply(deps, ref, [str(vector.name)]))
    assert error.reason == "WORKER_GROUP_LOST"
    assert error.retry_after_s is not None
    await deps.group.wait_ready()
    assert await operators.apply(deps, ref, [str(vector.name)])
    assert backend.num_starts == 2


async def test_a_deleted_vector_is_gone_from_ranks_disk_and_rows(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    vector = await make(deps, await make_operator(deps), await upload(deps, bytes(48)))
    assert deps.vectors.file(vector).exists()
    await deps.vectors.delete(vector.name)
    await deps.group.call(lambda b: b.inner_products([]))  # behind what the deletion has queued
    assert vector.name.id not in backend.resident
    assert not deps.vectors.file(vector).exists()
    assert (await refusal(deps.vectors.delete(vector.name))).reason == "RESOURCE_NOT_FOUND"


async def test_a_product_whose_caller_has_left_is_deleted(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    vector = await make(deps, ref)
    backend.gate.clear()
    call = asyncio.create_task(operators.apply(deps, ref, [str(vector.name)]))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    backend.gate.set()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if set(backend.resident) == {vector.name.id}:
            break
    await asyncio.sleep(0.05)
    assert set(backend.resident) == {vector.name.id}
    listed, _ = await deps.vectors.list_page(PROJECT, PageRequest())
    assert [found.name for found in listed] == [vector.name]


@pytest.mark.parametrize("size", [0, 40, 49, 56])
async def test_a_vector_of_another_length_is_refused(deps: Dependencies, size: int) -> None:
    ref = await make_operator(deps)
    blob = await upload(deps, bytes(size))
    assert (await refusal(make(deps, ref, blob))).reason == "SHAPE_MISMATCH"
    stream = pieces_of(bytes(size))
    written = transfer.write(deps, PROJECT, ref.checkpoint, "float64", "", stream)
    assert (await refusal(written)).reason == "SHAPE_MISMATCH"
    assert not list((deps.state_dir.root / "tmp").iterdir())
    assert not list((deps.state_dir.root / "vectors").iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
async def test_a_vector_that_is_not_finite_is_refused_with_the_index(
    deps: Dependencies, bad: float
) -> None:
    ref = await make_operator(deps)
    values = np.ones(6)
    values[4] = bad
    blob = await upload(deps, values.tobytes())
    for work in (
        make(deps, ref, blob),
        transfer.write(deps, PROJECT, ref.checkpoint, "float64", "", pieces_of(values.tobytes())),
    ):
        error = await refusal(work)
        assert (error.reason, error.metadata["index"]) == ("NON_FINITE", "4")
        assert error.field
    assert not list((deps.state_dir.root / "vectors").iterdir())


async def test_a_written_vector_with_a_damaged_or_missing_piece_is_refused(
    deps: Dependencies,
) -> None:
    ref = await make_operator(deps)

    async def changed(**change: Any) -> AsyncIterator[VectorPiece]:
        async for piece in pieces_of(bytes(48)):
            yield replace(piece, **change) if piece.element_offset == 2 else piece

    for change, reason in [
        ({"crc32c": 1}, "CHUNK_CHECKSUM_MISMATCH"),
        ({"element_offset": 3}, "WRITE_OFFSET_GAP"),
    ]:
        stream = changed(**change)
        error = await refusal(transfer.write(deps, PROJECT, ref.checkpoint, "float64", "", stream))
        assert error.reason == reason


async def test_requests_that_make_no_sense_are_refused(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    other = await make_checkpoint(deps, seed=1)
    vector = await make(deps, ref)
    stranger = await vectors.create(deps, PROJECT, str(other.name), "float64", GAUSSIAN)
    single = await vectors.create(deps, PROJECT, ref.checkpoint, "float32", GAUSSIAN)
    far = await make_batch(deps, {"input_ids": np.full((1, 4), 64)})
    long = await make_batch(deps, {"input_ids": np.zeros((1, 17), np.int64)})
    name, alien, small = str(vector.name), str(stranger.name), str(single.name)
    unknown = f"projects/{PROJECT}/vectors/nothing"
    mixed = vectors.CombinationSource(terms=((1.0, alien),))
    infinite = vectors.CombinationSource(terms=((math.inf, name),))
    nameless = SeededSource(seed=1, distribution="DISTRIBUTION_UNSPECIFIED")

    def apply(**change: str | int) -> Any:
        return operators.apply(deps, replace(ref, **change), [name])  # type: ignore[arg-type]

    def evaluate(form: str, names: list[str], kind: str = ref.kind) -> Any:
        return operators.evaluate_forms(deps, replace(ref, kind=kind), form, names)

    for work, reason in [
        (make(deps, ref, None), "SOURCE_MISSING"),
        (make(deps, ref, vectors.CombinationSource(terms=())), "SOURCE_MISSING"),
        (make(deps, ref, nameless), "DISTRIBUTION_UNSPECIFIED"),
        (make(deps, replace(ref, dtype="bfloat16")), "DTYPE_UNSUPPORTED"),
        (make(deps, replace(ref, checkpoint="x")), "RESOURCE_NOT_FOUND"),
        (make(deps, ref, mixed), "VECTOR_SPACE_MISMATCH"),
        (make(deps, ref, infinite), "NON_FINITE"),
        (operators.apply(deps, ref, []), "VECTORS_MISSING"),
        (operators.apply(deps, ref, [unknown]), "RESOURCE_NOT_FOUND"),
        (operators.apply(deps, ref, [alien]), "VECTOR_SPACE_MISMATCH"),
        (operators.apply(deps, ref, [name, small]), "VECTOR_SPACE_MISMATCH"),
        (evaluate("FORM_UNSPECIFIED", [name]), "FORM_UNSPECIFIED"),
        (evaluate("FORM_SLOPE", []), "VECTORS_MISSING"),
        (evaluate("FORM_SLOPE", [unknown]), "RESOURCE_NOT_FOUND"),
        (evaluate("FORM_QUADRATIC", [name, small]), "VECTOR_SPACE_MISMATCH"),
        (evaluate("FORM_QUADRATIC", [name], kind="KIND_JACOBIAN"), "OPERATOR_NOT_SYMMETRIC"),
        (evaluate("FORM_SLOPE", [name], kind="KIND_UNSPECIFIED"), "KIND_UNSPECIFIED"),
        (vectors.inner_products(deps, [(name, alien)]), "VECTOR_SPACE_MISMATCH"),
        (vectors.inner_products(deps, [(name, unknown)]), "RESOURCE_NOT_FOUND"),
        (apply(kind="KIND_UNSPECIFIED"), "KIND_UNSPECIFIED"),
        (apply(precision="bfloat16"), "PRECISION_UNSUPPORTED"),
        (apply(precision="tf32"), "PRECISION_UNSUPPORTED"),
        (apply(precision="float8", dtype="float32"), "PRECISION_UNSUPPORTED"),
        (apply(precision="tf32", dtype="float32"), "PRECISION_UNSUPPORTED"),
        (apply(dtype="int8"), "DTYPE_UNSUPPORTED"),
        (apply(micro_batch_size=-1), "MICRO_BATCH_INVALID"),
        (apply(checkpoint=f"projects/{PROJECT}/checkpoints/none"), "RESOURCE_NOT_FOUND"),
        (apply(data_batch=f"projects/{PROJECT}/dataBatches/none"), "RESOURCE_NOT_FOUND"),
        (apply(data_batch=str(far.name)), "TOKEN_ID_OUT_OF_RANGE"),
        (apply(data_batch=str(long.name)), "SEQUENCE_TOO_LONG"),
    ]:
        assert (await refusal(work)).reason == reason


async def test_a_loss_that_is_not_finite_names_the_block(deps: Dependencies) -> None:
    tensors = quadratic()
    tensors["theta"][0] = np.inf
    from tests.service.world import CONFIG, checkpoint_files

    files = await checkpoint_files(
        deps, {"config.json": CONFIG, "model.safetensors": save(tensors)}
    )
    checkpoint = await deps.checkpoints.create(PROJECT, files)
    ref = replace(await make_operator(deps), checkpoint=str(checkpoint.name))
    with pytest.raises(BackendError) as caught:
        await operators.evaluate_loss(deps, ref)
    assert (caught.value.reason, caught.value.metadata["block"]) == ("NON_FINITE", "theta")


@pytest.mark.parametrize(
    ("dtype", "device", "precision", "found"),
    [
        ("float32", "cpu", "", "full"),
        ("float32", "cuda", "", "bfloat16"),
        ("float64", "cuda", "", "full"),
        ("float32", "cpu", "bfloat16", "bfloat16"),
        ("float32", "cuda", "tf32", "tf32"),
        ("float32", "cuda", "full", "full"),
        ("float32", "cpu", "tf32", None),
        ("float64", "cuda", "tf32", None),
        ("float64", "cpu", "bfloat16", None),
        ("float32", "cuda", "BFLOAT16", None),
    ],
)
def test_the_precision_follows_from_dtype_and_device_unless_it_is_given(
    dtype: Dtype, device: str, precision: str, found: str | None
) -> None:
    if found is not None:
        assert check_precision(precision, dtype, device) == found
        return
    with pytest.raises(ServiceError, match="an empty one lets the server choose") as caught:
        check_precision(precision, dtype, device)
    assert (caught.value.reason, caught.value.field) == ("PRECISION_UNSUPPORTED", "precision")


async def test_the_log_says_once_how_products_are_computed(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    vector = await make(deps, ref)
    with capture_logs() as lines:
        for _ in range(2):
            await operators.apply(deps, ref, [str(vector.name)])
    (line,) = [line for line in lines if line["event"] == "products"]
    assert (line["kind"], line["notes"]) == ("hessian", {"schedule": "by hand"})


async def test_defaults_of_an_operator_are_filled_in(deps: Dependencies) -> None:
    ref = replace(await make_operator(deps), dtype="")
    resolved, micro_batch_size = await operators.describe(deps, ref)
    assert resolved.operator.space.dtype == "float32"
    assert micro_batch_size == 1
    assert resolved.num_parameters == 6
    assert (resolved.operator.kind, resolved.operator.precision) == ("hessian", "full")
