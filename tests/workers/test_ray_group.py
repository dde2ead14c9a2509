"""The law of a group, held by real Ray actors: all ranks answer alike, or all are ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from hvp_workers.backend import BackendError, GroupLostError, Tuning
from hvp_workers.ray_cluster import RayCluster
from hvp_workers.ray_facts import rank_infos
from hvp_workers.ray_gang import Patience
from hvp_workers.ray_group import RayGroup

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
TUNING = Tuning(compile_cache=REPOSITORY / "compile-cache")  # nothing is compiled here
PATIENCE = Patience(start_s=60, command_s=60, straggler_s=2, leave_s=5)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for the module; groups find it and leave it running."""
    with pytest.MonkeyPatch.context() as patch:
        # Where ranks find the engine below, and the packages that are tested.
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        shared = RayCluster(num_ranks=3, device="cpu", run_dir=None)
        shared.open()
        yield
        shared.close()


def group_of(num_workers: int, patience: Patience = PATIENCE) -> RayGroup:
    return RayGroup(
        num_workers=num_workers,
        device="cpu",
        tuning=TUNING,
        engine="tests.workers.gang_engine:GangEngine",
        patience=patience,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[RayGroup]:
    """Two ranks, kept for the tests after which a group lives on or can be started again."""
    group = group_of(2)
    yield group
    await group.close()


def segments_of(generation: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"hvp-{generation}*"))  # noqa: S108 - the kernel's name


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("num_workers", [1, 3])
async def test_collectives_agree_on_every_rank(num_workers: int) -> None:
    group = group_of(num_workers)
    try:
        await group.start()
        weight = num_workers * (num_workers + 1) / 2  # sum of rank + 1
        assert await group.run("total", [1.0, -2.0]) == [[weight, -2 * weight]] * num_workers
        gathered = [float(rank) for rank in range(num_workers) for _ in range(2)]
        assert await group.run("gather", 2) == [gathered] * num_workers
        pids = await group.run("pid")
    finally:
        await group.close()
    assert len(set(pids)) == num_workers
    assert os.getpid() not in pids
    assert all(has_ended(pid) for pid in pids)
    assert segments_of(group.generation) == []


