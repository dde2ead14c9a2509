"""What `hvp doctor` looks at where a server would run: its settings and all that they name.

What the server's own start would refuse is asked of the functions that refuse it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvp_client._address import DEFAULT_ADDRESS
from hvp_client.cli.findings import Finding

if TYPE_CHECKING:
    from hvp_service.app.config import ServerConfig

_SOON = datetime.timedelta(days=30)  # in which a certificate wants to be renewed
_CONTACT_S = 3.0
_CLOCK_S = 60.0  # by which clocks may differ without harm
_UNSYNCHRONISED = 5  # adjtimex's TIME_ERROR


def settings_of(file: Path | None) -> tuple[ServerConfig | None, list[Finding]]:
    """The settings that `hvp serve` would take from a file and the environment, if they do.

    Returns:
        None where they do not, or where no server is installed.
    """
    try:
        from hvp_service.app.flags import SettingsError
        from hvp_service.app.settings import read_settings
    except ImportError:  # a machine that only calls a server
        return None, []
    # It is also where clients look for a server, on whatever machine that is.
    elsewhere = file is None and bool(os.environ.get("HVP_ADDRESS"))
    try:
        settings = read_settings({"address": DEFAULT_ADDRESS} if elsewhere else {}, file)
    except SettingsError as error:
        return None, [
            Finding(
                what="configuration",
                verdict="problem",
                found=problem,
                fix="see `hvp serve --help`; `hvp serve --print-config` shows what is in force",
            )
            for problem in error.problems
        ]
    given = [
        f"{name} ({origin})"
        for name, origin in settings.origins.items()
        if origin not in ("default", "--address")
    ]
    found = ", ".join(given) or "every setting has its default"
    return settings.config, [Finding(what="configuration", verdict="ok", found=found)]


def examine_server(config: ServerConfig, state_dir: Path, answering: str) -> Iterator[Finding]:
    """Look at what a server with these settings needs.

    Args:
        config: The settings.
        state_dir: Its state folder.
        answering: Address of a server that answers; "" where none does.
    """
    from hvp_workers import surroundings

    if config.device == "cuda" and (lack := surroundings.no_gpu()):
        yield Finding(what=lack.what, verdict="problem", found=lack.problem, fix=lack.fix)
    yield from _certificates(config)
    yield from _ports(config, answering)
    yield from _database(config, state_dir)
    yield from _ray(config)
    yield from clock(state_dir)


def _certificates(config: ServerConfig) -> Iterator[Finding]:
    from cryptography import x509
    from hvp_service.app.tls import TlsError, read_certificates

    try:
        certificates = read_certificates(config)
    except TlsError as error:  # unreadable, expired, not of this key
        yield Finding(
            what="certificates", verdict="problem", found=str(error), fix="see docs/access.md"
        )
        return
    if certificates is None:
        return
    chains = {
        "tls_certificate": certificates.chain,
        "tls_client_ca": certificates.client_authorities,
    }
    for setting, pem in chains.items():
        if pem is None:
            continue
        first = min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(pem))
        left = first - datetime.datetime.now(datetime.UTC)
        verdict = "ok" if left > _SOON else "note" if left.total_seconds() > 0 else "problem"
        yield Finding(
            what="certificates",
            verdict=verdict,  # type: ignore[arg-type]
            found=f"{getattr(config, setting)} is valid until {first:%Y-%m-%d}, {left.days} days",
            fix="" if verdict == "ok" else "renew it, and start the server anew",
        )


def _ports(config: ServerConfig, answering: str) -> Iterator[Finding]:
    from hvp_service.app.server import require_free

    for name in ("address", "metrics_address"):
        address = getattr(config, name)
        if address is None:
            continue
        if answering:  # which has its ports
            continue
        try:
            require_free(address, f"--{name.replace('_', '-')}")
        except OSError as error:
            yield Finding(
                what="ports", verdict="problem", found=str(error), fix=f"set {name}, or stop it"
            )
        else:
            yield Finding(what="ports", verdict="ok", found=f"{address} is free ({name})")


def _database(config: ServerConfig, state_dir: Path) -> Iterator[Finding]:
    """Whether the rows can be had, are whole and are this version's; nothing is written."""
    if config.database_url is None:
        yield from _file(state_dir / "hvp.sqlite3")
        return
    from hvp_service.storage.postgres import PostgresEngine
    from hvp_service.storage.troubles import DatabaseRefusedError

    engine = PostgresEngine(config.database_url.get_secret_value())
    try:
        asyncio.run(engine.check())
    except DatabaseRefusedError as error:
        yield Finding(
            what="database", verdict="problem", found=str(error), fix="see docs/database.md"
        )
    else:
        yield Finding(what="database", verdict="ok", found=f"{engine.where} lets this machine in")


