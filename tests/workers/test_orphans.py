"""Notes of processes: what a killed server leaves is ended, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hvp_workers import guardian, orphans
from hvp_workers.orphans import Note, ProcessMark


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.fixture
def temp_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(
        prefix=orphans.TEMP_PREFIX, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def mark(pid: int) -> ProcessMark:
    return ProcessMark.of(psutil.Process(pid))


def gone() -> ProcessMark:
    """A process that has ended: this one's id, long before it started."""
    return ProcessMark(pid=os.getpid(), start_time=1.0)


def note_of(owner: ProcessMark, temp_dir: Path, *processes: ProcessMark) -> Note:
    return Note(owner=owner, temp_dir=str(temp_dir), sessions=("s1",), processes=processes)


def test_what_a_dead_owner_left_is_killed_and_its_folder_and_note_are_removed(
    tmp_path: Path, temp_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    (temp_dir / "socket").touch()
    left = mark(sleeper.pid)
    note_of(gone(), temp_dir, left).write(tmp_path)

    assert orphans.end_orphans(tmp_path) == 1

    assert left.find() is None
    assert not temp_dir.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_owner_runs_is_left_alone(
    tmp_path: Path, temp_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    note_of(mark(os.getpid()), temp_dir, mark(sleeper.pid)).write(tmp_path)

    assert orphans.end_orphans(tmp_path) == 0

    assert sleeper.poll() is None
    assert temp_dir.exists()
    assert [path.name for path in tmp_path.iterdir()] == [f"ray-{os.getpid()}.json"]


def test_a_process_that_only_shares_the_id_is_left_alone(
    tmp_path: Path, temp_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    real = mark(sleeper.pid)
    other = replace(real, start_time=real.start_time - 60.0)
    note_of(gone(), temp_dir, other).write(tmp_path)

    assert orphans.end_orphans(tmp_path) == 0

    assert sleeper.poll() is None


def test_a_process_younger_than_the_note_is_found_by_the_folder_in_its_command_line(
    tmp_path: Path, temp_dir: Path
) -> None:
    note_of(gone(), temp_dir).write(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(600)", f"--temp_dir={temp_dir}"]
    with subprocess.Popen(command) as process:
        left = mark(process.pid)
        try:
            assert orphans.end_orphans(tmp_path) == 1
            assert left.find() is None
        finally:
            process.kill()


def test_a_process_that_hides_its_command_line_is_found_by_its_log(
    tmp_path: Path, temp_dir: Path
) -> None:
    note_of(gone(), temp_dir).write(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (temp_dir / "agent.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log)
    with process:
        try:
            assert orphans.end_orphans(tmp_path) == 1
        finally:
            process.kill()


def test_a_process_whose_id_another_had_before_is_found_too(
    tmp_path: Path, temp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids come round, and psutil remembers processes by them."""
    note_of(gone(), temp_dir).write(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(600)", f"--temp_dir={temp_dir}"]
    with subprocess.Popen(command) as process:
        remembered: Any = psutil._pmap  # type: ignore[attr-defined]
        monkeypatch.setitem(remembered, process.pid, psutil.Process(os.getpid()))
        try:
            assert orphans.end_orphans(tmp_path) == 1
        finally:
            process.kill()


def test_a_guardian_waits_for_the_end_of_a_server_whose_files_are_closed_already(
    tmp_path: Path, temp_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """The kernel closes a dying process's files first, and calls it dead later."""
    left = mark(sleeper.pid)
    program = "import os, time; os.close(1); time.sleep(1.0)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
        note_of(mark(server.pid), temp_dir, left).write(tmp_path)
        assert server.stdout is not None
        guardian.watch(server.stdout, server.pid, tmp_path)

        assert server.poll() == 0

    assert left.find() is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    run_dir, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    note_of(gone(), precious).write(run_dir)

    orphans.end_orphans(run_dir)

    assert precious.exists()


def test_a_file_that_is_no_note_is_removed_and_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "ray-1.json").write_text('{"owner": 3')
    (tmp_path / "ray-2.json").write_text('{"owner": 3}')

    assert orphans.end_orphans(tmp_path) == 0

    assert list(tmp_path.iterdir()) == []


def test_shared_memory_of_a_session_is_freed_and_only_that() -> None:
    memory = Path("/dev/shm")  # noqa: S108 - the kernel's name
    ours, other = memory / "hvp-test1234", memory / "hvp-test5678"
    for segment in (ours, other):
        segment.touch()
    try:
        orphans.free_segments("test1234")
        assert not ours.exists()
        assert other.exists()
    finally:
        other.unlink()