@pytest.mark.asyncio(loop_scope="module")
class TestPair:
    """Two ranks, started again where a test has ended them."""

    async def test_start_is_idempotent_while_the_ranks_live(self, pair: RayGroup) -> None:
        assert pair.generation == ""
        await pair.start()
        generation, pids = pair.generation, await pair.run("pid")
        await pair.start()
        assert pair.generation == generation != ""
        assert await pair.run("pid") == pids

    async def test_ranks_are_listed_while_they_compute_from_here_and_from_elsewhere(
        self, pair: RayGroup
    ) -> None:
        await pair.start()
        pids = await pair.run("pid")
        call = asyncio.ensure_future(pair.run("append", 1, 1.0))
        here = await pair.ranks()
        assert not call.done()
        assert pair._gang is not None
        elsewhere = await rank_infos(pair._gang._members, here="another machine")
        for found in (here, elsewhere):
            assert [(rank.rank, rank.pid) for rank in found] == list(enumerate(pids))
            assert all(rank.resident_bytes > 1 << 20 for rank in found)
        num_threads = max(1, len(os.sched_getaffinity(0)) // 2)
        assert [rank.num_threads for rank in here] == [num_threads] * 2
        await call

    async def test_ranks_share_the_cores_of_their_machine(self, pair: RayGroup) -> None:
        await pair.start()
        num_threads = max(1, len(os.sched_getaffinity(0)) // 2)
        assert await pair.run("threads") == [num_threads] * 2
        (compiling,) = (await pair.run("environment", "TORCHINDUCTOR_COMPILE_THREADS"))[0]
        assert compiling == str(num_threads)

    async def test_ranks_compile_into_the_folder_they_were_given(self, pair: RayGroup) -> None:
        await pair.start()
        found = await pair.run("environment", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        folder = REPOSITORY / "compile-cache"
        assert found == [[str(folder / "inductor"), str(folder / "triton")]] * 2

    async def test_what_every_rank_refuses_is_raised_whole_and_the_group_lives_on(
        self, pair: RayGroup
    ) -> None:
        await pair.start()
        generation = pair.generation
        with pytest.raises(BackendError) as refusal:
            await pair.run("fail_on", [0, 1], "NON_FINITE")
        assert type(refusal.value) is BackendError
        assert refusal.value.reason == "NON_FINITE"
        assert refusal.value.metadata == {"layer": "block 3"}
        assert await pair.run("total", [1.0]) == [[3.0], [3.0]]
        assert pair.generation == generation

    async def test_an_error_nobody_thought_of_carries_the_rank_s_traceback(
        self, pair: RayGroup
    ) -> None:
        await pair.start()
        with pytest.raises(BackendError, match="ZeroDivisionError") as failure:
            await pair.run("crash")
        assert failure.value.reason == "INTERNAL"
        assert "in crash" in failure.value.trace
        assert "in crash" not in str(failure.value.metadata)

    async def test_an_answer_that_cannot_be_sent_is_an_error_and_no_loss(
        self, pair: RayGroup
    ) -> None:
        await pair.start()
        with pytest.raises(BackendError, match="pickle") as failure:
            await pair.run("unsendable")
        assert failure.value.reason == "INTERNAL"
        assert await pair.run("total", [1.0]) == [[3.0], [3.0]]

    async def test_concurrent_calls_run_in_the_same_order_on_every_rank(
        self, pair: RayGroup
    ) -> None:
        await pair.start()
        already = len((await pair.run("history"))[0])
        answers = await asyncio.gather(
            *(pair.run("append", value, 0.01 * (value % 3)) for value in range(12))
        )
        assert answers == [[[3 * value]] * 2 for value in range(12)]
        histories = await pair.run("history")
        assert [history[already:] for history in histories] == [list(range(12))] * 2

    async def test_a_caller_that_goes_away_does_not_take_the_ranks_out_of_step(
        self, pair: RayGroup
    ) -> None:
        await pair.start()
        caller = asyncio.ensure_future(pair.run("append", 100, 0.3))
        waiting = asyncio.ensure_future(pair.run("append", 101, 0.0))
        await asyncio.sleep(0.1)
        caller.cancel()
        waiting.cancel()
        assert await pair.run("append", 102, 0.0) == [[306], [306]]
        histories = await pair.run("history")
        assert [history[-2:] for history in histories] == [[100, 102]] * 2

    @pytest.mark.parametrize("victim", [0, 1])
    async def test_a_killed_rank_ends_the_group_and_the_next_generation_answers(
        self, pair: RayGroup, victim: int
    ) -> None:
        await pair.start()
        generation, pids = pair.generation, await pair.run("pid")
        call = asyncio.ensure_future(pair.run("append", 7, 60.0))  # rank 0 waits in a collective
        await asyncio.sleep(0.3)
        os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(GroupLostError) as loss:
            await call
        assert loss.value.reason == "WORKER_GROUP_LOST"
        assert loss.value.metadata["rank"] == str(victim)
        assert loss.value.metadata["pid"] == str(pids[victim])
        assert all(has_ended(pid) for pid in pids)
        with pytest.raises(GroupLostError, match="not running"):
            await pair.run("pid")

        await pair.start()
        assert pair.generation not in ("", generation)
        assert await pair.run("total", [1.0]) == [[3.0], [3.0]]

    async def test_calls_that_wait_when_a_rank_dies_all_hear_of_the_loss(
        self, pair: RayGroup
    ) -> None:
        await pair.start()
        calls = [pair.run("exit_on", 1), pair.run("pid"), pair.run("pid")]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [GroupLostError] * 3

    @pytest.mark.parametrize(
        ("method", "arguments", "blamed"),
        [("fail_on", ([1], "NON_FINITE"), "1"), ("fail_apart", (), "0")],
        ids=["one rank while the other waits", "each rank for its own reason"],
    )
    async def test_ranks_that_do_not_fail_alike_are_ended(
        self, pair: RayGroup, method: str, arguments: tuple[object, ...], blamed: str
    ) -> None:
        await pair.start()
        pids = await pair.run("pid")
        with pytest.raises(GroupLostError, match=r"rank 1 raised NON_FINITE") as loss:
            await pair.run(method, *arguments)
        assert loss.value.metadata["rank"] == blamed
        assert all(has_ended(pid) for pid in pids)


async def test_closing_ends_a_call_that_runs_and_its_caller_hears_of_it() -> None:
    group = group_of(1, Patience(leave_s=0.5))
    await group.start()
    (pid,) = await group.run("pid")
    call = asyncio.ensure_future(group.run("sleep", 600.0))
    await asyncio.sleep(0.2)
    await group.close()
    with pytest.raises(GroupLostError):
        await call
    assert has_ended(pid)
    await group.close()


def test_a_program_can_join_a_running_cluster_and_leaves_it_running(tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    nodes = ray.nodes()
    joined = subprocess.run(
        [sys.executable, "-m", "tests.workers.gang_driver", str(tmp_path), "lose"],
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    assert json.loads(joined.stdout) == {"kept": True, "left": []}
    assert [node["NodeID"] for node in ray.nodes()] == [node["NodeID"] for node in nodes]
    assert list(tmp_path.iterdir()) == []  # no note: the cluster is not this program's


async def test_a_stopped_rank_is_given_up_after_the_command_s_time_and_killed() -> None:
    group = group_of(2, Patience(start_s=60, command_s=2, straggler_s=2, leave_s=2))
    try:
        await group.start()
        pids = await group.run("pid")
        os.kill(pids[1], signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(GroupLostError, match=r"rank 1 .*stopped.*no answer to `total`"):
            await group.run("total", [1.0])
        assert time.monotonic() - started >= 2
        assert all(has_ended(pid) for pid in pids)
    finally:
        await group.close()


async def test_a_group_too_large_for_the_cluster_says_what_to_change_and_leaves_nothing() -> None:
    import ray

    def held() -> set[str]:
        table = ray.util.placement_group_table() if ray.is_initialized() else {}
        return {name for name, entry in table.items() if entry["state"] != "REMOVED"}

    before = held()  # by another test's group
    group = group_of(9, Patience(start_s=1))
    with pytest.raises(GroupLostError, match=r"9 workers did not start.*--workers") as failure:
        await group.start()
    assert failure.value.reason == "WORKER_GROUP_START_FAILED"
    assert held() <= before
    await group.close()


async def test_an_engine_that_cannot_be_built_is_reported_by_name_and_its_ranks_end() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    group = RayGroup(num_workers=1, device="cpu", engine="hvp_workers.nowhere:Engine")
    with pytest.raises(GroupLostError, match=r"ModuleNotFoundError.*hvp_workers\.nowhere"):
        await group.start()
    ranks = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.pid not in before and not has_ended(child.pid) and "Rank" in child.name()
    ]
    assert ranks == []
    await group.close()


async def test_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(GroupLostError, match="RAY_ADDRESS"):
        RayCluster(num_ranks=1, device="cpu", run_dir=None).open()


def test_a_group_without_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RayGroup(num_workers=0, device="cpu")


def test_a_time_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Patience(command_s=0)
