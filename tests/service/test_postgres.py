"""PostgreSQL by URL: what is refused at start, what is never shown, and a server that goes away."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
import sqlalchemy as sa
from hvp_service.app.config import ServerConfig
from hvp_service.app.server import _REFUSALS, main, serve
from hvp_service.calls.errors import ServiceError
from hvp_service.storage import postgres as engine
from hvp_service.storage.database import Database, open_database, sessions
from hvp_service.storage.patience import until_done
from hvp_service.storage.troubles import DatabaseBusyError, DatabaseRefusedError
from pydantic import SecretStr, ValidationError

from tests.modules.postgres import PASSWORD, Server


async def add(database: Database, identifier: str) -> None:
    """Write one row."""
    async with database.writing() as connection:
        await connection.execute(
            sessions.insert().values(
                project="p", id=identifier, ttl_us=1, create_time=1, expire_time=1
            )
        )


async def ids(database: Database) -> list[str]:
    """What `add` has written."""
    async with database.reading() as connection:
        return sorted((await connection.scalars(sa.select(sessions.c.id))).all())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"user": "stranger"}, "does not let the server in .*HVP_DATABASE_URL"),
        ({"password": "wrong"}, "does not let the server in .*HVP_DATABASE_URL"),
        ({"database": "none"}, "no database at .*createdb"),
        ({"database": "hvp?sslmode=secret"}, "an option that the driver does not take"),
        ({"database": "hvp?sslmode=require"}, "no PostgreSQL server answers at .*SSL"),
    ],
)
async def test_a_url_that_does_not_lead_to_the_database_is_refused_in_one_sentence(
    postgres: Server, change: dict[str, str], what: str
) -> None:
    with pytest.raises(DatabaseRefusedError, match=what) as refused:
        await open_database(SecretStr(postgres.url(**change)))
    message = str(refused.value)
    assert "\n" not in message
    assert not any(secret in message for secret in ("wrong", "secret", PASSWORD, "p%40ss"))


@pytest.mark.parametrize(
    "address", ["no-such-host.invalid:5432", "127.0.0.1:1"], ids=["host", "port"]
)
async def test_a_host_or_port_where_nothing_answers_is_refused(address: str) -> None:
    with pytest.raises(DatabaseRefusedError, match=f"no PostgreSQL server answers at .*{address}"):
        await open_database(SecretStr(f"postgresql://hvp:secret@{address}/hvp"))


async def test_a_user_who_may_not_make_tables_is_told_what_to_grant(postgres: Server) -> None:
    url = await postgres.new_database()
    owner = await asyncpg.connect(url)
    await owner.execute("CREATE USER guest PASSWORD 'g'")
    await owner.close()
    guest = SecretStr(url.replace(postgres.url("").partition("@")[0], "postgresql://guest:g"))
    with pytest.raises(DatabaseRefusedError, match="GRANT USAGE, CREATE ON SCHEMA public"):
        await open_database(guest)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:geheim@host/name",
        "sqlite:///geheim",
        "geheim",
        "postgresql://user:gehe/im@host:port/name",
        "postgresql://user:geheim@[host/name",
    ],
)
def test_what_is_no_database_url_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ValidationError, match="postgresql://USER:PASSWORD@HOST:PORT/NAME") as error:
        ServerConfig(database_url=SecretStr(url))
    assert "gehe" not in str(error.value)


def test_a_servers_settings_do_not_show_the_password() -> None:
    config = ServerConfig(database_url=SecretStr("postgresql://me:geheim@host/name"))
    assert "geheim" not in f"{config} {config!r} {config.model_dump_json()}"
    shown = engine.shown_url("postgresql://me:geheim@h1:1,h2:2/name?password=geheim")
    assert shown == "postgresql://me@h1:1,h2:2/name"


def test_the_command_refuses_what_is_no_database_url_without_repeating_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--database-url", "mysql://user:geheim@host/name"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --database-url: a database URL is postgresql://USER:PASSWORD@")
    assert "geheim" not in line


async def test_a_server_does_not_start_without_its_database(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVP_DATABASE_URL", "postgresql://me:geheim@127.0.0.1:1/name")
    settings = config.model_dump(exclude={"database_url"})
    with pytest.raises(_REFUSALS, match="no PostgreSQL server answers at postgresql://me@") as said:
        await serve(ServerConfig(**settings))
    assert "geheim" not in str(said.value)


async def test_transactions_of_two_servers_run_one_after_the_other(postgres: Server) -> None:
    where = SecretStr(await postgres.emptied())
    first, second = await open_database(where), await open_database(where)
    inside = asyncio.Event()
    leave = asyncio.Event()

    async def stay() -> None:
        async with first.writing():
            inside.set()
            await leave.wait()

    staying = asyncio.create_task(stay())
    await inside.wait()
    waiting = asyncio.create_task(add(second, "later"))
    async with second.updating() as connection:  # which does not wait
        await connection.execute(sa.select(sessions).with_for_update())
    assert await ids(second) == []
    assert not waiting.done()
    leave.set()
    await asyncio.gather(staying, waiting)
    assert await ids(first) == ["later"]
    await first.close()
    await second.close()


async def test_a_writer_that_finds_no_turn_hears_that_the_database_is_not_to_be_had(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_PATIENCE_S", 0.1)
    where = SecretStr(await postgres.emptied())
    first, second = await open_database(where), await open_database(where)
    async with first.updating() as connection:
        await connection.execute(sa.text("LOCK TABLE sessions"))
        with pytest.raises(ServiceError, match=r"DATABASE_UNAVAILABLE: .*lock timeout"):
            await add(second, "never")
    await add(second, "later")
    assert await ids(first) == ["later"]
    await first.close()
    await second.close()


async def test_two_that_wait_for_each_other_do_not_wait_for_ever(postgres: Server) -> None:
    database = await open_database(SecretStr(await postgres.emptied()))
    for identifier in "ab":
        await add(database, identifier)
    barrier = asyncio.Barrier(2)

    async def lock(first: str, then: str) -> None:
        async with database.updating() as connection:
            for identifier in (first, then):
                row = sa.select(sessions).where(sessions.c.id == identifier).with_for_update()
                await connection.execute(row)
                if identifier == first:
                    await barrier.wait()

    outcomes = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    (refused,) = [each for each in outcomes if each is not None]
    assert isinstance(refused, DatabaseBusyError)
    assert "deadlock" in refused.message
    await database.close()


async def test_a_server_outlives_a_restart_of_its_database(postgres: Server) -> None:
    url = await postgres.emptied()
    database = await open_database(SecretStr(url))
    await asyncio.gather(*(add(database, str(number)) for number in range(5)))
    heard: list[None] = []
    database.signals.call("topic", lambda: heard.append(None))
    postgres.stop()
    try:
        for _ in range(3):
            with pytest.raises(ServiceError, match="DATABASE_UNAVAILABLE"):
                await add(database, "while it is down")
        with pytest.raises(ServiceError, match="DATABASE_UNAVAILABLE"):
            await ids(database)
    finally:
        postgres.start()
    await until_done(lambda: add(database, "up"))
    assert await ids(database) == [*map(str, range(5)), "up"]
    for _ in range(200):  # the listener comes back by itself
        if heard:
            break
        await asyncio.sleep(0.05)
    assert heard
    await database.close()


async def test_a_connection_that_is_cut_in_a_transaction_undoes_it(postgres: Server) -> None:
    url = await postgres.emptied()
    database = await open_database(SecretStr(url))

    async def be_cut() -> None:
        async with database.writing() as connection:
            await connection.execute(
                sessions.insert().values(
                    project="p", id="cut", ttl_us=1, create_time=1, expire_time=1
                )
            )
            killer = await asyncpg.connect(url)
            await killer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await killer.close()
            await connection.execute(sa.select(sessions))

    with pytest.raises(ServiceError, match="DATABASE_UNAVAILABLE"):
        await be_cut()
    assert await ids(database) == []
    await add(database, "next")
    await database.close()


async def test_news_reach_every_server_of_the_database_once_they_are_committed(
    postgres: Server,
) -> None:
    where = SecretStr(await postgres.emptied())
    first, second = await open_database(where), await open_database(where)
    await asyncio.wait_for(second.signals.event("listening").wait(), 10)  # rung when it listens
    event = second.signals.event("topic 'é'")

    async def undo() -> None:
        async with first.writing() as connection:
            first.tell(connection, "topic 'é'")
            raise RuntimeError("undone")

    with pytest.raises(RuntimeError, match="undone"):
        await undo()
    async with first.updating() as connection:
        first.tell(connection, "topic 'é'")
        await asyncio.sleep(0.05)
        assert not event.is_set()
    await asyncio.wait_for(event.wait(), 10)
    await first.close()
    await second.close()
