"""A note of the processes a server starts, so that others can end those it left.

The reader is the server's guardian (see `guardian`), or, where that was killed as well, the next
server on the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

# A process id is used again only after tens of thousands of others; two processes of one id that
# started within this time do not exist, while the kernel's boot time, of which psutil derives a
# start time, moves by less when the clock is corrected.
_SAME_START_S = 2.0
_KILL_WAIT_S = 10.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's own name for it

TEMP_PREFIX = "hvp-ray-"
RAY_FOLDER = "r"  # in one of ours: Ray opens its own to everybody
SEGMENT_PREFIX = "hvp-"


@dataclass(frozen=True, kw_only=True)
class ProcessMark:
    """One process of this machine, told apart from a later one of the same id."""

    pid: int
    start_time: float  # seconds since the epoch

    @classmethod
    def of(cls, process: psutil.Process) -> ProcessMark:
        """Mark a living process.

        Raises:
            psutil.NoSuchProcess: The process has ended.
        """
        return cls(pid=process.pid, start_time=process.create_time())

    def find(self) -> psutil.Process | None:
        """The marked process; None when it has ended."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.start_time) < _SAME_START_S
            alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return None
        return process if same and alive else None


@dataclass(frozen=True, kw_only=True)
class Note:
    """The processes and folders that one server has started."""

    owner: ProcessMark
    temp_dir: str  # the private folder around Ray's, of sockets and logs
    sessions: tuple[str, ...]  # of the groups; shared memory is named after them
    processes: tuple[ProcessMark, ...]

    def write(self, run_dir: Path) -> None:
        """Put the note into `run_dir`, whole or not at all."""
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = note_path(run_dir)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Note:
        """Read what `write` wrote.

        Raises:
            ValueError: The file is not a note.
        """
        try:
            content = json.loads(path.read_text())
            return cls(
                owner=ProcessMark(**content["owner"]),
                temp_dir=str(content["temp_dir"]),
                sessions=tuple(str(session) for session in content["sessions"]),
                processes=tuple(ProcessMark(**mark) for mark in content["processes"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a note of processes: {error}") from error


def note_path(run_dir: Path) -> Path:
    """Path of this process's note."""
    return run_dir / f"ray-{os.getpid()}.json"


def family(roots: Iterable[ProcessMark]) -> list[ProcessMark]:
    """The marked processes that live, and all processes that they have started."""
    members: dict[int, ProcessMark] = {}
    for root in roots:
        process = root.find()
        if process is None:
            continue
        try:
            for member in (process, *process.children(recursive=True)):
                members[member.pid] = ProcessMark.of(member)
        except psutil.NoSuchProcess:
            continue
    return list(members.values())


def children() -> list[ProcessMark]:
    """The living processes that this one has started itself."""
    marks = []
    for process in psutil.Process().children():
        try:
            marks.append(ProcessMark.of(process))
        except psutil.NoSuchProcess:
            continue
    return marks


def end_processes(marks: Iterable[ProcessMark], *, grace_s: float = 0.0) -> int:
    """End the marked processes that still live, and the processes that they have started.

    Args:
        marks: The marked processes.
        grace_s: Seconds that they have to end by themselves before they are killed.

    Returns:
        Number of processes that were killed.
    """
    processes = [process for mark in family(marks) if (process := mark.find()) is not None]
    if grace_s > 0:
        _, processes = psutil.wait_procs(processes, timeout=grace_s)
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_KILL_WAIT_S)
    return len(processes)


def free_segments(session: str) -> None:
    """Remove the shared memory that a group of ranks on this machine has left."""
    if not session or not _SHARED_MEMORY.is_dir():
        return
    for segment in _SHARED_MEMORY.glob(f"{SEGMENT_PREFIX}{session}*"):
        segment.unlink(missing_ok=True)


def remove_temp_dir(temp_dir: str) -> None:
    """Remove the folder around Ray's, if a server has made it."""
    path = Path(temp_dir)
    if path.name.startswith(TEMP_PREFIX):
        shutil.rmtree(path, ignore_errors=True)


def end_orphans(run_dir: Path) -> int:
    """End processes, and remove files, that dead servers have left, by their notes in `run_dir`.

    The note of a server that lives is left alone, as are processes that only share an id with a
    noted one.

    Returns:
        Number of processes that were killed.
    """
    num_killed = 0
    for path in sorted(run_dir.glob("ray-*.json")):
        try:
            note = Note.read(path)
        except FileNotFoundError:  # somebody else was faster
            continue
        except ValueError:
            path.unlink(missing_ok=True)
            continue
        if note.owner.find() is not None:
            continue
        num_killed += end_processes([*note.processes, *_mentioning(note.temp_dir)])
        for session in note.sessions:
            free_segments(session)
        remove_temp_dir(note.temp_dir)
        path.unlink(missing_ok=True)
    return num_killed


def _mentioning(temp_dir: str) -> list[ProcessMark]:
    """Processes with the folder in their command line, or a file of it open.

    These are the ones younger than the note. Ray's agents hide their command line behind a title,
    and outlive the process that started them by a minute; their logs they have open. Processes are
    looked up one by one: psutil's own iteration remembers a process by its id alone, and gives an
    earlier one where ids have come round.
    """
    if not Path(temp_dir).name.startswith(TEMP_PREFIX):
        return []
    marks = []
    for pid in psutil.pids():
        try:
            process = psutil.Process(pid)
            files = (each.path for each in process.open_files())
            if any(temp_dir in word for word in (*process.cmdline(), *files)):
                marks.append(ProcessMark.of(process))
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return marks
