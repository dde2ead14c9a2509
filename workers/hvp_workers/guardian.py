"""A small process that outlives its server by a second, to end what the server has left.

Most of Ray's processes die with the one that started them, by the kernel's parent-death signal. Its
agents do not: they try for a minute to report the death to a server that is dead too. A rank that
is stopped, or the folder of sockets and logs, would stay for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, final

import psutil

from hvp_workers.environment import rank_environment
from hvp_workers.orphans import ProcessMark, end_orphans

_END_WAIT_S = 10.0
_DISMISSED = b"dismissed"


@final
class Guardian:
    """Watches this process through a pipe, which the kernel closes however this process ends."""

    def __init__(self, run_dir: Path):
        self._process = subprocess.Popen(  # noqa: S603 - this project's own program
            [
                *(sys.executable, "-P", "-m", "hvp_workers.guardian"),
                *(str(os.getpid()), str(run_dir.resolve())),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=rank_environment(os.environ),
            start_new_session=True,  # a Ctrl-C in the terminal is for the server alone
        )

    def dismiss(self) -> None:
        """End the guardian; what the notes of other, dead servers name is ended too."""
        self._process.communicate(_DISMISSED, timeout=_END_WAIT_S)


def watch(pipe: IO[bytes], owner_pid: int, run_dir: Path) -> None:
    """Wait until the other end of the pipe is closed, then end what dead servers have left.

    The kernel closes a dying process's files before it calls the process dead, and `end_orphans`
    spares whom a living server has noted. So the owner's end is waited for, unless it has said that
    it lives on.

    Args:
        pipe: Reads what the owner writes.
        owner_pid: Process id of the owner, at a time when it lives.
        run_dir: Folder of the notes.
    """
    try:
        owner = ProcessMark.of(psutil.Process(owner_pid))
    except psutil.NoSuchProcess:
        owner = None
    dismissed = pipe.read() == _DISMISSED
    deadline = time.monotonic() + _END_WAIT_S
    while not dismissed and owner is not None and owner.find() and time.monotonic() < deadline:
        time.sleep(0.01)
    end_orphans(run_dir)


if __name__ == "__main__":
    watch(sys.stdin.buffer, int(sys.argv[1]), Path(sys.argv[2]))
