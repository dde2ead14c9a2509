"""What asks a server to end, and what ends it if it does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading

import structlog

SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger()


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` at the first signal, and end the process at the second, at once.

    A process that ends so is like one that was killed: its state is what a restart finds, and the
    kernel ends its ranks. It may be called again, where somebody has put handlers of their own.
    """
    loop = asyncio.get_running_loop()

    def ask(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("ended at once by a second signal", signal=number.name)
            os._exit(128 + number)  # as shells have it
        stop.set()

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
        for number in SIGNALS:
            loop.add_signal_handler(number, ask, number)


def end_within(seconds: float) -> None:
    """End this process after a time, whatever it does then; the log says so.

    A thread does it: what keeps a server from ending may be its event loop.
    """

    def end() -> None:
        log.error("the end took too long, and is cut short", seconds=seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
