"""What a project has on the server: looked up, listed and deleted, by name."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from hvp_protos.v1 import (
    blob_pb2,
    checkpoint_pb2,
    data_batch_pb2,
    job_pb2,
    key_pb2,
    system_pb2,
    vector_pb2,
)

from hvp_client._batches import Batch, batch_from_proto
from hvp_client._blobs import Blob, blob_from_proto
from hvp_client._checkpoints import Checkpoint, checkpoint_from_proto, get_checkpoint
from hvp_client._identities import ApiKey, Caller, caller_from_proto, key_from_proto
from hvp_client._labels import check_labels
from hvp_client._names import name_of
from hvp_client._results import state_values
from hvp_client._session import Session
from hvp_client._system import (
    ServerInfo,
    WorkerGroup,
    server_info_from_proto,
    worker_group_from_proto,
)
from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.vector import AsyncVector

_EVERY_PROJECT = "projects/-"


class AsyncCatalogue(ABC):
    """The checkpoints, batches, blobs, vectors and jobs of a project, and facts of the server."""

    _session: Session

    async def checkpoint(self, name: str) -> Checkpoint:
        """Look up a checkpoint; NotFoundError if there is none of that name."""
        return await get_checkpoint(self._session, name_of(name, "name"))

    async def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints of the project, without their parameters."""
        pages = await self._pages(
            "CheckpointService/ListCheckpoints",
            lambda token: checkpoint_pb2.ListCheckpointsRequest(
                parent=self._session.parent, page_token=token
            ),
            checkpoint_pb2.ListCheckpointsResponse,
        )
        return [checkpoint_from_proto(message) for page in pages for message in page.checkpoints]

    async def relabel_checkpoint(
        self, name: Checkpoint | str, labels: Mapping[str, str], *, etag: str | None = None
    ) -> Checkpoint:
        """Give a checkpoint other labels, in the place of all that it has.

        Args:
            name: A checkpoint or its name.
            labels: At most 64 labels; names and values have at most 256 characters each.
            etag: `checkpoint.etag` of the labels to replace: the call fails if they have changed
                since. None replaces whatever labels there are.

        Returns:
            The checkpoint, without its parameters.

        Raises:
            NotFoundError: No such checkpoint.
            InvalidArgumentError: `LABELS_INVALID`.
            AbortedError: `ETAG_MISMATCH`: the labels have changed; look the checkpoint up again.
        """
        answer = await self._session.wire.unary(
            "CheckpointService/UpdateCheckpoint",
            checkpoint_pb2.UpdateCheckpointRequest(
                checkpoint=checkpoint_pb2.Checkpoint(
                    name=name_of(name, "name"), labels=check_labels(labels)
                ),
                update_mask=FieldMask(paths=["labels"]),
                etag=etag or "",
            ),
            checkpoint_pb2.UpdateCheckpointResponse,
        )
        return checkpoint_from_proto(answer.checkpoint)

    async def delete_checkpoint(self, name: Checkpoint | str) -> None:
        """Delete a checkpoint, its vectors, and the files that nothing else is made of.

        Raises:
            NotFoundError: No such checkpoint.
            FailedPreconditionError: `RESOURCE_IN_USE`: a job that has not ended uses it.
        """
        await self._session.wire.unary(
            "CheckpointService/DeleteCheckpoint",
            checkpoint_pb2.DeleteCheckpointRequest(name=name_of(name, "name")),
            checkpoint_pb2.DeleteCheckpointResponse,
        )

    async def batch(self, name: str) -> Batch:
        """Look up a batch; NotFoundError if there is none of that name."""
        answer = await self._session.wire.unary(
            "DataBatchService/GetDataBatch",
            data_batch_pb2.GetDataBatchRequest(name=name_of(name, "name")),
            data_batch_pb2.GetDataBatchResponse,
        )
        return batch_from_proto(answer.data_batch)

    async def batches(self) -> list[Batch]:
        """All batches of the project."""
        pages = await self._pages(
            "DataBatchService/ListDataBatches",
            lambda token: data_batch_pb2.ListDataBatchesRequest(
                parent=self._session.parent, page_token=token
            ),
            data_batch_pb2.ListDataBatchesResponse,
        )
        return [batch_from_proto(message) for page in pages for message in page.data_batches]

    async def delete_batch(self, name: Batch | str) -> None:
        """Delete a batch, the outputs on it, and its file.

        Raises:
            NotFoundError: No such batch.
            FailedPreconditionError: `RESOURCE_IN_USE`: a job that has not ended uses it.
        """
        await self._session.wire.unary(
            "DataBatchService/DeleteDataBatch",
            data_batch_pb2.DeleteDataBatchRequest(name=name_of(name, "name")),
            data_batch_pb2.DeleteDataBatchResponse,
        )

    async def blobs(self) -> list[Blob]:
        """All blobs of the project: files that checkpoints and batches are made of, or may be."""
        pages = await self._pages(
            "BlobService/ListBlobs",
            lambda token: blob_pb2.ListBlobsRequest(parent=self._session.parent, page_token=token),
            blob_pb2.ListBlobsResponse,
        )
        return [blob_from_proto(message) for page in pages for message in page.blobs]

    async def delete_blob(self, name: Blob | str) -> None:
        """Delete a blob of which no checkpoint and no batch is made.

        The server deletes such a blob by itself when nobody has asked for it for a day.

        Raises:
            FailedPreconditionError: `RESOURCE_IN_USE`: delete the checkpoint or batch first.
            NotFoundError: No such blob.
        """
        await self._session.wire.unary(
            "BlobService/DeleteBlob",
            blob_pb2.DeleteBlobRequest(name=name_of(name, "name")),
            blob_pb2.DeleteBlobResponse,
        )

    async def vector(self, name: str) -> AsyncVector:
        """Look up a vector; NotFoundError if there is none of that name."""
        answer = await self._session.wire.unary(
            "VectorService/GetVector",
            vector_pb2.GetVectorRequest(name=name_of(name, "name")),
            vector_pb2.GetVectorResponse,
        )
        return AsyncVector(self._session, answer.vector, temporary=False)

    async def vectors(self) -> list[AsyncVector]:
        """All vectors of the project."""
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
        """Look up a job; NotFoundError if there is none of that name."""
        answer = await self._session.wire.unary(
            "JobService/GetJob",
            job_pb2.GetJobRequest(name=name_of(name, "name")),
            job_pb2.GetJobResponse,
        )
        return AsyncJob(self._session, answer.job)

    async def jobs(self, states: Iterable[str] | None = None) -> list[AsyncJob[Any]]:
        """All jobs of the project, newest first.

        Args:
            states: States of the jobs to list, of `QUEUED`, `RUNNING`, `SUCCEEDED`, `FAILED` and
                `CANCELLED`; None means all. A job that is being cancelled is RUNNING.

        Returns:
            The jobs.

        Raises:
            InvalidArgumentError: `STATE_UNKNOWN`.
        """
        chosen = [states] if isinstance(states, str) else states or ()
        wanted = [value for state in chosen for value in state_values(state)]
        pages = await self._pages(
            "JobService/ListJobs",
            lambda token: job_pb2.ListJobsRequest(
                parent=self._session.parent, page_token=token, states=wanted
            ),
            job_pb2.ListJobsResponse,
        )
        return [AsyncJob(self._session, message) for page in pages for message in page.jobs]

    async def server_info(self) -> ServerInfo:
        """The server's version, and the dtypes, precisions and kinds of operator that it serves."""
        answer = await self._session.wire.unary(
            "SystemService/GetServerInfo",
            system_pb2.GetServerInfoRequest(),
            system_pb2.GetServerInfoResponse,
        )
        return server_info_from_proto(answer)

    async def worker_groups(self) -> list[WorkerGroup]:
        """The worker groups of the server, with the processes and the memory of their ranks."""
        answer = await self._session.wire.unary(
            "SystemService/ListWorkerGroups",
            system_pb2.ListWorkerGroupsRequest(parent=self._session.parent),
            system_pb2.ListWorkerGroupsResponse,
        )
        return [worker_group_from_proto(message) for message in answer.worker_groups]

    async def whoami(self) -> Caller:
        """Who the server takes this client for, and what it may do."""
        answer = await self._session.wire.unary(
            "SystemService/WhoAmI", system_pb2.WhoAmIRequest(), system_pb2.WhoAmIResponse
        )
        return caller_from_proto(answer)

    async def create_api_key(
        self,
        role: str,
        *,
        label: str = "",
        ttl_s: float | None = None,
        all_projects: bool = False,
    ) -> tuple[ApiKey, str]:
        """Make an API key of the project; the client's own role must be `admin`.

        Args:
            role: `read`, `submit` or `admin`; each may do what those before it may.
            label: At most 128 characters by which people tell it from others.
            ttl_s: Seconds until it expires; None: never.
            all_projects: Whether it opens every project, which takes a client that sees them all.

        Returns:
            The key, and its text, which is shown this once.

        Raises:
            InvalidArgumentError: `KEY_INVALID`.
            PermissionDeniedError: `ROLE_REQUIRED`.
            NotFoundError: `RESOURCE_NOT_FOUND`: the project is not this client's.
        """
        request = key_pb2.CreateKeyRequest(
            parent=_EVERY_PROJECT if all_projects else self._session.parent, role=role, label=label
        )
        if ttl_s is not None:
            request.ttl.FromNanoseconds(int(ttl_s * 1e9))
        # Not tried again: it might have made one key whose text went astray.
        answer = await self._session.wire.unary(
            "KeyService/CreateKey", request, key_pb2.CreateKeyResponse, patience_s=0.0
        )
        return key_from_proto(answer.key), answer.api_key

    async def api_keys(self, *, all_projects: bool = False) -> list[ApiKey]:
        """The API keys of the project, newest first, revoked and expired ones too.

        Args:
            all_projects: List those that open every project in their place.

        Raises:
            PermissionDeniedError: `ROLE_REQUIRED`: the client's own role is not `admin`.
        """
        parent = _EVERY_PROJECT if all_projects else self._session.parent
        answer = await self._session.wire.unary(
            "KeyService/ListKeys", key_pb2.ListKeysRequest(parent=parent), key_pb2.ListKeysResponse
        )
        return [key_from_proto(message) for message in answer.keys]

    async def revoke_api_key(self, key: ApiKey | str) -> ApiKey:
        """Revoke an API key for good: within seconds its calls are refused and end.

        Args:
            key: A key or its name; one that is revoked already stays so.

        Raises:
            PermissionDeniedError: `ROLE_REQUIRED`: the client's own role is not `admin`.
            NotFoundError: `RESOURCE_NOT_FOUND`.
        """
        answer = await self._session.wire.unary(
            "KeyService/RevokeKey",
            key_pb2.RevokeKeyRequest(name=name_of(key, "key")),
            key_pb2.RevokeKeyResponse,
        )
        return key_from_proto(answer.key)

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


PageT = TypeVar("PageT", bound=Any)
