"""Pages of a list: sizes, and tokens that only this server can have made for this very list."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.calls.errors import ServiceError

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_TAG_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class PageRequest:
    """The page that a List call asks for: size 0 is the default, token "" the first page."""

    size: int = 0
    token: str = ""


@dataclass(frozen=True)
class Pager:
    """Reads and signs page tokens.

    A token holds the key (create_time, id) of the last row of its page, so rows that come or go
    between two calls never repeat or hide others.
    """

    key: bytes

    def _tag(self, scope: str, body: bytes) -> bytes:
        return hmac.digest(self.key, hashlib.sha256(scope.encode()).digest() + body, "sha256")[
            :_TAG_BYTES
        ]

    def token(self, scope: str, last: tuple[int, str]) -> str:
        """Token of the page after `last`, good for the same scope only."""
        body = json.dumps(last).encode()
        return base64.urlsafe_b64encode(self._tag(scope, body) + body).decode()

    def last(self, scope: str, token: str) -> tuple[int, str] | None:
        """Key that the page follows; None on the first page.

        Raises:
            ServiceError: PAGE_TOKEN_INVALID.
        """
        if not token:
            return None
        try:
            raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        tag, body = raw[:_TAG_BYTES], raw[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(scope, body)):
            raise ServiceError(
                "PAGE_TOKEN_INVALID",
                "The page token is not one that this server gave for this list; "
                "start again without it.",
                field="page_token",
            )
        create_time, identifier = json.loads(body)
        return int(create_time), str(identifier)

    async def fetch(
        self,
        connection: AsyncConnection,
        table: sa.Table,
        page: PageRequest,
        *,
        scope: str,
        where: Sequence[sa.ColumnElement[bool]],
        id_column: str = "id",
        newest_first: bool = False,
    ) -> tuple[list[sa.Row[Any]], str]:
        """One page of a table in order of (create_time, id).

        Args:
            connection: Connection of an open transaction.
            table: Table that has `create_time` and `id_column`.
            page: Size and token of the page.
            scope: Name of the list and its filter; a token of another scope is refused.
            where: Conditions of the filter.
            id_column: Column that breaks ties of creation time.
            newest_first: Whether the order is descending.

        Returns:
            The rows, and the next page's token or "".

        Raises:
            ServiceError: PAGE_SIZE_INVALID, PAGE_TOKEN_INVALID.
        """
        if page.size < 0:
            raise ServiceError("PAGE_SIZE_INVALID", "A page size is 0 or more.", field="page_size")
        size = min(page.size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        keys = (table.c.create_time, table.c[id_column])
        query = sa.select(table).where(*where).limit(size + 1)
        if (last := self.last(scope, page.token)) is not None:
            here, there = sa.tuple_(*keys), sa.tuple_(*(sa.literal(value) for value in last))
            query = query.where(here < there if newest_first else here > there)
        query = query.order_by(*(key.desc() if newest_first else key for key in keys))
        rows = list((await connection.execute(query)).all())
        if len(rows) <= size:
            return rows, ""
        final = rows[size - 1]
        return rows[:size], self.token(scope, (final.create_time, getattr(final, id_column)))
