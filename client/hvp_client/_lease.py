"""The lease of a client: its session on the server, which owns its vectors while it is renewed."""

from __future__ import annotations

import asyncio
import uuid
import weakref
from typing import final

from google.protobuf.duration_pb2 import Duration
from hvp_protos.v1 import session_pb2

from hvp_client._exceptions import HvpError, UnimplementedError
from hvp_client._wire import Wire

_RENEWALS_PER_TTL = 3
_TRIES_PER_RENEWAL = 4


@final
class Lease:
    """One client's session, opened with its first vector.

    Law: while the client's loop runs and the server answers, the session is there; when the client
    is closed, or gone in whatever way, the server ends the session and deletes its vectors.

    Args:
        wire: The connections to the server.
        parent: The project of the session, `projects/{project}`.
    """

    def __init__(self, wire: Wire, parent: str):
        self.wire = wire
        self._parent = parent
        self._name = ""
        self._served = True
        self._opening = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None

    async def name(self) -> str:
        """The session's name; "" when the server is of a version without sessions.

        Raises:
            HvpError: As CreateSession says.
        """
        async with self._opening:
            if self._served and not self._name:
                await self._open()
        return self._name

    async def _open(self) -> None:
        request = session_pb2.CreateSessionRequest(
            parent=self._parent, request_id=str(uuid.uuid4())
        )
        if self.wire.timeout.lease_s is not None:
            ttl = Duration()
            ttl.FromMilliseconds(max(1, round(1000 * self.wire.timeout.lease_s)))
            request.ttl.CopyFrom(ttl)
        try:
            answer = await self.wire.unary(
                "SessionService/CreateSession", request, session_pb2.CreateSessionResponse
            )
        except UnimplementedError:
            self._served = False
            return
        self._name = answer.session.name
        ttl_s = answer.session.ttl.ToMilliseconds() / 1000
        # The task must not be what keeps a forgotten client alive, and its session with it.
        self._renewal = asyncio.create_task(_renew(weakref.ref(self), self._name, ttl_s))

    def lose(self, name: str) -> None:
        """Note that the session of this name has ended, so that another is opened when needed."""
        if self._name == name:
            self._name = ""

    def holds(self, name: str) -> bool:
        """Whether the session of this name is still the client's."""
        return self._name == name

    async def end(self) -> bool:
        """End the session and with it every vector that belongs to it.

        Returns:
            Whether the server knows of sessions; one that does not keeps vectors until each of
            them is deleted.

        Raises:
            HvpError: The server does not answer; it ends the session by itself.
        """
        if self._renewal is not None:
            self._renewal.cancel()
        name, self._name = self._name, ""
        if name:
            await self.wire.unary(
                "SessionService/EndSession",
                session_pb2.EndSessionRequest(name=name),
                session_pb2.EndSessionResponse,
                patience_s=0.0,
            )
        return self._served


async def _renew(lease: weakref.ref[Lease], name: str, ttl_s: float) -> None:
    """Renew a session again and again, until it is lost or nobody refers to its client."""
    pause_s = ttl_s / _RENEWALS_PER_TTL
    while True:
        await asyncio.sleep(pause_s)
        holder = lease()
        if holder is None or not holder.holds(name):
            return
        pause_s = ttl_s / _RENEWALS_PER_TTL
        try:
            await holder.wire.unary(
                "SessionService/RenewSession",
                session_pb2.RenewSessionRequest(name=name),
                session_pb2.RenewSessionResponse,
                timeout_s=pause_s,
                patience_s=0.0,
            )
        except HvpError as error:
            if error.reason == "SESSION_EXPIRED":
                holder.lose(name)
                return
            pause_s /= _TRIES_PER_RENEWAL  # whatever it was, there is time for more tries
        del holder
