"""A whole service without a socket, and what tests put into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
from hvp_service.app.dependencies import Dependencies
from hvp_service.batches.store import DataBatch
from hvp_service.blobs.store import Digest
from hvp_service.calls.names import Name
from hvp_service.checkpoints.store import Checkpoint, CheckpointFile
from hvp_service.jobs import service as jobs
from hvp_service.jobs.plan import Plan
from hvp_service.jobs.store import Job
from hvp_service.operators.resolver import OperatorRef
from hvp_service.uploads.chunks import Chunk
from hvp_service.uploads.rows import Upload
from numpy.typing import NDArray
from safetensors.numpy import save

PROJECT = "default"
CONFIG = json.dumps({"model_type": "quadratic"}).encode()


def digest(data: bytes) -> Digest:
    """Of some bytes."""
    return Digest(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


async def chunks(
    upload: Upload, data: bytes, *, start: int = 0, size: int = 1000, finish: bool = True
) -> AsyncIterator[Chunk]:
    """A stream of the data from `start`."""
    for offset in range(start, max(len(data), start + 1), size):
        part = data[offset : offset + size]
        yield Chunk(
            upload=str(upload.name),
            write_offset=offset,
            data=part,
            crc32c=google_crc32c.value(part),
            finish=finish and offset + size >= len(data),
        )


async def upload(deps: Dependencies, data: bytes) -> Digest:
    """Make a blob."""
    started = await deps.uploads.start(PROJECT, digest(data))
    if started.blob is None:
        await deps.uploads.write(chunks(started, data, size=1 << 16))
    return digest(data)


def quadratic(n: int = 6, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Tensors of a checkpoint with eigenvalues 1..n."""
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.standard_normal((n, n)))
    matrix = rotation @ np.diag(np.arange(1.0, n + 1)) @ rotation.T
    return {"A": (matrix + matrix.T) / 2, "theta": generator.standard_normal(n)}


async def checkpoint_files(deps: Dependencies, files: Mapping[str, bytes]) -> list[CheckpointFile]:
    """Upload files for a checkpoint."""
    return [
        CheckpointFile(path=path, digest=await upload(deps, data)) for path, data in files.items()
    ]


async def make_checkpoint(deps: Dependencies, n: int = 6, seed: int = 0) -> Checkpoint:
    """A quadratic model."""
    files = await checkpoint_files(
        deps, {"config.json": CONFIG, "model.safetensors": save(quadratic(n, seed))}
    )
    return await deps.checkpoints.create(PROJECT, files)


async def make_batch(
    deps: Dependencies, tensors: Mapping[str, NDArray[Any]] | None = None
) -> DataBatch:
    """Two sequences of four tokens, or the tensors given."""
    data = save(dict(tensors or {"input_ids": np.arange(8, dtype=np.int64).reshape(2, 4)}))
    return await deps.batches.create(PROJECT, await upload(deps, data))


async def make_operator(deps: Dependencies, n: int = 6) -> OperatorRef:
    """The Hessian of a quadratic model in float64."""
    checkpoint, batch = await make_checkpoint(deps, n), await make_batch(deps)
    return OperatorRef(
        checkpoint=str(checkpoint.name),
        data_batch=str(batch.name),
        kind="KIND_HESSIAN",
        dtype="float64",
    )


async def create_job(
    deps: Dependencies,
    ref: OperatorRef,
    *,
    request_id: str = "",
    name: Name | None = None,
    operation: str | None = "eigsh",
    labels: Mapping[str, str] | None = None,
    extends: str = "",
    **values: Any,
) -> Job:
    """Queue a job, by default the search for two eigenvalues from both ends."""
    usual = {"k": 2, "which": "BE", "seed": 1} if operation == "eigsh" else {}
    created, _ = await jobs.create(
        deps,
        name or Name(PROJECT, "jobs", jobs.job_id(PROJECT, request_id)),
        operation=operation,
        operator=ref,
        values={**usual, **values},
        labels=labels or {},
        validate_only=False,
        extends=extends,
    )
    return created


async def plan_job(deps: Dependencies, ref: OperatorRef, **values: Any) -> Plan:
    """What a search for eigenvalues would take."""
    _, planned = await jobs.create(
        deps,
        Name(PROJECT, "jobs", jobs.job_id(PROJECT, "")),
        operation="eigsh",
        operator=ref,
        values={"k": 2, "which": "BE", "seed": 1, **values},
        labels={},
        validate_only=True,
    )
    return planned
