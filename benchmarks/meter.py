"""Seconds, bytes and kernels of a call."""

from __future__ import annotations

import ctypes
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch


@final
@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run: how long it took, and memory before it and at its peak."""

    seconds: float
    start_bytes: int
    peak_bytes: int


class Meter(ABC):
    """Measures calls on one kind of device. Law: nothing that was measured stays alive."""

    @abstractmethod
    def held(self) -> int:
        """Bytes that this process holds now, caches given back."""

    @abstractmethod
    def sample(self, call: Callable[[], Any]) -> Sample:
        """Run once; what was launched has finished when this returns."""


@final
class ResidentMeter(Meter):
    """The CPU: memory is the resident set, which the kernel counts and marks the peak of."""

    def held(self) -> int:
        """VmRSS after freed memory went back to the kernel."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS")

    def sample(self, call: Callable[[], Any]) -> Sample:
        """What the last contestant freed is given back first: it is not this one's to use."""
        start = self.held()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        began = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began
        peak = _status("VmHWM")
        del result
        return Sample(seconds=seconds, start_bytes=start, peak_bytes=max(peak, start))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@final
class CudaMeter(Meter):
    """A GPU: memory is what torch has allocated.

    A CUDA graph allocates nothing when it is replayed: the pool it was captured into is its own for
    as long as it lives. What lies idle in such pools is counted as held.
    """

    def held(self) -> int:
        """Allocated, and idle in the pools of graphs."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() + _idle_in_pools()

    def sample(self, call: Callable[[], Any]) -> Sample:
        """The device is idle before and after."""
        torch.cuda.synchronize()
        idle = _idle_in_pools()
        start = torch.cuda.memory_allocated() + idle
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() + idle
        del result
        return Sample(seconds=seconds, start_bytes=start, peak_bytes=max(peak, start))


def _segments_of_graphs() -> list[dict[str, Any]]:
    snapshot = torch.cuda.memory_snapshot()
    return [each for each in snapshot if tuple(each.get("segment_pool_id", (0, 0))) != (0, 0)]


def _idle_in_pools() -> int:
    return sum(each["total_size"] - each["allocated_size"] for each in _segments_of_graphs())


def graph_pools() -> int:
    """How many CUDA graphs hold memory in this process, or groups of them that share a pool."""
    return len({tuple(each["segment_pool_id"]) for each in _segments_of_graphs()})


def meter_for(device: torch.device) -> Meter:
    """The meter of a device."""
    return CudaMeter() if device.type == "cuda" else ResidentMeter()


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph: same kernels, one launch. Its result is overwritten by each replay.

    Three runs on a side stream come first, so that nothing is compiled or tuned while capturing.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@final
@dataclass(frozen=True, kw_only=True)
class Kernel:
    """All launches of one kernel within a call."""

    name: str
    seconds: float
    launches: int


def kernels(call: Callable[[], Any]) -> list[Kernel]:
    """What ran on the GPU during one call, longest first; copies and fills included."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        result = call()
        torch.cuda.synchronize()
    del result
    found = [
        Kernel(name=event.key, seconds=event.self_device_time_total / 1e6, launches=event.count)
        for event in trace.key_averages()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(found, key=lambda kernel: -kernel.seconds)
