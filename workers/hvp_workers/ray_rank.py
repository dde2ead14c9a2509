"""One rank of a Ray group: the actor that holds an engine."""

from __future__ import annotations

import importlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import psutil

from hvp_workers.backend import BackendError, Tuning
from hvp_workers.environment import limit_environment
from hvp_workers.group import as_backend_error
from hvp_workers.orphans import ProcessMark
from hvp_workers.rank_process import loading_modules, prepare_process, total_memory

LOOPBACK = "127.0.0.1"

_WATCH_INTERVAL_S = 1.0
_ORPHANED_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor was put."""

    node_id: str  # Ray's
    hostname: str
    address: str  # IP of the node
    gpu: int  # index on its node; -1 without one
    process: ProcessMark
    num_cores: int  # cores this process may use


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The facts that an actor needs to take its rank."""

    rank: int
    num_ranks: int
    same_host: bool
    device: str  # "cpu" or "cuda"
    tuning: Tuning
    num_threads: int
    address: str  # rank 0's
    port: int  # of the rendezvous store at rank 0
    session: str
    engine: str  # "module:callable", called with (collective, device, tuning)
    start_timeout_s: float
    collective_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one call: a value, or an error as a value, which survives every transport."""

    value: Any = None
    error: BackendError | None = None


@final
class Rank:
    """Runs the methods of one engine, one after another.

    The process ends by itself within two seconds of the death of its parent, or of the driver when
    that is a process of the same machine: no rank outlives its server, whatever it is computing.
    """

    def __init__(self, driver_node_id: str, driver: ProcessMark):
        # What is written here, to /dev/shm above all, is for this user alone.
        os.umask(0o077)
        limit_environment()  # a cluster that was joined may have any
        self._engine: Any = None
        self._store: Any = None
        watched = driver if driver_node_id == _node_id() else None
        threading.Thread(target=_watch, args=(watched,), name="watchdog", daemon=True).start()

    def place(self) -> Place:
        """Where this actor was put."""
        import ray

        gpus = ray.get_gpu_ids()
        return Place(
            node_id=_node_id(),
            hostname=socket.gethostname(),
            address=ray.util.get_node_ip_address(),
            gpu=int(gpus[0]) if gpus else -1,
            process=ProcessMark.of(psutil.Process()),
            num_cores=len(os.sched_getaffinity(0)),
        )

    def open_store(self, address: str, start_timeout_s: float) -> int:
        """Serve the rendezvous store at this address only, at a free port; the port's number."""
        listener = socket.create_server((address, 0))
        port = int(listener.getsockname()[1])
        # Handed over with its port, so that nobody can take it between two binds.
        self._store = _store(address, port, start_timeout_s, listener_fd=listener.detach())
        return port

    def join(self, seat: Seat) -> Outcome:
        """Enter the process group and build the engine; every rank must call it.

        The outcome's value is the memory in bytes of the rank's device, or of its host.
        """
        try:
            self._engine = self._build(seat)
        except Exception as error:  # any failure is reported by value
            return Outcome(error=as_backend_error(error))
        return Outcome(value=total_memory(seat.device))

    def _build(self, seat: Seat) -> Any:
        interface = _interface_of(LOOPBACK if seat.same_host else self.place().address)
        if interface is not None:
            # Otherwise gloo resolves the machine's own name, which not every machine can.
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            os.environ["NCCL_SOCKET_IFNAME"] = interface
        prepare_process(seat.tuning, device=seat.device, num_threads=seat.num_threads)
        with loading_modules():
            import torch
            from hvp_core.sharding.collective import open_collective
            from torch import distributed

        torch.set_num_threads(seat.num_threads)
        if self._store is None:
            self._store = _store(seat.address, seat.port, seat.start_timeout_s)
        device = torch.device("cuda", 0) if seat.device == "cuda" else torch.device("cpu")
        distributed.init_process_group(
            "nccl" if seat.device == "cuda" else "gloo",
            store=self._store,
            rank=seat.rank,
            world_size=seat.num_ranks,
            timeout=timedelta(seconds=seat.collective_timeout_s),
            device_id=device if seat.device == "cuda" else None,
        )
        collective = open_collective(
            rank=seat.rank,
            world_size=seat.num_ranks,
            device=device,
            same_host=seat.same_host,
            session=seat.session,
        )
        module, _, name = seat.engine.partition(":")
        with loading_modules():
            make = getattr(importlib.import_module(module), name)
        return make(collective, str(device), seat.tuning)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Outcome:
        """Run one method of the engine."""
        try:
            return Outcome(value=getattr(self._engine, method)(*arguments))
        except Exception as error:  # any failure is reported by value
            return Outcome(error=as_backend_error(error))

    def leave(self) -> Outcome:
        """Drop the engine and leave the process group; every rank must call it."""
        from torch import distributed

        self._engine = None
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return Outcome()


def _store(address: str, port: int, timeout_s: float, *, listener_fd: int | None = None) -> Any:
    """The store by which ranks find each other: served from `listener_fd`, or joined."""
    from torch import distributed

    return distributed.TCPStore(  # type: ignore[attr-defined] # public, without an __all__
        address,
        port,
        is_master=listener_fd is not None,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener_fd,
    )


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _interface_of(address: str) -> str | None:
    """The network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None


def _watch(driver: ProcessMark | None) -> None:
    parent = os.getppid()
    while os.getppid() == parent and (driver is None or driver.find() is not None):
        time.sleep(_WATCH_INTERVAL_S)
    os._exit(_ORPHANED_EXIT_CODE)
