"""Checkpoints and data batches: what is taken and what is refused, with which reason."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hvp_service.app.dependencies import Dependencies
from hvp_service.batches import service as batches
from hvp_service.blobs.store import Digest
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name
from hvp_service.checkpoints import service as checkpoints
from hvp_service.checkpoints.store import CheckpointFile
from hvp_workers.backend import BackendError
from safetensors.numpy import save

from tests.service.world import (
    CONFIG,
    PROJECT,
    checkpoint_files,
    digest,
    make_batch,
    make_checkpoint,
    quadratic,
    upload,
)

MODEL = save(quadratic())


def config(**values: Any) -> bytes:
    return json.dumps({"model_type": "quadratic"} | values).encode()


def index(**weight_map: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


async def reason_for(deps: Dependencies, files: dict[str, bytes]) -> ServiceError | BackendError:
    uploaded = await checkpoint_files(deps, files)
    with pytest.raises((ServiceError, BackendError)) as caught:
        await deps.checkpoints.create(PROJECT, uploaded)
    assert not list((deps.state_dir.root / "checkpoints").iterdir())  # nothing is left behind
    error = caught.value
    assert isinstance(error, ServiceError | BackendError)
    return error


async def test_the_same_files_are_the_same_checkpoint(deps: Dependencies) -> None:
    first = await make_checkpoint(deps)
    second = await make_checkpoint(deps)
    other = await make_checkpoint(deps, seed=1)
    assert first == second
    assert other.name != first.name
    assert first.description.num_parameters == 6
    assert (await deps.checkpoints.get(first.name)) == first


async def test_a_sharded_checkpoint_with_its_index_is_taken(deps: Dependencies) -> None:
    tensors = quadratic()
    files = {
        "config.json": CONFIG,
        "a-00001.safetensors": save({"theta": tensors["theta"]}),
        "a-00002.safetensors": save({"A": tensors["A"]}),
        "model.safetensors.index.json": index(
            A="a-00002.safetensors", theta="a-00001.safetensors", head="a-00001.safetensors"
        ),
    }
    made = await deps.checkpoints.create(PROJECT, await checkpoint_files(deps, files))
    assert len(made.files) == 4


async def test_files_that_are_no_part_of_the_model_are_left_out_and_named(
    deps: Dependencies,
) -> None:
    plain = await make_checkpoint(deps)
    stale = {
        "a-00001.safetensors": b"old",
        "consolidated.safetensors": b"another",
        "model.safetensors.index.json": index(A="a-00001.safetensors"),
    }
    files = {"config.json": CONFIG, "model.safetensors": MODEL} | stale
    made = await deps.checkpoints.create(PROJECT, await checkpoint_files(deps, files))
    assert made.ignored_files == tuple(sorted(stale))
    assert made.name == plain.name
    assert {file.path for file in made.files} == {"config.json", "model.safetensors"}
    folder = deps.state_dir.checkpoint(made.name.id)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model.safetensors": MODEL}, "CHECKPOINT_FILES_INVALID"),
        ({"config.json": CONFIG}, "CHECKPOINT_FILES_INVALID"),
        ({"config.json": CONFIG, "m.safetensors": MODEL, "x.py": b""}, "CHECKPOINT_FILES_INVALID"),
        ({"config.json": CONFIG, "../m.safetensors": MODEL}, "CHECKPOINT_FILES_INVALID"),
        ({"config.json": CONFIG, "a/m.safetensors": MODEL}, "CHECKPOINT_FILES_INVALID"),
        (
            {"config.json": CONFIG, "a.safetensors": MODEL, "b.safetensors": MODEL},
            "CHECKPOINT_FILES_INVALID",
        ),
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, "PICKLE_REFUSED"),
        ({"config.json": CONFIG, "m.safetensors": pickle.dumps([1])}, "PICKLE_REFUSED"),
        ({"config.json": CONFIG, "m.safetensors": b"PK\x03\x04" + bytes(9)}, "PICKLE_REFUSED"),
        ({"config.json": CONFIG, "m.safetensors": b"hello"}, "SAFETENSORS_INVALID"),
        ({"config.json": CONFIG, "m.safetensors": MODEL[:-1]}, "SAFETENSORS_INVALID"),
        ({"config.json": CONFIG, "m.safetensors": MODEL + b"x"}, "SAFETENSORS_INVALID"),
        ({"config.json": b"[]", "m.safetensors": MODEL}, "CONFIG_INVALID"),
        ({"config.json": b"{", "m.safetensors": MODEL}, "CONFIG_INVALID"),
        ({"config.json": b"{}", "m.safetensors": MODEL}, "CONFIG_INVALID"),
        ({"config.json": config(a=[[]] * 100_001), "m.safetensors": MODEL}, "CONFIG_INVALID"),
        (
            {"config.json": config(num_hidden_layers=10**9), "m.safetensors": MODEL},
            "CONFIG_INVALID",
        ),
        ({"config.json": config(vocab_size=-1), "m.safetensors": MODEL}, "CONFIG_INVALID"),
        ({"config.json": config(hidden_size="8"), "m.safetensors": MODEL}, "CONFIG_INVALID"),
        (
            {
                "config.json": config(quantization_config={"quant_method": "gptq"}),
                "model.safetensors": MODEL,
            },
            "QUANTIZATION_UNSUPPORTED",
        ),
        (
            {
                "config.json": CONFIG,
                "a.safetensors": MODEL,
                "model.safetensors.index.json": b"{}",
            },
            "CHECKPOINT_FILES_INVALID",
        ),
        (
            {
                "config.json": CONFIG,
                "a.safetensors": MODEL,
                "model.safetensors.index.json": index(A="other.safetensors"),
            },
            "CHECKPOINT_FILES_INVALID",
        ),
        (
            {
                "config.json": json.dumps({"model_type": "unheard"}).encode(),
                "model.safetensors": MODEL,
            },
            "ARCHITECTURE_UNKNOWN",
        ),
        (
            {"config.json": CONFIG, "model.safetensors": save({"A": np.eye(3)})},
            "TENSOR_MISSING",
        ),
    ],
)
async def test_a_bad_checkpoint_is_refused_and_leaves_nothing(
    deps: Dependencies, files: dict[str, bytes], reason: str
) -> None:
    assert (await reason_for(deps, files)).reason == reason


async def test_a_lying_header_is_refused_with_file_tensor_and_offset(deps: Dependencies) -> None:
    size = int.from_bytes(MODEL[:8], "little")
    header = json.loads(MODEL[8 : 8 + size])
    header["theta"]["data_offsets"][1] += 8
    raw = json.dumps(header).encode()
    lying = len(raw).to_bytes(8, "little") + raw + MODEL[8 + size :]
    error = await reason_for(deps, {"config.json": CONFIG, "model.safetensors": lying})
    assert error.reason == "SAFETENSORS_INVALID"
    assert error.metadata["file"] == "model.safetensors"
    assert error.metadata["field"] == "theta.data_offsets"
    assert lying[int(error.metadata["byte_offset"]) :].startswith(b'"theta"')


async def test_a_checkpoint_of_blobs_that_are_not_there_is_refused(deps: Dependencies) -> None:
    files = [
        CheckpointFile(path="config.json", digest=digest(b"away")),
        CheckpointFile(path="m.safetensors", digest=digest(b"too")),
    ]
    with pytest.raises(ServiceError, match="INPUT_MISSING"):
        await deps.checkpoints.create(PROJECT, files)


async def test_a_deleted_checkpoint_is_gone_with_its_vectors(deps: Dependencies) -> None:
    from hvp_service.vectors import service as vectors

    checkpoint = await make_checkpoint(deps)
    vector = await vectors.create(
        deps, PROJECT, str(checkpoint.name), "float64", vectors.ZerosSource()
    )
    await checkpoints.delete_checkpoint(deps, checkpoint.name)
    for work in (deps.checkpoints.get(checkpoint.name), deps.vectors.get(vector.name)):
        with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
            await work
    assert not deps.state_dir.checkpoint(checkpoint.name.id).exists()
    assert await make_checkpoint(deps)


def ids(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape)


async def test_the_statistics_count_what_the_loss_counts(deps: Dependencies) -> None:
    labels = ids(2, 4)
    labels[0, 0] = 63  # the first label is shifted out: neither counted nor looked at
    labels[1, 2:] = -100
    batch = await make_batch(
        deps,
        {
            "input_ids": ids(2, 4),
            "labels": labels,
            "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
        },
    )
    found = batch.statistics
    assert (found.num_sequences, found.sequence_length) == (2, 4)
    assert found.num_targets == 4
    assert found.max_token_id == 7
    assert found.has_attention_mask
    assert await deps.batches.get(batch.name) == batch


async def test_labels_default_to_the_ids_that_are_no_padding(deps: Dependencies) -> None:
    assert (await make_batch(deps, {"input_ids": ids(3, 5)})).statistics.num_targets == 12
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = await make_batch(deps, {"input_ids": ids(3, 5), "attention_mask": mask})
    assert padded.statistics.num_targets == 2 + 2 + 4


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"input_ids": ids(2, 4), "no name": ids(2, 4)}, "BATCH_FIELD_INVALID"),
        ({"x": np.array([[0.5, np.nan]])}, "BATCH_FIELD_INVALID"),
        ({"input_ids": ids(2, 4), "extra": ids(3, 4)}, "SHAPE_MISMATCH"),
        ({"input_ids": ids(2, 4).astype(np.int32)}, "BATCH_FIELD_INVALID"),
        ({"input_ids": ids(2, 4), "labels": ids(4, 2)}, "SHAPE_MISMATCH"),
        ({"input_ids": ids(0, 4)}, "BATCH_EMPTY"),
        ({"input_ids": ids(4, 0)}, "BATCH_EMPTY"),
    ],
)
async def test_a_bad_batch_is_refused(
    deps: Dependencies, tensors: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        await make_batch(deps, tensors)
    assert caught.value.reason == reason


async def test_a_batch_may_call_any_tensor_input_ids(deps: Dependencies) -> None:
    for values in (ids(8), -ids(2, 4), ids(2, 4) / 3, ids(2, 3, 4), ids(3, 1)):
        tensors = {"input_ids": values, "labels": values, "attention_mask": values}
        made = (await make_batch(deps, tensors)).statistics
        assert made.num_sequences == len(values)
        tokens = values.ndim == 2 and values.dtype == np.int64
        assert made.sequence_length == (values.shape[1] if tokens else 0)


async def test_labels_that_count_only_in_the_first_column_are_no_targets(
    deps: Dependencies,
) -> None:
    labels = ids(2, 4) * 0 - 100
    labels[:, 0] = 1
    made = await make_batch(deps, {"input_ids": ids(2, 4), "labels": labels})
    assert made.statistics.num_targets == 0


@pytest.mark.parametrize("content", [b"", b"not it", pickle.dumps([1]), b"PK\x03\x04" + bytes(10)])
async def test_a_batch_that_is_no_safetensors_file_is_refused(
    deps: Dependencies, content: bytes
) -> None:
    blob = await upload(deps, content)
    with pytest.raises(ServiceError, match="SAFETENSORS_INVALID"):
        await deps.batches.create(PROJECT, blob)


async def test_a_batch_of_a_blob_that_is_not_there_is_refused(deps: Dependencies) -> None:
    with pytest.raises(ServiceError, match="INPUT_MISSING"):
        await deps.batches.create(PROJECT, Digest(sha256="0" * 64, size_bytes=1))


async def test_unknown_names_are_not_found(deps: Dependencies) -> None:
    for work in (
        deps.checkpoints.get(Name(PROJECT, "checkpoints", "nothing")),
        deps.batches.get(Name(PROJECT, "dataBatches", "nothing")),
        batches.delete_batch(deps, Name(PROJECT, "dataBatches", "nothing")),
        checkpoints.delete_checkpoint(deps, Name(PROJECT, "checkpoints", "nothing")),
    ):
        with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
            await work
