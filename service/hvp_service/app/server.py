"""The server process: the order in which its parts start, and how it ends."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import structlog
from hvp_workers.allocator import keep_freed_memory
from hvp_workers.backend import BackendError, Tuning
from hvp_workers.opening import open_backend
from hvp_workers.surroundings import lost_current_folder
from pydantic import ValidationError

from hvp_service.app.config import ServerConfig, split_address
from hvp_service.app.dependencies import open_dependencies
from hvp_service.app.tls import TlsError, read_certificates
from hvp_service.calls.errors import ServiceError
from hvp_service.identity.tokens import TokenKeysError, read_keys
from hvp_service.storage.state_dir import StateDirectoryError, shared_use, sole_use
from hvp_service.storage.troubles import DatabaseRefusedError

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


async def serve(config: ServerConfig, *, stop: asyncio.Event | None = None) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then drain.

    The ranks start before the first gRPC object exists: starting them forks, and a fork with
    gRPC's threads alive can hang.

    Raises:
        StateDirectoryError: Another server uses the state directory, or another user owns it.
        DatabaseRefusedError: The database is not to be had, or another version's.
        ServiceError: Another program holds the database.
        BackendError: The ranks do not start.
        OSError: The address cannot be had.
        TlsError: The certificates do not do.
        TokenKeysError: The public keys for tokens do not do.
    """
    stop = stop or asyncio.Event()
    read_certificates(config)  # before the ranks take time to start
    if config.jwt_keys is not None:
        read_keys(config.jwt_keys)
    require_free(config.address)
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
        _stop_on_signals(stop)
        deps = await open_dependencies(config, state_dir, backend)
        try:
            from hvp_service.app.transport import start_transport

            _stop_on_signals(stop)  # again: Ray puts its own handler in the place of ours
            transport = await start_transport(deps)
            print(f"serving on {transport.address}", flush=True)
            log.info(
                "serving",
                address=transport.address,
                state_dir=str(state_dir.root),
                device=config.device,
                compile=config.compile,
                schedule=config.schedule,
            )
            await stop.wait()
            log.info("draining", grace_s=config.grace_s)
            deps.drain.begin()
            # The running job needs its product's end, calls need theirs: both within one grace.
            await asyncio.gather(
                transport.stop(config.grace_s), deps.dispatcher.stop(config.grace_s)
            )
        finally:
            await deps.close()
    log.info("stopped")


def require_free(address: str) -> None:
    """Refuse an address that another program listens at, before the ranks take time to start.

    Args:
        address: HOST:PORT.

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
                "another program listens there: stop it, or give another --address; port 0 takes "
                "a free one"
                if error.errno == errno.EADDRINUSE
                else error.strerror
            )
            raise OSError(f"cannot listen on {address}: {problem}") from None


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)


def configure_logs() -> None:
    """Structured lines on stderr: for people on a terminal, JSON elsewhere."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer()
            if sys.stderr.isatty()
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _parse(argv: Sequence[str]) -> ServerConfig:
    parser = argparse.ArgumentParser(
        prog="hvp serve",
        description="Serve curvature products over gRPC.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--address", help="HOST:PORT; port 0 takes a free one")
    parser.add_argument("--tls-certificate", help="PEM file: connections are encrypted")
    parser.add_argument("--tls-key", help="PEM file of the certificate's private key")
    parser.add_argument("--tls-client-ca", help="PEM file: only its clients are let in")
    parser.add_argument("--state-dir", help="where uploads, jobs and vectors are kept")
    parser.add_argument(
        "--database-url",
        help="postgresql://USER:PASSWORD@HOST:PORT/NAME; better in HVP_DATABASE_URL, where other "
        "users of this machine do not see it",
    )
    parser.add_argument("--workers", type=int, help="ranks of the worker group")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--backend", choices=["ray", "inprocess"])
    parser.add_argument(
        "--compile", choices=["auto", "on", "off"], help="compile blocks at the first product"
    )
    parser.add_argument(
        "--schedule",
        choices=["auto", "lean", "fast", "cached"],
        help="what a product keeps of its way forward",
    )
    parser.add_argument("--grace-s", type=float, help="time for running calls after SIGTERM")
    return ServerConfig(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server in the main thread, and end the process with it.

    Returns:
        The exit status, when it could not serve.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before the first import of grpc
    keep_freed_memory()  # chunks of a megabyte would be mapped, and cleared, one by one
    os.umask(0o077)  # whatever this process and those it starts write is for this user alone
    try:
        config = _parse(sys.argv[1:] if argv is None else argv)
    except ValidationError as error:
        for problem in error.errors():
            where = "".join(f"{part}: " for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            print(f"error: {where}{message}", file=sys.stderr)
        return 2
    if lost := lost_current_folder():  # in which libraries end the process as they are imported
        print(f"error: {lost}", file=sys.stderr)
        return 1
    configure_logs()
    try:
        asyncio.run(serve(config))
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
