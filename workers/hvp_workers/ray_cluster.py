"""The Ray cluster that ranks run on: an embedded one, or one that runs already."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import final

import psutil

from hvp_workers import orphans, surroundings
from hvp_workers.backend import GroupLostError
from hvp_workers.environment import limited_environment
from hvp_workers.guardian import Guardian
from hvp_workers.orphans import Note, ProcessMark
from hvp_workers.ray_rank import LOOPBACK

# A little over Ray's own minimum of 75 MiB: nothing but calls and scalars passes through the store.
_OBJECT_STORE_BYTES = 100 * 2**20

# Ray's processes end by themselves when asked, in about a second.
_SHUTDOWN_GRACE_S = 10.0

# A running cluster answers within a second or two of the import of Ray; one that is gone would keep
# Ray itself trying for minutes.
_CONTACT_S = 25.0


@final
class RayCluster:
    """This process as a Ray driver.

    With `RAY_ADDRESS` set it joins that cluster and starts nothing. When the process is a driver
    already, that connection is used and left open. Otherwise it starts a cluster of this machine
    alone, which listens on the loopback interface, asks for a token that only this process and its
    children know, and ends with this process, however that ends.

    `open` must be called in a thread that lives as long as the process, which means the main
    thread: the kernel's parent-death signal, by which Ray's processes end, follows the thread that
    forked them.
    """

    def __init__(self, *, num_ranks: int, device: str, run_dir: Path | None):
        self._num_ranks = num_ranks
        self._device = device
        self._run_dir = run_dir
        self._connected = False  # by us
        self._temp_dir: str | None = None  # set while we run a cluster of our own
        self._roots: list[ProcessMark] = []  # what ray.init has forked
        self._sessions: list[str] = []
        self._guardian: Guardian | None = None

    @property
    def is_open(self) -> bool:
        """Whether this process is a driver of a cluster whose processes live."""
        ray = sys.modules.get("ray")
        if ray is None:  # importing it here would be too early, see _prepare_environment
            return False
        return bool(ray.is_initialized()) and all(mark.find() for mark in self._roots)

    def open(self) -> None:
        """Become a driver; does nothing when this process is one.

        Raises:
            GroupLostError: WORKER_GROUP_START_FAILED, with what to change.
        """
        if self._run_dir is not None:
            orphans.end_orphans(self._run_dir)
        address = os.environ.get("RAY_ADDRESS", "")
        if address.startswith("ray://"):
            raise GroupLostError(
                "WORKER_GROUP_START_FAILED",
                f"RAY_ADDRESS={address} names a Ray Client proxy, through which ranks cannot be "
                "watched. Run the server on a node of the cluster, with RAY_ADDRESS=HOST:PORT.",
            )
        if not address:
            _prepare_environment()
            found = surroundings.obstacles()
            if self._device == "cuda" and (lack := surroundings.no_gpu()):
                found.append(lack)
            if found:
                raise GroupLostError("WORKER_GROUP_START_FAILED", " ".join(map(str, found)))
        import ray

        if ray.is_initialized():
            return
        started = time.monotonic()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if address:
                _require_cluster(address)
                ray.init(address=address, log_to_driver=False, logging_level="WARNING")
            else:
                self._start_local()
        except GroupLostError:
            raise
        except Exception as error:  # Ray raises bare ones too
            waited = f"{time.monotonic() - started:.0f} s"
            advice = f"Check RAY_ADDRESS={address}." if address else _advice()
            self.close()
            raise GroupLostError(
                "WORKER_GROUP_START_FAILED",
                f"Ray did not start ({waited}): {str(error).partition(chr(10))[0]} {advice}",
            ) from error
        finally:
            # Ray installs a handler that raises SystemExit out of whatever runs at the time; the
            # server's own handler drains.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        self._connected = True
        # Ray prints what the cluster reports, such as the death of a worker, to standard output,
        # which belongs to the program; there is no public switch for it, and no other use of this
        # one here, where workers' logs are not forwarded.
        ray._private.worker._worker_logs_enabled = False

    def _start_local(self) -> None:
        import ray

        self._temp_dir = tempfile.mkdtemp(prefix=orphans.TEMP_PREFIX, dir=surroundings.temp_root())
        if self._run_dir is not None:
            self._guardian = Guardian(self._run_dir)
        before = orphans.children()
        try:
            with limited_environment():
                ray.init(
                    address="local",
                    # Only bookkeeping; with more, Ray starts that many idle workers.
                    num_cpus=self._num_ranks,
                    num_gpus=None if self._device == "cuda" else 0,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="WARNING",
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(Path(self._temp_dir) / orphans.RAY_FOLDER),
                )
        finally:
            # A start that fails half-way leaves processes that Ray itself has lost sight of.
            self._roots = [mark for mark in orphans.children() if mark not in before]
        self.note()
        if self._device == "cuda":
            self._require_gpus(int(ray.cluster_resources().get("GPU", 0)))

    def _require_gpus(self, present: int) -> None:
        """Refuse at once if GPUs are missing: this cluster never gets another machine."""
        if present < self._num_ranks:
            self.close()
            raise GroupLostError(
                "WORKER_GROUP_START_FAILED",
                f"{self._num_ranks} workers take a GPU each, and this machine has {present}. Use "
                "fewer --workers, or --device cpu.",
                {"num_gpus": str(present)},
            )

    def note(self, session: str | None = None) -> None:
        """Note the processes that run now, and the name of a group's shared memory."""
        if session is not None:
            self._sessions = [*self._sessions[-7:], session]
        if self._run_dir is None or self._temp_dir is None:
            return
        Note(
            owner=ProcessMark.of(psutil.Process()),
            temp_dir=self._temp_dir,
            sessions=tuple(self._sessions),
            processes=tuple(orphans.family(self._roots)),
        ).write(self._run_dir)

    def close(self) -> None:
        """Stop what `open` started; idempotent."""
        if not self._connected and self._temp_dir is None:
            return
        import ray

        members = orphans.family(self._roots)
        ray.shutdown()
        self._connected = False
        if self._temp_dir is None:
            return
        orphans.end_processes(members, grace_s=_SHUTDOWN_GRACE_S)
        orphans.remove_temp_dir(self._temp_dir)
        self._temp_dir, self._roots, self._sessions = None, [], []
        if self._run_dir is not None:
            orphans.note_path(self._run_dir).unlink(missing_ok=True)
        if self._guardian is not None:
            self._guardian.dismiss()
            self._guardian = None


