"""The state that a client's handles share: the connection, the project, and vectors to be freed."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, final

from hvp_protos.v1 import vector_pb2

from hvp_client._exceptions import FailedPreconditionError, HvpError, NotFoundError
from hvp_client._lease import Lease
from hvp_client._wire import Wire

Result = TypeVar("Result")


def new_request_id() -> str:
    """A new UUID; the server does what a request asks once for each id, however often it comes."""
    return str(uuid.uuid4())


@final
class Session:
    """One client's connection and bookkeeping."""

    def __init__(self, wire: Wire, project: str):
        self.wire = wire
        self.parent = f"projects/{project}"
        self.lease = Lease(wire, self.parent)
        # What parameter_tensors has learned, by the checkpoint's name.
        self.parameters: dict[str, Mapping[str, Any]] = {}
        # Names of vectors whose handles are gone. Garbage collection may run in any thread and in
        # the middle of anything, so all it does is append here.
        self.released: deque[str] = deque()

    async def make(self, call: Callable[[str], Coroutine[Any, Any, Result]]) -> Result:
        """Make vectors that belong to this client: they go with it, unless they are kept.

        Where the server has ended this client's session, because it heard nothing of the client
        for long, new vectors are made in another session; those of the ended one are gone.

        Args:
            call: Makes the vectors in the session of the name it is given; "" means in none.

        Returns:
            The result of `call`.
        """
        await self.free_released()
        name = await self.lease.name()
        try:
            return await call(name)
        except FailedPreconditionError as error:
            if error.reason != "SESSION_EXPIRED":
                raise
            self.lease.lose(name)
        return await call(await self.lease.name())

    async def close(self) -> None:
        """Free this client's vectors; the server itself frees later those where that fails."""
        if not await self.lease.end():
            await self.free_released()

    async def free_released(self) -> None:
        """Delete the vectors whose handles are gone; a failed deletion is tried the next time."""
        names = [self.released.popleft() for _ in range(len(self.released))]
        await gather_bounded(8, [partial(self._free, name) for name in names])

    async def _free(self, name: str) -> None:
        try:
            await self.delete_vector(name, patience_s=0.0)
        except NotFoundError:
            pass
        except HvpError:
            # The caller asked for something else, which this must not fail.
            self.released.append(name)

    async def delete_vector(self, name: str, *, patience_s: float | None = None) -> None:
        """Free one vector on the server.

        Args:
            name: Name of the vector.
            patience_s: How long to try; default `Retry.patience_s`.

        Raises:
            NotFoundError: No such vector.
        """
        await self.wire.unary(
            "VectorService/DeleteVector",
            vector_pb2.DeleteVectorRequest(name=name),
            vector_pb2.DeleteVectorResponse,
            patience_s=patience_s,
        )

    async def keep_vector(self, name: str) -> None:
        """Let one vector stay on the server until it is deleted.

        Raises:
            NotFoundError: No such vector.
        """
        await self.wire.unary(
            "VectorService/KeepVector",
            vector_pb2.KeepVectorRequest(name=name),
            vector_pb2.KeepVectorResponse,
            timeout_s=self.wire.timeout.compute_s,
        )


async def gather_bounded(
    limit: int, work: Iterable[Callable[[], Coroutine[Any, Any, Result]]]
) -> list[Result]:
    """Run coroutines, at most `limit` at once; the first failure cancels the rest.

    Args:
        limit: Most coroutines that run at once.
        work: Functions that make the coroutines.

    Returns:
        Their results, in the order of `work`.
    """
    gate = asyncio.Semaphore(limit)

    async def one(start: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with gate:
            return await start()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(start)) for start in work]
    except BaseExceptionGroup as failures:
        # Callers know single errors; the others were cancelled because of the first.
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
