"""A small process that outlives its server by a second, to end what the server has left.

Most of Ray's processes die with the one that started them, by the kernel's parent-death signal. Its
agents do not: they try for a minute to report the death to a server that is dead too. A rank that
is stopped, or the folder of sockets and logs, would stay for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, final

from hvp_workers.environment import rank_environment
from hvp_workers.orphans import end_orphans

_END_WAIT_S = 10.0


@final
class Guardian:
    """Watches this process through a pipe, which the kernel closes however this process ends."""

    def __init__(self, run_dir: Path):
        self._process = subprocess.Popen(  # noqa: S603 - this project's own program
            [sys.executable, "-P", "-m", "hvp_workers.guardian", str(run_dir.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=rank_environment(os.environ),
            start_new_session=True,  # a Ctrl-C in the terminal is for the server alone
        )

    def dismiss(self) -> None:
        """End the guardian; noted processes are ended too, unless this process lives on."""
        self._process.communicate(timeout=_END_WAIT_S)


def watch(pipe: IO[str], run_dir: Path) -> None:
    """Wait until the other end of the pipe is closed, then end what dead servers have left."""
    pipe.read()
    end_orphans(run_dir)


if __name__ == "__main__":
    watch(sys.stdin, Path(sys.argv[1]))
