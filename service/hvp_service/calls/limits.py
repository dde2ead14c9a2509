"""Limits on calls that last, so that there is always room for those that do not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Literal

import grpc.aio

from hvp_service.calls.around import LIBRARY_STREAMS, SERVED_PREFIX, AroundInterceptor
from hvp_service.calls.errors import ServiceError

Pool = Literal["prompt", "waiting", "working", "open"]

RETRY_AFTER_S = 5.0
MOST_OPEN = 100

_WORDS: dict[Pool, str] = {
    "waiting": "wait for something to happen",
    "working": "work or bring bytes",
    "open": "watch the health or ask for descriptions",
}

# Calls that wait until something happens: for minutes, at no cost but their place.
_WAITING = frozenset({"JobService/WatchJob", "JobService/WaitJob"})
# Calls that wait for nothing but rows. Whatever is not named here may last: it brings bytes, or has
# to wait for the ranks.
_PROMPT = frozenset(
    {
        "BlobService/CancelUpload",
        "BlobService/DeleteBlob",
        "BlobService/FindMissingBlobs",
        "BlobService/GetBlob",
        "BlobService/GetUpload",
        "BlobService/ListBlobs",
        "BlobService/StartUpload",
        "CheckpointService/GetCheckpoint",
        "CheckpointService/ListCheckpoints",
        "CheckpointService/UpdateCheckpoint",
        "DataBatchService/DeleteDataBatch",
        "DataBatchService/GetDataBatch",
        "DataBatchService/ListDataBatches",
        "JobService/CancelJob",
        "JobService/GetJob",
        "JobService/ListJobs",
        "JobService/UpdateJob",
        "KeyService/CreateKey",
        "KeyService/ListKeys",
        "KeyService/RevokeKey",
        "SessionService/CreateSession",
        "SessionService/EndSession",
        "SessionService/RenewSession",
        "SystemService/GetQueue",
        "SystemService/GetServerInfo",
        "SystemService/WhoAmI",
        "VectorService/GetVector",
        "VectorService/ListVectors",
    }
)


def pool_of(method: str) -> Pool:
    """The pool in which a call of `/package.Service/Method` counts."""
    if method.startswith(LIBRARY_STREAMS):
        return "open"  # to strangers too, who must not take the places of others
    name = method.removeprefix(SERVED_PREFIX)
    if name in _WAITING:
        return "waiting"
    return "prompt" if name in _PROMPT else "working"


class LimitInterceptor(AroundInterceptor):
    """Refuses calls that last when there are many, with a delay; prompt ones always have room.

    Args:
        max_waiting: Most calls at once that wait for an event.
        max_working: Most calls at once that bring bytes or wait for the ranks.
    """

    prefixes = (SERVED_PREFIX, *LIBRARY_STREAMS)

    def __init__(self, *, max_waiting: int, max_working: int):
        self._limits: dict[Pool, int] = {
            "waiting": max_waiting,
            "working": max_working,
            "open": MOST_OPEN,
        }
        self._running: Counter[Pool] = Counter()

    @contextlib.asynccontextmanager
    async def around(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[None]:
        """See the class."""
        pool = pool_of(method)
        limit = self._limits.get(pool)
        if limit is not None and self._running[pool] >= limit:
            raise ServiceError(
                "TOO_MANY_CALLS",
                f"{limit} calls that {_WORDS[pool]} run already, which is this server's limit; "
                "call again later, or ask now and then with a call that answers at once.",
                metadata={"limit": str(limit)},
                retry_after_s=RETRY_AFTER_S,
            )
        self._running[pool] += 1
        try:
            yield
        finally:
            self._running[pool] -= 1
