"""Connections that break in the middle, against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hvp_client import AsyncClient, JobCancelledError, Operator, Retry
from numpy.typing import NDArray

from tests.client.conftest import Server, save_llama
from tests.client.proxy import Proxy

MIB = 1 << 20


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 48 MiB, nearly all of it one table."""
    return save_llama(tmp_path_factory.mktemp("large"), vocab_size=98_304, hidden_size=128)


async def test_an_upload_goes_on_where_it_was_cut(server: Server, large_dir: Path) -> None:
    size_bytes = (large_dir / "model.safetensors").stat().st_size
    done: list[int] = []
    async with (
        # The server makes bytes durable every 16 MiB at the latest.
        Proxy(server.address, cuts=[20 * MIB, 30 * MIB]) as proxy,
        AsyncClient(proxy.address, retry=Retry(patience_s=30)) as client,
    ):
        checkpoint = await client.upload_checkpoint(large_dir, lambda d, _: done.append(d))
        assert checkpoint.state == "ACTIVE"
        assert proxy.cuts == []
        assert done[-1] == checkpoint.size_bytes > size_bytes
        # Sent anew each time it would have been 20 + 10 + 48 MiB.
        assert proxy.sent_bytes < size_bytes + 30 * MIB - 8 * MIB
        before = proxy.sent_bytes
        assert await client.upload_checkpoint(large_dir) == checkpoint
        assert proxy.sent_bytes - before < 64 << 10


async def test_a_vector_that_was_cut_on_its_way_arrives_whole(
    server: Server, large_dir: Path
) -> None:
    async with AsyncClient(server.address) as direct:
        checkpoint = await direct.upload_checkpoint(large_dir)
        batch = await direct.upload_batch({"input_ids": [[1, 2, 3]]})
        array = np.random.default_rng(0).standard_normal(checkpoint.num_parameters)
        async with (
            Proxy(server.address, cuts=[10 * MIB]) as proxy,
            AsyncClient(proxy.address, retry=Retry(patience_s=30)) as client,
        ):
            H = await client.operator(checkpoint, batch)
            vector = await H.vector(array)
            assert proxy.cuts == []
            proxy.cuts = [proxy.sent_bytes + 1000]  # acknowledgements of what is read count too
            np.testing.assert_array_equal(await vector.numpy(), array.astype(np.float32))
            await vector.delete()


async def test_a_watcher_that_was_cut_off_misses_nothing_and_sees_nothing_twice(
    server: Server, llama_dir: Path, input_ids: NDArray[np.int64]
) -> None:
    async with (
        Proxy(server.address) as proxy,
        AsyncClient(proxy.address, retry=Retry(job_patience_s=30)) as client,
    ):
        checkpoint = await client.upload_checkpoint(llama_dir)
        batch = await client.upload_batch({"input_ids": input_ids})
        H = await client.operator(checkpoint, batch, dtype="float64")
        job = await H.eigsh(k=2, tol=1e-300, max_products=40)
        sequences = []
        before = proxy.num_connections
        async for event in job.watch():
            sequences.append(event.sequence)
            if event.sequence in (2, 5, 8):
                proxy.cut()
        assert sequences == list(range(1, len(sequences) + 1))
        assert job.state == "SUCCEEDED"
        assert proxy.num_connections > before
        later = [event.sequence async for event in job.watch(after_sequence=4)]
        assert later == sequences[4:]
        assert [event async for event in job.watch(after_sequence=sequences[-1])] == []


WATCHERS = """
import asyncio, sys
import grpc.aio
from hvp_protos.v1 import job_pb2, job_pb2_grpc

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        jobs = job_pb2_grpc.JobServiceStub(channel)
        watches = [jobs.WatchJob(job_pb2.WatchJobRequest(name=sys.argv[2])) for _ in range(30)]
        for watch in watches:
            await watch.read()
        for watch in watches[::2]:
            watch.cancel()
        waits = [jobs.WaitJob(job_pb2.WaitJobRequest(name=sys.argv[2])) for _ in range(30)]
        await jobs.GetJob(job_pb2.GetJobRequest(name=sys.argv[2]))
        print("all are on", flush=True)
        await asyncio.gather(*waits)

asyncio.run(main())
"""


def test_a_server_outlives_the_watchers_of_clients_that_are_killed(
    server: Server, H: Operator
) -> None:
    job = H.eigsh(k=2, which="SA", tol=1e-15, max_products=10**6, num_lanczos_vectors=12)
    for _ in range(3):
        command = [sys.executable, "-c", WATCHERS, server.address, job.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as watching:
            assert watching.stdout is not None
            assert watching.stdout.readline() == b"all are on\n"
            watching.kill()
    job.cancel()
    with pytest.raises(JobCancelledError):
        job.result()
    assert server.process.poll() is None
