"""Groups of ranks for tests: real processes over gloo, forked from one that has imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

#: What ranks of all tests import, 5 s of CPU for a process that begins from nothing.
IMPORTED = ["hvp_workers.engine", "tests.core.problems"]


def run_ranks(main: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run `main(rank, world_size, *arguments)` in a new process for each rank of a new group.

    Nothing is computed in the process that they are forked from, so nothing is known to them of
    what another group or the tests' own process has traced.

    Args:
        main: A function of a module.
        world_size: Number of ranks.
        arguments: What can be pickled.

    Raises:
        ProcessRaisedException: A rank has raised; its words are those of the rank's exception.
    """
    imported()
    start_processes(
        _rank,
        (world_size, free_port(), main, arguments),
        nprocs=world_size,
        start_method="forkserver",
    )


def imported() -> BaseContext:
    """The way to start processes that have imported what ranks do, and computed nothing."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def _rank(
    rank: int, world_size: int, port: int, main: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    main(rank, world_size, *arguments)
    dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
