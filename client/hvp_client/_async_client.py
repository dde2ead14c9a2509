"""The client itself: every call is written here, once, as a coroutine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar, final

from hvp_protos.v1 import blob_pb2, checkpoint_pb2, data_batch_pb2, job_pb2, system_pb2, vector_pb2

from hvp_client._async_job import AsyncJob
from hvp_client._async_operator import AsyncOperator, open_operator
from hvp_client._async_vector import AsyncVector
from hvp_client._batches import Batch, batch_from_proto, upload_batch
from hvp_client._blobs import Blob, ProgressCallback, blob_from_proto
from hvp_client._checkpoints import Checkpoint, checkpoint_from_proto, upload_checkpoint
from hvp_client._exceptions import HvpError
from hvp_client._names import name_of
from hvp_client._results import state_values
from hvp_client._session import Session
from hvp_client._settings import Retry, Timeout
from hvp_client._specs import operator_spec
from hvp_client._system import (
    ServerInfo,
    WorkerGroup,
    server_info_from_proto,
    worker_group_from_proto,
)
from hvp_client._wire import Wire

DEFAULT_ADDRESS = "127.0.0.1:8471"


@final
class AsyncClient:
    """A connection to a server, inside an event loop; its twin Client describes the methods.

    Same names as Client's, awaited; arithmetic and products are awaited too: `w = await (H @ v)`.
    Connections are opened at the first call and belong to the loop it is made in.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        project: str = "default",
        timeout: Timeout | None = None,
        retry: Retry | None = None,
    ):
        self._session = Session(Wire(address, timeout or Timeout(), retry or Retry()), project)

    @property
    def address(self) -> str:
        """Of the server."""
        return self._session.wire.address

    async def close(self) -> None:
        """As Client.close."""
        try:
            # Vectors are freed out of politeness to a server that may be gone.
            async with asyncio.timeout(2.0):
                await self._session.close()
        except (HvpError, TimeoutError):
            pass
        finally:
            await self._session.wire.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def upload_checkpoint(
        self, directory: str | os.PathLike[str], progress: ProgressCallback | None = None
    ) -> Checkpoint:
        """As Client.upload_checkpoint."""
        return await upload_checkpoint(self._session, directory, progress)

    async def upload_batch(self, batch: Mapping[str, Any]) -> Batch:
        """As Client.upload_batch."""
        return await upload_batch(self._session, batch)

    async def operator(
        self,
        checkpoint: Checkpoint | str,
        batch: Batch | str,
        kind: str = "hessian",
        dtype: Any = "float32",
        micro_batch_size: int | None = None,
        precision: str | None = None,
    ) -> AsyncOperator:
        """As Client.operator."""
        spec = operator_spec(checkpoint, batch, kind, dtype, micro_batch_size, precision)
        return await open_operator(self._session, spec)

    async def checkpoint(self, name: str) -> Checkpoint:
        """As Client.checkpoint."""
        answer = await self._session.wire.unary(
            "CheckpointService/GetCheckpoint",
            checkpoint_pb2.GetCheckpointRequest(name=name_of(name, "name")),
            checkpoint_pb2.GetCheckpointResponse,
        )
        return checkpoint_from_proto(answer.checkpoint)

    async def checkpoints(self) -> list[Checkpoint]:
        """As Client.checkpoints."""
        pages = await self._pages(
            "CheckpointService/ListCheckpoints",
            lambda token: checkpoint_pb2.ListCheckpointsRequest(
                parent=self._session.parent, page_token=token
            ),
            checkpoint_pb2.ListCheckpointsResponse,
        )
        return [checkpoint_from_proto(message) for page in pages for message in page.checkpoints]

    async def delete_checkpoint(self, name: Checkpoint | str) -> None:
        """As Client.delete_checkpoint."""
        await self._session.wire.unary(
            "CheckpointService/DeleteCheckpoint",
            checkpoint_pb2.DeleteCheckpointRequest(name=name_of(name, "name")),
            checkpoint_pb2.DeleteCheckpointResponse,
        )

    async def batch(self, name: str) -> Batch:
        """As Client.batch."""
        answer = await self._session.wire.unary(
            "DataBatchService/GetDataBatch",
            data_batch_pb2.GetDataBatchRequest(name=name_of(name, "name")),
            data_batch_pb2.GetDataBatchResponse,
        )
        return batch_from_proto(answer.data_batch)

    async def batches(self) -> list[Batch]:
        """As Client.batches."""
        pages = await self._pages(
            "DataBatchService/ListDataBatches",
            lambda token: data_batch_pb2.ListDataBatchesRequest(
                parent=self._session.parent, page_token=token
            ),
            data_batch_pb2.ListDataBatchesResponse,
        )
        return [batch_from_proto(message) for page in pages for message in page.data_batches]

    async def delete_batch(self, name: Batch | str) -> None:
        """As Client.delete_batch."""
        await self._session.wire.unary(
            "DataBatchService/DeleteDataBatch",
            data_batch_pb2.DeleteDataBatchRequest(name=name_of(name, "name")),
            data_batch_pb2.DeleteDataBatchResponse,
        )

    async def blobs(self) -> list[Blob]:
        """As Client.blobs."""
        pages = await self._pages(
            "BlobService/ListBlobs",
            lambda token: blob_pb2.ListBlobsRequest(parent=self._session.parent, page_token=token),
            blob_pb2.ListBlobsResponse,
        )
        return [blob_from_proto(message) for page in pages for message in page.blobs]

    async def delete_blob(self, name: Blob | str) -> None:
        """As Client.delete_blob."""
        await self._session.wire.unary(
            "BlobService/DeleteBlob",
            blob_pb2.DeleteBlobRequest(name=name_of(name, "name")),
            blob_pb2.DeleteBlobResponse,
        )

    async def vector(self, name: str) -> AsyncVector:
        """As Client.vector."""
        answer = await self._session.wire.unary(
            "VectorService/GetVector",
            vector_pb2.GetVectorRequest(name=name_of(name, "name")),
            vector_pb2.GetVectorResponse,
        )
        return AsyncVector(self._session, answer.vector, temporary=False)

    async def vectors(self) -> list[AsyncVector]:
        """As Client.vectors."""
        pages = await self._pages(
            "VectorService/ListVectors",
            lambda token: vector_pb2.ListVectorsRequest(
                parent=self._session.parent, page_token=token
            ),
            vector_pb2.ListVectorsResponse,
        )
        return [
            AsyncVector(self._session, message, temporary=False)
            for page in pages
            for message in page.vectors
        ]

    async def job(self, name: str) -> AsyncJob[Any]:
        """As Client.job."""
        answer = await self._session.wire.unary(
            "JobService/GetJob",
            job_pb2.GetJobRequest(name=name_of(name, "name")),
            job_pb2.GetJobResponse,
        )
        return AsyncJob(self._session, answer.job)

    async def jobs(self, states: Iterable[str] | None = None) -> list[AsyncJob[Any]]:
        """As Client.jobs."""
        wanted = [value for state in states or () for value in state_values(state)]
        pages = await self._pages(
            "JobService/ListJobs",
            lambda token: job_pb2.ListJobsRequest(
                parent=self._session.parent, page_token=token, states=wanted
            ),
            job_pb2.ListJobsResponse,
        )
        return [AsyncJob(self._session, message) for page in pages for message in page.jobs]

    async def server_info(self) -> ServerInfo:
        """As Client.server_info."""
        answer = await self._session.wire.unary(
            "SystemService/GetServerInfo",
            system_pb2.GetServerInfoRequest(),
            system_pb2.GetServerInfoResponse,
        )
        return server_info_from_proto(answer)

    async def worker_groups(self) -> list[WorkerGroup]:
        """As Client.worker_groups."""
        answer = await self._session.wire.unary(
            "SystemService/ListWorkerGroups",
            system_pb2.ListWorkerGroupsRequest(parent=self._session.parent),
            system_pb2.ListWorkerGroupsResponse,
        )
        return [worker_group_from_proto(message) for message in answer.worker_groups]

    async def _pages(
        self, method: str, request: Callable[[str], Any], response: type[PageT]
    ) -> list[PageT]:
        pages: list[PageT] = []
        token = ""
        while token or not pages:
            page = await self._session.wire.unary(method, request(token), response)
            pages.append(page)
            token = page.next_page_token
        return pages

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"


PageT = TypeVar("PageT", bound=Any)
