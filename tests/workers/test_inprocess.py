"""The law of a group, held by the one rank that is a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from typing import Any, final

import pytest
from hvp_workers.backend import BackendError, GroupLostError, Tuning
from hvp_workers.inprocess import InProcessGroup
from hvp_workers.rank_process import loading_modules


@final
class Engine:
    """What these tests ask of a rank."""

    def __init__(self) -> None:
        self.began, self.gate = threading.Event(), threading.Event()
        self.noted: list[int] = []

    def compute(self) -> str:
        self.began.set()
        assert self.gate.wait(60)
        return "done"

    def note(self, value: int) -> int:
        self.noted.append(value)
        return value

    def fail(self) -> None:
        raise KeyError("anything")

    def refuse(self) -> None:
        raise BackendError("NON_FINITE", "As asked.")


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def group(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> InProcessGroup:
    group = InProcessGroup("cpu", Tuning())
    monkeypatch.setattr(group, "_make_engine", lambda: engine)
    return group


async def test_a_start_that_failed_can_be_made_again(
    group: InProcessGroup, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError("no space left on device")]

    def make() -> Engine:
        if failures:
            raise failures.pop()
        return engine

    monkeypatch.setattr(group, "_make_engine", make)
    with pytest.raises(GroupLostError, match="no space left") as failure:
        await group.start()
    assert failure.value.reason == "WORKER_GROUP_START_FAILED"
    assert "in make" in failure.value.trace
    with pytest.raises(GroupLostError, match="not running"):
        await group.run("note", 0)
    await group.start()
    assert await group.run("note", 1) == [1]
    await group.close()


async def test_an_error_nobody_thought_of_carries_the_thread_s_traceback_and_a_refusal_is_itself(
    group: InProcessGroup,
) -> None:
    await group.start()
    with pytest.raises(BackendError, match="KeyError") as failure:
        await group.run("fail")
    assert failure.value.reason == "INTERNAL"
    assert "in fail" in failure.value.trace
    with pytest.raises(BackendError, match="NON_FINITE") as failure:
        await group.run("refuse")
    assert failure.value.trace == ""
    await group.close()


async def test_closing_ends_calls_for_their_callers_though_one_still_computes(
    group: InProcessGroup, engine: Engine
) -> None:
    await group.start()
    computing: Any = asyncio.ensure_future(group.run("compute"))
    behind: Any = asyncio.ensure_future(group.run("note", 1))
    assert await asyncio.to_thread(engine.began.wait, 30)
    (rank_thread,) = [thread for thread in threading.enumerate() if thread.name == "hvp-rank"]
    assert rank_thread.daemon  # a process may end while it computes
    await asyncio.wait_for(group.close(), 30)
    for call in (computing, behind):
        with pytest.raises(GroupLostError):
            await call
    engine.gate.set()
    await asyncio.to_thread(rank_thread.join, 30)
    assert engine.noted == []  # nobody waited for it any more
    await group.close()
    with pytest.raises(GroupLostError):
        await group.run("note", 2)


async def test_a_caller_who_goes_away_does_not_take_the_rank_out_of_step(
    group: InProcessGroup, engine: Engine
) -> None:
    await group.start()
    leaving = asyncio.ensure_future(group.run("compute"))
    waiting = asyncio.ensure_future(group.run("note", 1))
    assert await asyncio.to_thread(engine.began.wait, 30)
    leaving.cancel()
    waiting.cancel()
    engine.gate.set()
    assert await group.run("note", 2) == [2]
    assert engine.noted == [1, 2]
    await group.close()
    assert "hvp-rank" not in [thread.name for thread in threading.enumerate()]


def test_the_garbage_collector_rests_only_while_modules_are_loaded() -> None:
    for before in (True, False):
        gc.enable() if before else gc.disable()
        try:
            with contextlib.suppress(ImportError), loading_modules():
                assert not gc.isenabled()
                raise ImportError
            assert gc.isenabled() == before
        finally:
            gc.enable()
