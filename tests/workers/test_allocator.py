"""Freed memory is used again, and given back when it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hvp_workers import rank_process
from hvp_workers.backend import Schedule, Tuning

PROGRAM = """
import json, resource
from pathlib import Path
from hvp_workers import allocator
import numpy as np

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def faults_of_a_large_array():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100 << 17)  # 100 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_large_array()
plain = faults_of_a_large_array()
known = allocator.keep_freed_memory()
faults_of_a_large_array()
kept = faults_of_a_large_array()
held = resident()
allocator.return_freed_memory()
print(json.dumps([known, plain, kept, held - resident()]))
"""


def test_a_large_array_costs_page_faults_once_until_its_memory_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    known, plain, kept, returned = json.loads(done.stdout)
    if not known:  # not glibc
        return
    assert kept < plain / 10
    assert returned > 90 << 20


@pytest.mark.parametrize(
    ("device", "schedule", "kept"),
    [("cpu", "auto", True), ("cpu", "fast", True), ("cpu", "lean", False), ("cuda", "auto", False)],
)
def test_ranks_keep_freed_memory_on_a_cpu_unless_memory_is_short(
    device: str, schedule: Schedule, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # put back at the end
    monkeypatch.setattr(rank_process, "keep_freed_memory", lambda: calls.append(True))
    rank_process.prepare_process(Tuning(schedule=schedule), device=device, num_threads=1)
    assert bool(calls) == kept
