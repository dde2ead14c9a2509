"""A server of one's own for as long as a block runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READY = "serving on "
_DRAIN_S = 60.0  # beyond this a server that was told to end is killed
_LOG_LINES = 15  # of the log in an error message


class ServerFailedError(RuntimeError):
    """The server ended before it served; the message holds the end of its log."""


@contextmanager
def running_server(output: Path, *, num_workers: int, device: str) -> Iterator[str]:
    """Start `hvp serve` as a process and end it with the block.

    The server's state lies in a temporary folder beside the results and is deleted with the block;
    its log stays as `server.log`.

    Args:
        output: Folder of the results, which exists.
        num_workers: Ranks to start.
        device: `cpu` or `cuda`.

    Yields:
        The server's address, 127.0.0.1 and a free port.

    Raises:
        ServerFailedError: The server ended before it served.
    """
    log_path = output / "server.log"
    with (
        tempfile.TemporaryDirectory(
            prefix=".server-", dir=output, ignore_cleanup_errors=True
        ) as state_dir,
        log_path.open("wb") as log,
    ):
        command = [
            *(sys.executable, "-P", "-m", "hvp_service.app.server"),
            *("--address", "127.0.0.1:0"),
            *("--state-dir", state_dir),
            *("--workers", str(num_workers)),
            *("--device", device),
        ]
        process = subprocess.Popen(  # noqa: S603  the command is spelled out above
            command, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield _address(process, log_path)
        finally:
            _end(process)


def _address(process: subprocess.Popen[str], log_path: Path) -> str:
    assert process.stdout is not None
    # The pipe ends when the server does, so this waits for as long as a start may take and no more.
    for line in process.stdout:
        if line.startswith(_READY):
            return line.removeprefix(_READY).strip()
    process.wait()
    tail = log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    raise ServerFailedError(
        f"The server ended with status {process.returncode} before it served. "
        f"The end of {log_path}:\n" + "\n".join(tail)
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_DRAIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
