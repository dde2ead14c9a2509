"""A program that owns a group: what it prints, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hvp_workers import orphans

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


def start_driver(run_dir: Path, mode: str) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.workers.gang_driver", str(run_dir), mode],
        cwd=run_dir,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_standard_output_and_sigterm_belong_to_the_program_and_close_leaves_nothing(
    tmp_path: Path,
) -> None:
    with start_driver(tmp_path, "lose") as driver:
        output, _ = driver.communicate(timeout=120)
    assert [json.loads(line) for line in output.splitlines()] == [{"kept": True, "left": []}]
    assert driver.returncode == 0
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Abandoned:
    """What a killed program has left."""

    family: list[psutil.Process]  # all it had started, dead or alive
    temp_dir: Path


def kill_in_a_call(run_dir: Path, *, with_a_stopped_rank: bool) -> Abandoned:
    with start_driver(run_dir, "wait") as driver:
        assert driver.stdout is not None
        started = json.loads(driver.stdout.readline())
        (path,) = run_dir.glob("ray-*.json")
        note = orphans.Note.read(path)
        assert {mark.pid for mark in note.processes} >= set(started["ranks"])
        family = [psutil.Process(pid) for pid in started["family"]]
        if with_a_stopped_rank:
            os.kill(started["ranks"][1], signal.SIGSTOP)
        driver.kill()
    return Abandoned(family=family, temp_dir=Path(note.temp_dir))


def test_no_process_outlives_a_program_killed_in_the_middle_of_a_call(tmp_path: Path) -> None:
    abandoned = kill_in_a_call(tmp_path, with_a_stopped_rank=False)

    _, left = psutil.wait_procs(abandoned.family, timeout=30)
    assert left == []

    assert orphans.end_orphans(tmp_path) == 0
    assert not abandoned.temp_dir.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_does_not_hear_of_the_death_is_ended_by_the_next_start(
    tmp_path: Path,
) -> None:
    abandoned = kill_in_a_call(tmp_path, with_a_stopped_rank=True)

    assert orphans.end_orphans(tmp_path) > 0

    _, left = psutil.wait_procs(abandoned.family, timeout=1)
    assert left == []
    assert not abandoned.temp_dir.exists()
    assert list(tmp_path.iterdir()) == []
