from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.storage.state_dir import StateDir, sole_use
from pydantic import SecretStr

from tests.modules import postgres as postgres_server
from tests.service.quadratic_backend import QuadraticBackend


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig(
        address="127.0.0.1:0",
        state_dir=tmp_path / "state",
        workers=1,
        backend="inprocess",
        grace_s=2.0,
        commit_interval_bytes=4000,
        heartbeat_s=0.2,
        progress_interval_s=0.0,
    )


@pytest.fixture
def state_dir(config: ServerConfig) -> Iterator[StateDir]:
    with sole_use(config.state_dir) as state:
        yield state


@pytest.fixture
async def backend() -> QuadraticBackend:
    return QuadraticBackend()


@pytest.fixture
async def deps(
    config: ServerConfig, state_dir: StateDir, backend: QuadraticBackend
) -> AsyncIterator[Dependencies]:
    opened = await open_dependencies(config, state_dir, backend)
    yield opened
    await opened.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.Server]:
    with postgres_server.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | SecretStr:
    """Where a database without rows is: in a file, and on a server."""
    if request.param == "sqlite":
        return tmp_path / "rows.sqlite3"
    server: postgres_server.Server = request.getfixturevalue("postgres")
    return SecretStr(await server.emptied())
