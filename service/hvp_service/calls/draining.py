"""Refuses new calls while the server goes down."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from hvp_service.app.drain import Drain
from hvp_service.calls.around import AroundInterceptor


class DrainingInterceptor(AroundInterceptor):
    """Refuses new calls while the server goes down.

    It stands inside of the error interceptor, so that the refusal has its details.
    """

    def __init__(self, drain: Drain):
        self._drain = drain

    @contextlib.asynccontextmanager
    async def around(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[None]:
        """See the class."""
        with self._drain.call():
            yield
