"""A TCP proxy that breaks connections when it is told to."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import final


@final
class Proxy:
    """Forwards bytes to an address; cuts every connection once a budget of upstream bytes is spent.

    Attributes:
        cuts: Byte counts, over all connections, at which all of them are reset.
        sent_bytes: What has gone from clients to the server.
    """

    def __init__(self, upstream: str, cuts: list[int] | None = None):
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self.cuts = list(cuts or [])
        self.sent_bytes = 0
        self.num_connections = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        self._writers |= {writer, upstream_writer}
        await asyncio.gather(
            self._copy(reader, upstream_writer, counted=True),
            self._copy(upstream_reader, writer, counted=False),
        )

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
                if counted:
                    self.sent_bytes += len(data)
                    if self.cuts and self.sent_bytes >= self.cuts[0]:
                        self.cuts.pop(0)
                        self.cut()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