def _advice() -> str:
    """Advice after a cluster of our own has not started: the obstacles that are found now."""
    found = surroundings.obstacles()
    return " ".join(map(str, found)) or (
        "Check the memory of this machine, and the free space of "
        f"{surroundings.temp_root()} and of /dev/shm."
    )


def _require_cluster(address: str) -> None:
    """Check that a cluster lives, in a process that can be given up.

    Raises:
        GroupLostError: WORKER_GROUP_START_FAILED: no cluster answers.
    """
    # Not a public interface of Ray's, which has none that keeps a time limit.
    command = [
        *(
            sys.executable,
            "-P",
            "-m",
            "ray.scripts.scripts",
            "health-check",
            "--skip-version-check",
        ),
        *("--address", address),
    ]
    try:
        with limited_environment():
            subprocess.run(  # noqa: S603 - Ray's own program
                command, check=True, capture_output=True, timeout=_CONTACT_S
            )
    except subprocess.SubprocessError as error:
        raise GroupLostError(
            "WORKER_GROUP_START_FAILED",
            f"No Ray cluster answers at RAY_ADDRESS={address}. Start that cluster, correct "
            "RAY_ADDRESS, or unset it: then the server runs a cluster of its own on this machine.",
            {"address": address},
        ) from error


def _prepare_environment() -> None:
    """Set what Ray reads from the environment, here and in every process that it starts."""
    # Ray reads it when it is imported: 0 makes every port listen on the node's own address alone,
    # which is the loopback's. Nothing outside this machine has business with an embedded cluster,
    # whatever the environment says.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Who may call Ray may run code. Without a token of ours Ray writes one to the home folder.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" not in sys.modules:  # it has read the mode by then, and newer ones default to it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray forks while grpc's threads run.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Ray would run ranks behind everything else on the machine, which is theirs as much as
    # anybody's: whatever is busy beside them would stretch their products and starts many times.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ranks without a GPU see what the machine has; without this Ray warns that it will be so.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
