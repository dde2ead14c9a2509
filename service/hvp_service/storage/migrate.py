"""Brings a database's tables to the form that this version works with."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from hvp_service.storage.troubles import DatabaseRefusedError, SchemaVersionError

_SCRIPTS: Final = Path(__file__).parent / "migrations"
_FIRST: Final = "0001"  # the tables of 0.1
_FIRST_NUMBER: Final = 1  # which is what 0.1 wrote of its own, and every version since has kept


def migrate(connection: sa.Connection, where: str) -> None:
    """Run the revisions that a database lacks, inside an open transaction that is alone.

    Args:
        connection: The transaction's connection.
        where: The database in words.

    Raises:
        SchemaVersionError: The database was written by a version that this one does not know.
        DatabaseRefusedError: The user of the database may not make tables.
    """
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    present = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(config)
    if present == scripts.get_current_head():
        return
    _require_known(scripts, present, where)
    try:
        if present is None and sa.inspect(connection).has_table("server"):
            _require_first(connection, where)
            command.stamp(config, _FIRST)
        command.upgrade(config, "head")
    except sa.exc.ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != "42501":  # insufficient_privilege
            raise
        raise DatabaseRefusedError(
            f"the user of {where} may not make the tables that this version needs: as the owner of "
            "the database, GRANT USAGE, CREATE ON SCHEMA public TO that user, and make it the "
            "owner of the tables"
        ) from None


def standing_of(revision: str | None) -> Literal["current", "older", "unknown"]:
    """What a server would make of a database's tables: use them, bring them up to date, or refuse.

    Args:
        revision: What the table `alembic_version` says; None where there is none.
    """
    scripts = ScriptDirectory(str(_SCRIPTS))
    if revision == scripts.get_current_head():
        return "current"
    if revision is None:
        return "older"
    try:
        scripts.get_revision(revision)
    except CommandError:
        return "unknown"
    return "older"


def _require_known(scripts: ScriptDirectory, present: str | None, where: str) -> None:
    if standing_of(present) == "unknown":
        raise SchemaVersionError(
            f"{where} has tables of revision {present}, and the newest that this server knows is "
            f"{scripts.get_current_head()}: use the version of the server that wrote it, or one "
            "that is newer, or another database"
        )


def _require_first(connection: sa.Connection, where: str) -> None:
    number = connection.execute(sa.text("SELECT schema_version FROM server")).scalar()
    if number not in (None, _FIRST_NUMBER):
        raise SchemaVersionError(
            f"{where} has schema version {number}, this server writes {_FIRST_NUMBER}; use the "
            "server that wrote it, or an empty --state-dir"
        )
