"""The port that Prometheus asks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from threading import Thread
from typing import Any, final

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from hvp_service.app.config import split_address
from hvp_service.app.dependencies import Dependencies
from hvp_service.metrics import instruments
from hvp_service.metrics.state import StateCollector


@final
@dataclass(frozen=True)
class Endpoint:
    """An HTTP server, in threads of its own, that gives the figures at any path."""

    server: Any
    thread: Thread

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self.server.server_port)

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def registry_of(deps: Dependencies) -> CollectorRegistry:
    """All figures of a server: what was counted, its state, and its process'."""
    registry = CollectorRegistry()
    registry.register(instruments.REGISTRY)
    registry.register(StateCollector(deps, asyncio.get_running_loop()))
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


def start_endpoint(deps: Dependencies, address: str) -> Endpoint:
    """Listen at HOST:PORT.

    Raises:
        OSError: The address cannot be had.
    """
    host, port = split_address(address)
    server, thread = start_http_server(port, host, registry_of(deps))
    return Endpoint(server, thread)
