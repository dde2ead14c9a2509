"""What computes nothing is answered while the ranks compute: they stand at a gate here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import psutil
import pytest
from hvp_client.cli.doctor import examine
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.app.transport import start_transport
from hvp_service.calls.names import Name
from hvp_service.checkpoints import service as checkpoints
from hvp_service.checkpoints.store import Checkpoint
from hvp_service.group import service as system
from hvp_service.jobs import service as jobs
from hvp_service.jobs.store import Job
from hvp_service.operators import service as operators
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.state_dir import StateDir
from hvp_service.vectors import service as vectors
from hvp_service.vectors import transfer
from hvp_service.vectors.rows import Vector
from hvp_workers.backend import Tuning
from hvp_workers.group import Group
from hvp_workers.group_backend import GroupBackend
from hvp_workers.inprocess import InProcessGroup
from hvp_workers.ray_group import RayGroup

from tests.client.conftest import save_llama
from tests.service.world import PROJECT, checkpoint_files, create_job, make_batch, plan_job
from tests.workers.gated_engine import gate, waiting

REPOSITORY = Path(__file__).parents[2]
ENGINE = "tests.workers.gated_engine:GatedEngine"
PATIENCE_S = 60.0  # a gate never opens by itself: whoever waits for it waits for ever


@final
@dataclass
class Busy:
    """A service whose ranks stand in the middle of a product."""

    deps: Dependencies
    folder: Path
    checkpoint: Checkpoint
    ref: OperatorRef
    vector: Vector
    product: asyncio.Task[list[Vector]]

    async def create_job(self) -> Job:
        return await create_job(
            self.deps,
            self.ref,
            name=Name(PROJECT, "jobs", "0" * 32),
            which="LA",
            seed=0,
        )


async def make_llama(deps: Dependencies, folder: Path, vocab_size: int) -> Checkpoint:
    save_llama(folder, vocab_size=vocab_size, hidden_size=8)
    names = ("config.json", "model.safetensors")
    files = {name: (folder / name).read_bytes() for name in names}
    return await deps.checkpoints.create(PROJECT, await checkpoint_files(deps, files))


def group_of(kind: str, tuning: Tuning) -> Group:
    if kind == "ray":
        return RayGroup(num_workers=2, device="cpu", tuning=tuning, engine=ENGINE)
    return InProcessGroup("cpu", tuning, engine=ENGINE)


@pytest.fixture(
    params=["inprocess", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)
async def busy(
    request: pytest.FixtureRequest,
    config: ServerConfig,
    state_dir: StateDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Busy]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=":")  # where ranks find the engine
    group = group_of(request.param, Tuning(compile_cache=tmp_path))
    deps = await open_dependencies(config, state_dir, GroupBackend(group))
    checkpoint = await make_llama(deps, tmp_path / "model", vocab_size=19)
    ref = OperatorRef(
        checkpoint=str(checkpoint.name),
        data_batch=str((await make_batch(deps)).name),
        kind="KIND_HESSIAN",
    )
    source = vectors.SeededSource(seed=1, distribution="DISTRIBUTION_GAUSSIAN")
    made = [
        await vectors.create(deps, PROJECT, ref.checkpoint, "float32", source) for _ in range(2)
    ]
    product = asyncio.create_task(operators.apply(deps, ref, [str(made[0].name)]))
    while not all(waiting(tmp_path, rank).exists() for rank in range(group.num_ranks)):
        assert not product.done(), product.result()
        await asyncio.sleep(0.01)
    try:
        yield Busy(deps, tmp_path, checkpoint, ref, made[1], product)
    finally:
        gate(tmp_path).touch()
        await deps.close()


async def test_what_computes_nothing_is_answered_while_a_product_is_under_way(
    busy: Busy, capsys: pytest.CaptureFixture[str]
) -> None:
    deps = busy.deps
    transport = await start_transport(deps)
    try:
        async with asyncio.timeout(PATIENCE_S):
            report = await system.report_group(deps, PROJECT)
            resolved, micro_batch_size = await operators.describe(deps, busy.ref)
            assert not (await plan_job(deps, busy.ref)).problem
            created = await busy.create_job()
            other = await make_llama(deps, busy.folder / "other", vocab_size=23)
            await checkpoints.delete_checkpoint(deps, other.name)
            await deps.vectors.delete(busy.vector.name)
            await jobs.cancel(deps, created.name)
            status = await asyncio.to_thread(
                examine,
                transport.address,
                transport.address,
                state_dir=deps.state_dir.root,
                as_json=True,
            )
        assert not busy.product.done()
    finally:
        gate(busy.folder).touch()
        await transport.stop(0.0)

    assert report.state == "READY"
    assert [rank.rank for rank in report.ranks] == list(range(report.num_ranks))
    assert all(psutil.pid_exists(rank.pid) for rank in report.ranks)
    assert all(rank.resident_bytes > 1 << 20 and rank.num_threads > 0 for rank in report.ranks)
    assert resolved.num_parameters == busy.checkpoint.description.num_parameters
    assert micro_batch_size == (1 if report.num_ranks == 2 else 2)  # of two sequences
    assert (other.description.vocab_size, other.description.architecture) == (
        23,
        "LlamaForCausalLM",
    )
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("[\n") :])  # behind the server's log
    findings = {finding["what"]: finding for finding in found}
    assert findings["server"]["verdict"] == "ok"
    assert status in (0, 1)  # 1 where something of this machine is in the way

    (product,) = await busy.product
    taken = [piece async for piece in transfer.read(deps, product.name, 0, 0)]
    elements = np.frombuffer(b"".join(piece.data for piece in taken), np.float32)
    assert np.isfinite(elements).all()
