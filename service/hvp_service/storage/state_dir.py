"""The folder that outlives the server: who may use it, and what lies where."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import socket
import stat
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

# What lies here is this user's alone: models, what was computed of them, and compiled code.
_OTHERS = 0o077

_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.05


class StateDirectoryError(Exception):
    """This process may not use the state directory; the message says what to do."""


class StateDirectoryBusyError(StateDirectoryError):
    """Another server uses the state directory."""


class StateDirectoryForeignError(StateDirectoryError):
    """The state directory belongs to another user, who could change what the ranks run."""


@dataclass(frozen=True)
class StateDir:
    """Paths below the state directory; all on one file system, so that links and renames work.

    Attributes:
        root: The folder.
        alone_in: The folder of what is this server's alone; the root where that is everything.
    """

    root: Path
    alone_in: Path

    @property
    def is_shared(self) -> bool:
        """Whether other servers may use the folder beside this one."""
        return self.alone_in != self.root

    @property
    def database(self) -> Path:
        """File of the database."""
        return self.root / "hvp.sqlite3"

    @property
    def audit_log(self) -> Path:
        """File of who did what at this server."""
        return self.alone_in / "audit.jsonl"

    @property
    def run(self) -> Path:
        """Folder in which the workers note their processes."""
        return self.alone_in / "run"

    @property
    def compile_cache(self) -> Path:
        """Folder of the workers' compiled code; may be deleted while no server runs."""
        return self.root / "compile-cache"

    def upload(self, upload_id: str) -> Path:
        """File of an upload that has not ended."""
        return self.root / "uploads" / f"{upload_id}.part"

    def blob(self, sha256: str) -> Path:
        """File of a blob, a finished upload."""
        return self.root / "blobs" / sha256[:2] / sha256

    def checkpoint(self, checkpoint_id: str) -> Path:
        """Folder of a checkpoint's files, hard links to blobs."""
        return self.root / "checkpoints" / checkpoint_id

    def vector(self, vector_id: str) -> Path:
        """File of the elements of a vector that came as bytes or was kept from a job."""
        return self.root / "vectors" / f"{vector_id}.bin"

    def temporary(self, name: str) -> Path:
        """A file that no restart needs."""
        return self.alone_in / "tmp" / name

    def create(self) -> None:
        """Make the folders, for this user alone, and delete the temporary files."""
        for folder in ("uploads", "blobs", "checkpoints", "vectors", "compile-cache", "locks"):
            (self.root / folder).mkdir(exist_ok=True, mode=0o700)
        for folder in ("run", "tmp"):
            (self.alone_in / folder).mkdir(exist_ok=True, mode=0o700)
        for leftover in (self.alone_in / "tmp").iterdir():
            leftover.unlink()

    def identity(self) -> str:
        """The folder's id, the same for every server that uses it, wherever it is mounted."""
        file = self.root / "folder-id"
        with contextlib.suppress(FileNotFoundError):
            return file.read_text()
        made = self.temporary("folder-id")
        made.write_text(uuid.uuid4().hex)
        with contextlib.suppress(FileExistsError):  # another server was quicker
            os.link(made, file)
        made.unlink()
        sync_folder(self.root)
        return file.read_text()

    @contextlib.asynccontextmanager
    async def alone(self, name: str) -> AsyncIterator[None]:
        """Keep every other server that uses the folder out of the blocks of the same name."""
        if not self.is_shared:
            yield
            return
        descriptor = os.open(self.root / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            pause_s = _FIRST_PAUSE_S
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                await asyncio.sleep(pause_s)  # and not in a thread, which its holder may need
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            yield
        finally:
            os.close(descriptor)


def own_folder(root: Path) -> StateDir:
    """The state directory, made where there is none, which is this user's and closed to others.

    Raises:
        StateDirectoryError: There is a file of that name.
        StateDirectoryForeignError: Another user owns it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError):
        raise StateDirectoryError(
            f"the state directory {root} is a file, or lies below one; choose another --state-dir"
        ) from None
    root = root.resolve()
    _require_own(root)
    _close_to_others(root)
    return StateDir(root, alone_in=root)


@contextlib.contextmanager
def sole_use(root: Path) -> Iterator[StateDir]:
    """Hold the state directory for this process; the kernel frees it however the process ends.

    Raises:
        StateDirectoryError: There is a file of that name.
        StateDirectoryBusyError: Another process holds it; the message names its pid.
        StateDirectoryForeignError: Another user owns it.
    """
    state = own_folder(root)
    with _held(state.root, fcntl.LOCK_EX):
        state.create()
        yield state


@contextlib.contextmanager
def shared_use(root: Path) -> Iterator[StateDir]:
    """Use the state directory beside other servers whose rows are in the same database.

    What is one server's alone lies in a folder of its own, which the kernel frees however the
    process ends, for the next server to take over.

    Raises:
        StateDirectoryError: As for `sole_use`; busy is a folder with an SQLite file in use.
    """
    root = own_folder(root).root
    with _held(root, fcntl.LOCK_SH), _servers_folder(root / "servers") as alone_in:
        state = StateDir(root, alone_in=alone_in)
        state.create()
        yield state


@contextlib.contextmanager
def _servers_folder(servers: Path) -> Iterator[Path]:
    """A folder that no other server has; one that a dead server had comes first."""
    servers.mkdir(exist_ok=True, mode=0o700)
    for number in itertools.count():
        # By host: what a dead server noted of its processes is true of its own machine.
        folder = servers / f"{socket.gethostname()}-{number}"
        folder.mkdir(exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _try_lock(descriptor, fcntl.LOCK_EX):
                yield folder
                return
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _held(root: Path, kind: int) -> Iterator[None]:
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _try_lock(descriptor, kind):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StateDirectoryBusyError(
                f"the state directory {root} is in use by the server with pid {holder}; "
                "stop that one or choose another --state-dir; several servers share one only where "
                "each has the same PostgreSQL --database-url"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _require_own(root: Path) -> None:
    owner = root.stat().st_uid
    if owner != os.geteuid():
        raise StateDirectoryForeignError(
            f"the state directory {root} belongs to the user with id {owner} and this process runs "
            f"as {os.geteuid()}: its owner could change what the workers load. Run the server as "
            f"that user, give the folder over (chown -R {os.geteuid()} {root}), or choose another "
            "--state-dir"
        )


def _close_to_others(root: Path) -> None:
    """Take away other users' permissions that an earlier version or a person gave; root first."""
    _close(root)
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            _close(Path(folder, name))


def _close(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode & _OTHERS and not path.is_symlink():
            path.chmod(mode & ~_OTHERS)


def sync_file(path: Path) -> None:
    """Make what others have written to a file durable."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder (created, renamed or linked files) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
