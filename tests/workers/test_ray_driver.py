"""A program that owns a group: what it prints, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hvp_workers import orphans

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


def start_driver(run_dir: Path, mode: str) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
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


def test_nothing_outlives_a_program_killed_in_the_middle_of_a_call(tmp_path: Path) -> None:
    with start_driver(tmp_path, "wait") as driver:
        assert driver.stdout is not None
        started = json.loads(driver.stdout.readline())
        family = [psutil.Process(pid) for pid in started["family"]]
        (path,) = tmp_path.glob("ray-*.json")
        note = orphans.Note.read(path)
        assert {mark.pid for mark in note.processes} >= set(started["ranks"])
        # The worst of them: it hears neither Ray nor its own watchdog.
        os.kill(started["ranks"][1], signal.SIGSTOP)
        driver.kill()

    # The guardian is one of the family, and the last to go.
    _, left = psutil.wait_procs(family, timeout=30)

    assert left == []
    assert not Path(note.temp_dir).exists()
    assert list(tmp_path.iterdir()) == []
