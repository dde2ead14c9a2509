"""The thread behind blocking clients."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hvp_client.blocking.portal import Portal

from tests.client.conftest import Server


async def nothing() -> None:
    return None


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "hvp-client"]


async def double(x: int) -> int:
    await asyncio.sleep(0.001)
    return 2 * x


def test_portals_share_one_thread_which_ends_with_the_last_of_them() -> None:
    one, two = Portal(nothing), Portal(nothing)
    assert len(thread_names()) == 1
    one.close()
    assert two.run(double(2)) == 4
    two.close()
    assert thread_names() == []


def test_many_threads_may_use_one_portal_at_once() -> None:
    portal = Portal(nothing)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda x: portal.run(double(x)), range(40))) == list(range(0, 80, 2))
    portal.close()


def test_a_forgotten_portal_is_closed() -> None:
    closed = threading.Event()

    async def close() -> None:
        closed.set()

    portal = Portal(close)
    assert portal.run(double(1)) == 2
    del portal
    gc.collect()
    assert closed.is_set()
    assert thread_names() == []


def test_a_blocking_call_on_the_loops_own_thread_is_an_error_and_not_a_deadlock() -> None:
    portal = Portal(nothing)

    async def from_a_callback() -> int:
        return portal.run(double(1))

    with pytest.raises(RuntimeError, match="callback"):
        portal.run(from_a_callback())
    portal.close()


def test_an_iteration_that_is_given_up_closes_its_stream() -> None:
    portal = Portal(nothing)
    closed = threading.Event()

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            for number in range(100):
                yield number
        finally:
            closed.set()

    for number in portal.iterate(numbers()):
        if number == 3:
            break
    gc.collect()
    assert closed.is_set()
    portal.close()


def test_an_interrupt_before_a_step_is_waited_for_ends_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C may come between handing the step to the loop and waiting for it."""
    portal = Portal(nothing)
    closed = threading.Event()

    async def endless() -> AsyncGenerator[int, None]:
        try:
            yield 0
            await asyncio.sleep(600)
        finally:
            closed.set()

    def interrupted(step: Coroutine[Any, Any, Any]) -> Any:
        portal._thread.submit(step)
        raise KeyboardInterrupt

    stream = portal.iterate(endless())
    assert next(stream) == 0
    with monkeypatch.context() as patch:
        patch.setattr(portal, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert closed.is_set()
    portal.close()


def test_a_program_that_forgets_to_close_still_ends_in_silence() -> None:
    code = "from hvp_client import Client; client = Client('127.0.0.1:1'); print(client)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "<Client 127.0.0.1:1>\n"
    assert done.stderr == ""


def test_an_iteration_taken_through_a_fork_ends_instead_of_hanging() -> None:
    code = """
import os
from hvp_client import FailedPreconditionError
from hvp_client.blocking.portal import Portal

async def close():
    pass

async def numbers():
    yield 1
    yield 2

portal = Portal(close)
iteration = portal.iterate(numbers())
next(iteration)
child = os.fork()
if child == 0:
    try:
        next(iteration)
    except FailedPreconditionError as error:
        print(error.reason, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "CLIENT_FORKED\n"


@pytest.mark.parametrize("call", ["client.jobs()", "Client(address).jobs()"])
def test_a_client_in_a_forked_child_says_so_instead_of_hanging(server: Server, call: str) -> None:
    assert forked(server, call, before="") == "CLIENT_FORKED"


def test_a_process_forked_after_its_client_was_closed_may_open_another(server: Server) -> None:
    call = "print('version', Client(address).server_info().version)"
    # gRPC's own threads leave a moment after the channel; a fork while one is inside is not safe.
    before = "import time; client.close(); time.sleep(1)"
    assert forked(server, call, before=before).startswith("version ")


def forked(server: Server, call: str, *, before: str) -> str:
    """What a call prints in the forked child of a process that has used a client."""
    code = f"""
import os, sys
from hvp_client import Client, FailedPreconditionError
address = sys.argv[1]
client = Client(address)
client.server_info()
{before}
child = os.fork()
if child == 0:
    try:
        {call}
    except FailedPreconditionError as error:
        print(error.reason)
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code, server.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()
