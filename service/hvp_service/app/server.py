"""The server process: the order in which its parts start, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import structlog
from hvp_workers.allocator import keep_freed_memory
from hvp_workers.backend import BackendError, Tuning
from hvp_workers.opening import open_backend
from hvp_workers.surroundings import lost_current_folder

from hvp_service.app.config import ServerConfig, split_address
from hvp_service.app.dependencies import open_dependencies
from hvp_service.app.ending import end_within, stop_on_signals
from hvp_service.app.flags import SettingsError, parse_flags
from hvp_service.app.logs import adopt_loggers, configure_logs
from hvp_service.app.settings import read_settings
from hvp_service.app.tls import TlsError, read_certificates
from hvp_service.calls.errors import ServiceError
from hvp_service.identity.tokens import TokenKeysError, read_keys
from hvp_service.metrics.endpoint import Endpoint, start_endpoint
from hvp_service.storage.state_dir import StateDirectoryError, shared_use, sole_use
from hvp_service.storage.troubles import DatabaseRefusedError

Result = TypeVar("Result")

#: How long after its grace a server may take to end its ranks, and to close what is open.
LATEST_S = 20.0

log = structlog.get_logger()

#: What a server that does not start says in one line.
_REFUSALS = (
    StateDirectoryError,
    DatabaseRefusedError,
    ServiceError,
    BackendError,
    TlsError,
    TokenKeysError,
    OSError,
)


async def serve(
    config: ServerConfig,
    *,
    stop: asyncio.Event | None = None,
    on_drain: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then drain.

    The ranks start before the first gRPC object exists: starting them forks, and a fork with
    gRPC's threads alive can hang.

    Args:
        config: The settings.
        stop: Ends the server when it is set, also while the ranks start.
        on_drain: Called when the server begins to end.

    Raises:
        StateDirectoryError: Another server uses the state directory, or another user owns it.
        DatabaseRefusedError: The database is not to be had, or another version's.
        ServiceError: Another program holds the database.
        BackendError: The ranks do not start.
        OSError: An address cannot be had.
        TlsError: The certificates do not do.
        TokenKeysError: The public keys for tokens do not do.
    """
    stop = stop or asyncio.Event()
    read_certificates(config)  # before the ranks take time to start
    if config.jwt_keys is not None:
        read_keys(config.jwt_keys)
    require_free(config.address, "--address")
    if config.metrics_address is not None:
        require_free(config.metrics_address, "--metrics-address")
    use = sole_use if config.database_url is None else shared_use
    with use(config.state_dir) as state_dir:
        backend = open_backend(
            kind=config.backend,
            num_workers=config.workers,
            device=config.device,
            run_dir=state_dir.run,
            tuning=Tuning(
                schedule=config.schedule,
                compile=config.compile,
                compile_cache=state_dir.compile_cache,
            ),
        )
        stop_on_signals(stop)
        deps = await _unless(stop, on_drain, open_dependencies(config, state_dir, backend))
        if deps is None:
            log.info("stopped before the ranks had started")
            return
        adopt_loggers()  # of what the ranks have brought in
        endpoint: Endpoint | None = None
        try:
            from hvp_service.app.transport import start_transport

            stop_on_signals(stop)  # again: Ray puts its own handler in the place of ours
            if config.metrics_address is not None:
                endpoint = start_endpoint(deps, config.metrics_address)
            transport = await start_transport(deps)
            print(f"serving on {transport.address}", flush=True)
            log.info(
                "serving",
                address=transport.address,
                metrics_port=endpoint and endpoint.port,
                state_dir=str(state_dir.root),
                device=config.device,
                compile=config.compile,
                schedule=config.schedule,
            )
            await stop.wait()
            log.info("draining", grace_s=config.grace_s)
            on_drain()
            deps.drain.begin()
            # The running job needs its product's end, calls need theirs: both within one grace.
            await asyncio.gather(
                transport.stop(config.grace_s), deps.dispatcher.stop(config.grace_s)
            )
        finally:
            if endpoint is not None:
                await asyncio.to_thread(endpoint.close)
            await deps.close()
    log.info("stopped")


async def _unless(
    stop: asyncio.Event, on_stop: Callable[[], None], work: Coroutine[Any, Any, Result]
) -> Result | None:
    """The result of `work`, which is cancelled and gives None when `stop` is set before."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        on_stop()
        task.cancel()
        await asyncio.wait({task})
        return None
    finally:
        stopped.cancel()


def require_free(address: str, flag: str) -> None:
    """Refuse an address that another program listens at, before the ranks take time to start.

    Args:
        address: HOST:PORT.
        flag: What sets it.

    Raises:
        OSError: Another program listens at it, or this machine does not have it.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            problem = (
                f"another program listens there: stop it, or give another {flag}; port 0 takes "
                "a free one"
                if error.errno == errno.EADDRINUSE
                else f"{error.strerror} ({flag})"
            )
            raise OSError(f"cannot listen on {address}: {problem}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server in the main thread, and end the process with it.

    Returns:
        The exit status, when it could not serve.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before the first import of grpc
    keep_freed_memory()  # chunks of a megabyte would be mapped, and cleared, one by one
    os.umask(0o077)  # whatever this process and those it starts write is for this user alone
    try:
        command = parse_flags(sys.argv[1:] if argv is None else argv)
        settings = read_settings(command.values, command.file)
    except SettingsError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    if command.print_config:
        print("\n".join(settings.lines()))
        return 0
    config = settings.config
    if lost := lost_current_folder():  # in which libraries end the process as they are imported
        print(f"error: {lost}", file=sys.stderr)
        return 1
    configure_logs(config.log_level, config.log_format)
    try:
        latest_s = config.grace_s + LATEST_S
        asyncio.run(serve(config, on_drain=lambda: end_within(latest_s)))
    except _REFUSALS as error:
        print(f"error: {lost_current_folder() or error}", file=sys.stderr)
        return 1
    # What had to be closed is closed. A rank in a thread of this process may still compute, which
    # nobody can stop, and what it works with must not be taken apart under it; and the
    # interpreter's own tidying up takes seconds where Ray is loaded.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
