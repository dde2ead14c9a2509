"""The window through which ranks of one machine exchange weights is nobody else's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hvp_core.sharding.collective import SharedMemory


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.HashStore()  # type: ignore[attr-defined] # public, without an __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_window_is_closed_to_others_from_the_moment_it_is_made(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    allocate = os.posix_fallocate

    def look(descriptor: int, offset: int, size: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", look)
    umask = os.umask(0)
    try:
        window = SharedMemory("window-test")
    finally:
        os.umask(umask)
    assert modes == [0o600]
    chunk = torch.arange(5.0)
    assert torch.equal(window.gather(chunk), chunk)
