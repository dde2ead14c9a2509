"""Threads that each take whole jobs, instead of sharing every operation.

An operation on a tile takes less than a millisecond. Divided among cores it ends at a barrier, and
a core that comes late, because another process runs there, holds up the others at each. Jobs meet
once, at the end. [meas] 2 cores that other processes share, matrix products and exponentials of
192×512 tiles: 45 GFLOP/s against 2.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Job = TypeVar("Job")
State = TypeVar("State")

#: With more threads the interpreter's lock is felt; further cores share operations after all.
_MOST = 4


def size() -> int:
    """Number of jobs that run at once."""
    return min(_MOST, torch.get_num_threads())


def run(
    jobs: Sequence[Job],
    work: Callable[[Job, State], None],
    state: Callable[[], State],
    workers: int,
) -> None:
    """Do each job once, without autograd, in up to `workers` threads with a state each.

    Jobs are taken in their order as threads become free, so the large ones should come first. Each
    job must add to tensors of its own, or the result depends on which thread was faster.

    Args:
        jobs: The jobs.
        work: Does one job with its thread's state.
        state: Makes the state of a thread.
        workers: The most threads to use; with 1 the calling thread does all jobs.
    """
    queue = iter(jobs)  # of a sequence: safe to share under the interpreter's lock
    inference = torch.is_inference_mode_enabled()

    def drain() -> None:
        # Modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad():
            own = state()
            for job in queue:
                work(job, own)

    if workers == 1 or len(jobs) == 1:
        drain()
        return
    team = _team(workers, torch.get_num_threads())
    for done in [team.submit(drain) for _ in range(min(workers, len(jobs)))]:
        done.result()


@functools.cache
def _team(count: int, threads: int) -> ThreadPoolExecutor:
    """`count` threads, whose operations use `threads` cores in all."""
    everyone = Barrier(count)
    team = ThreadPoolExecutor(
        count, "attention", torch.set_num_threads, (max(1, threads // count),)
    )
    for started in [team.submit(everyone.wait) for _ in range(count)]:
        started.result()
    # Setting it in a thread also sets what threads of the future begin with.
    torch.set_num_threads(threads)
    return team


# A child has the executor, but not its threads.
os.register_at_fork(after_in_child=_team.cache_clear)