def _file(path: Path) -> Iterator[Finding]:
    from hvp_service.storage.migrate import standing_of

    if not path.exists():
        return
    revisions: list[str | None] = [None]
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_CONTACT_S)
        ) as rows:
            ((health,),) = rows.execute("PRAGMA quick_check(1)").fetchall()
            if rows.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
            ).fetchall():
                found = rows.execute("SELECT version_num FROM alembic_version").fetchall()
                revisions = [revision for (revision,) in found]
    except (sqlite3.Error, ValueError) as error:
        health = str(error)
    standing = standing_of(*revisions) if health == "ok" else ""
    if health != "ok":
        yield Finding(
            what="database",
            verdict="problem",
            found=f"{path} is damaged, or cannot be read: {health}",
            fix="give it back from a copy, or start with another --state-dir",
        )
    elif standing == "unknown":
        yield Finding(
            what="database",
            verdict="problem",
            found=f"{path} has tables of revision {revisions[0]}, which a newer server wrote",
            fix="use the server that wrote it, or an empty --state-dir",
        )
    else:
        size = path.stat().st_size / 2**20
        later = ", and is brought to this version's form at the next start"
        yield Finding(
            what="database",
            verdict="ok",
            found=f"{path} is whole, {size:.1f} MiB{later if standing == 'older' else ''}",
        )


def _ray(config: ServerConfig) -> Iterator[Finding]:
    """Whether the cluster that a server would join answers; its own cluster is not started."""
    address = os.environ.get("RAY_ADDRESS", "")
    if config.backend != "ray" or not address:
        return
    if address.startswith("ray://"):
        yield Finding(
            what="Ray",
            verdict="problem",
            found=f"RAY_ADDRESS={address} names a Ray Client proxy, which does not do",
            fix="run the server on a node of the cluster, with RAY_ADDRESS=HOST:PORT",
        )
        return
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # `auto` and `local` name no place
        return
    try:
        socket.create_connection((host, int(port)), _CONTACT_S).close()
    except OSError as error:
        yield Finding(
            what="Ray",
            verdict="problem",
            found=f"nothing answers at RAY_ADDRESS={address}: {error.strerror or error}",
            fix="start the cluster (`ray start --head`), or unset RAY_ADDRESS",
        )
    else:
        yield Finding(what="Ray", verdict="ok", found=f"a cluster answers at {address}")


def clock(state_dir: Path, now: float | None = None) -> Iterator[Finding]:
    """Whether the clock can be believed: leases, keys and certificates go by it.

    Args:
        state_dir: A state folder, whose files were written before now.
        now: Seconds since the epoch; None for what the clock says.
    """
    now = time.time() if now is None else now
    files = state_dir.glob("hvp.sqlite3*") if state_dir.is_dir() else ()
    ahead_s = max((path.stat().st_mtime - now for path in files), default=0.0)
    if ahead_s > _CLOCK_S:
        yield Finding(
            what="clock",
            verdict="problem",
            found=f"the state folder was written {ahead_s:.0f} s after now, by this clock",
            fix="set the clock: it was set back, or another machine's differs that wrote there",
        )
        return
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256))  # modes 0: only asks
    except (OSError, AttributeError):  # another system than Linux
        return
    synchronised = state not in (-1, _UNSYNCHRONISED)
    yield Finding(
        what="clock",
        verdict="ok" if synchronised else "note",
        found="synchronised" if synchronised else "the kernel knows of nothing that keeps it right",
        fix=""
        if synchronised
        else "run chrony or systemd-timesyncd, unless the host of this machine does",
    )
