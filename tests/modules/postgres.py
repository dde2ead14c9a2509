"""A PostgreSQL server of the tests' own."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import asyncpg

PASSWORD = "p@ss/w?rd#%"  # noqa: S105  (every character that a URL would take for its own)
_QUOTED = "p%40ss%2Fw%3Frd%23%25"
_START_S = 60.0


@final
@dataclass
class Server:
    """A PostgreSQL server on a free port of loopback, of the user `hvp`.

    Attributes:
        folder: Its data.
        port: Its port.
        programs: Folder of PostgreSQL's programs.
    """

    folder: Path
    port: int
    programs: Path
    _process: subprocess.Popen[bytes] | None = None
    _databases: int = 0

    def url(self, database: str = "hvp", *, user: str = "hvp", password: str = _QUOTED) -> str:
        """URL of a database on it."""
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    async def emptied(self) -> str:
        """URL of a database with tables, once somebody has opened it, and without rows."""
        connection = await asyncpg.connect(self.url())
        try:
            tables = await connection.fetch(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            )
            for (table,) in tables:
                if table != "alembic_version":
                    await connection.execute(f"DELETE FROM {table}")  # noqa: S608
        finally:
            await connection.close()
        return self.url()

    async def new_database(self) -> str:
        """Make a database without tables, which takes a second, and return its URL."""
        self._databases += 1
        name = f"t{self._databases}"
        connection = await asyncpg.connect(self.url())
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()
        return self.url(name)

    def start(self) -> None:
        """Start it, and wait until it lets clients in."""
        command = [
            *(str(self.programs / "postgres"), "-D", str(self.folder)),
            *("-p", str(self.port), "-c", "listen_addresses=127.0.0.1"),
            *("-c", "unix_socket_directories=", "-c", "fsync=off"),
            *("-c", "max_connections=200", "-c", "shared_buffers=16MB"),
        ]
        with (self.folder.parent / "log").open("ab") as log:
            self._process = subprocess.Popen(_as_nobody(command), stderr=log, cwd="/")
        deadline = time.monotonic() + _START_S
        ready = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode:
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise AssertionError((self.folder.parent / "log").read_text())
            time.sleep(0.05)

    def stop(self) -> None:
        """Break every connection and stop it."""
        assert self._process is not None
        pid = int((self.folder / "postmaster.pid").read_text().split()[0])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 3)  # SIGQUIT: at once
        self._process.wait(_START_S)


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server for the block."""
    programs = _programs()
    root = Path(tempfile.mkdtemp(prefix="hvp-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(root, *_unprivileged())
        password = root / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        subprocess.run(
            _as_nobody(
                [
                    *(str(programs / "initdb"), "-D", str(root / "data"), "-U", "hvp", "-N"),
                    *("--auth=scram-sha-256", f"--pwfile={password}", "-E", "UTF8"),
                    "--locale=C",
                ]
            ),
            check=True,
            capture_output=True,
            cwd="/",
        )
        server = Server(root / "data", free_ports(1)[0], programs)
        server.start()
        try:
            subprocess.run(
                [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(server.port), "hvp"],
                env=os.environ | {"PGUSER": "hvp", "PGPASSWORD": PASSWORD},
                check=True,
            )
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _programs() -> Path:
    """The folder of PostgreSQL's programs, of the newest version."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"), key=_version)  # noqa: PTH207
    if on_path := shutil.which("initdb"):
        found.append(on_path)
    if not found:
        raise AssertionError(
            "the tests of the database start a PostgreSQL server, and its programs are neither in "
            "/usr/lib/postgresql/*/bin nor on PATH: install them (apt-get install postgresql)"
        )
    return Path(found[-1]).resolve().parent


def _version(path: str) -> float:
    return float(Path(path).parts[4])


def _unprivileged() -> tuple[int, int]:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return user.pw_uid, user.pw_gid
    raise AssertionError("PostgreSQL does not run as root, and there is no user to run it as")


def _as_nobody(command: list[str]) -> list[str]:
    """A command as a user that PostgreSQL accepts, which ends with this process."""
    setpriv = ["setpriv", "--pdeathsig=QUIT"]
    if os.geteuid() == 0:
        user, group = _unprivileged()
        setpriv += [f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    return [*setpriv, *command]


def free_ports(number: int) -> list[int]:
    """Ports of loopback at which nobody listens now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
