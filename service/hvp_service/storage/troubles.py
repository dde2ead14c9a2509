"""Why rows cannot be had: for a while, or from this database not at all."""

from __future__ import annotations

from hvp_service.calls.errors import ServiceError
from hvp_service.metrics import instruments

_RETRY_AFTER_S = 5.0


class DatabaseBusyError(ServiceError):
    """The database cannot be used at present; unless it says otherwise, nothing has happened."""

    def __init__(self, why: str):
        instruments.DATABASE_BUSY.inc()
        super().__init__(
            "STATE_DIR_BUSY",
            f"The state folder's database cannot be used at present ({why}): its disk is slow or "
            "full, or another program holds it. Call again.",
            retry_after_s=_RETRY_AFTER_S,
        )


class DatabaseUnavailableError(DatabaseBusyError):
    """The server of the database does not answer, or does not do now what it can do later.

    A transaction that was about to end when the connection broke may have had its effect.
    """

    def __init__(self, why: str):
        instruments.DATABASE_BUSY.inc()
        ServiceError.__init__(
            self,
            "DATABASE_UNAVAILABLE",
            f"The server's database cannot be used at present ({why}). Call again, with the same "
            "request id where there is one.",
            retry_after_s=_RETRY_AFTER_S,
        )


class DatabaseRefusedError(Exception):
    """The server cannot start on this database; the message says what to do."""


class SchemaVersionError(DatabaseRefusedError):
    """The database was written by another version."""
