"""What a kind of database does its own way: connections, transactions, time and wake-ups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.storage.signals import Signals


class Engine(ABC):
    """Transactions on one kind of database.

    Attributes:
        is_shared: Whether other servers may use the database beside this one.
        where: The database in words, without a password.
        signals: Wake-ups of this process.
    """

    is_shared: bool

    def __init__(self, where: str) -> None:
        self.where = where
        self.signals = Signals()

    @abstractmethod
    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that sees one state of the rows."""

    @abstractmethod
    def writing(self, *, alone: bool) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that writes; `alone`, no other such one runs beside it on any server."""

    @abstractmethod
    def now(self) -> sa.ColumnElement[int]:
        """The database's time in a statement, in microseconds."""

    @abstractmethod
    async def announce(self, connection: AsyncConnection, topics: Collection[str]) -> None:
        """Tell the news of topics to other servers once the open transaction is committed."""

    @abstractmethod
    async def check(self) -> None:
        """Refuse a database that no server can start on.

        Raises:
            DatabaseRefusedError: The message says what to do.
            DatabaseBusyError: It may be another time.
        """

    @abstractmethod
    async def listen(self) -> None:
        """Begin to hear the news of other servers."""

    @abstractmethod
    async def shrink(self) -> None:
        """Give the room of deleted rows back to the disk."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection."""
