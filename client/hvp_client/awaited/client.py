"""The client: calls on a project's checkpoints, batches, blobs, vectors and jobs, as coroutines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar, final

from google.protobuf.field_mask_pb2 import FieldMask
from hvp_protos.v1 import blob_pb2, checkpoint_pb2, data_batch_pb2, job_pb2, system_pb2, vector_pb2

from hvp_client._address import DEFAULT_ADDRESS
from hvp_client._batches import Batch, batch_from_proto, upload_batch
from hvp_client._blobs import Blob, ProgressCallback, blob_from_proto
from hvp_client._checkpoints import (
    Checkpoint,
    checkpoint_from_proto,
    get_checkpoint,
    upload_checkpoint,
)
from hvp_client._exceptions import HvpError, InvalidArgumentError, UnimplementedError
from hvp_client._labels import check_labels
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
from hvp_client._verification import Verification
from hvp_client._wire import Wire
from hvp_client.awaited._verifying import verify
from hvp_client.awaited.jacobian import AsyncJacobian, open_jacobian
from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.operator import AsyncOperator, open_operator
from hvp_client.awaited.vector import AsyncVector


@final
class AsyncClient:
    """A connection to a server; close it, or use it in a `with` block.

    Every call of a `Client` blocks until it is done; it may be used from several threads at once,
    and in a notebook. An `AsyncClient` has the same names to be awaited, products and arithmetic
    too, as in `w = await (H @ v)`; it belongs to the event loop in which its first call is made.
    Nothing is connected before the first call.

    Args:
        address: HOST:PORT of a server on this machine: nothing is encrypted, so another machine's
            is reached through an SSH tunnel.
        project: The project in which checkpoints, batches, vectors and jobs are named.
        timeout: Longest waits of calls; None means `Timeout()`.
        retry: How long a call that may succeed later is tried again; None means `Retry()`.

    Raises:
        InvalidArgumentError: `ADDRESS_INVALID`: the address is malformed. `CLEARTEXT_REFUSED`: it
            is of another machine.
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
        """Address of the server, as gRPC takes it."""
        return self._session.wire.address

    async def close(self) -> None:
        """Free this client's vectors, but for those that are kept, and close its connections.

        Closing twice is no error; calls on the client and its handles fail from then on.
        """
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
        """Bring a model to the server: config.json and *.safetensors, one or sharded with an index.

        What the server has already is not sent again, and a broken connection is resumed. The files
        are those that transformers' `from_pretrained` would read; `ignored_files` names the others.

        Args:
            directory: The folder, as written by `save_pretrained`; or a model's folder in a Hugging
                Face cache, `models--org--name`.
            progress: Called on another thread with (bytes done, bytes in all) as chunks go out;
                the first number steps back when a broken connection lost bytes.

        Returns:
            The checkpoint, checked by the server.

        Raises:
            InvalidArgumentError: `CHECKPOINT_FILES_INVALID`, `PICKLE_REFUSED`,
                `SAFETENSORS_INVALID`, `CONFIG_INVALID`, `ARCHITECTURE_UNKNOWN`,
                `TASK_UNSUPPORTED`, `QUANTIZATION_UNSUPPORTED`, `REMOTE_CODE_REFUSED`,
                `TENSOR_MISSING`, `TENSOR_SHAPE_MISMATCH` or `DTYPE_UNSUPPORTED`; metadata names
                file or tensor.
            ResourceExhaustedError: `DISK_FULL`.
        """
        return await upload_checkpoint(self._session, directory, progress)

    async def upload_batch(
        self, batch: Mapping[str, Any], checkpoint: Checkpoint | None = None
    ) -> Batch:
        """Bring the data that a loss is taken over to the server; equal data are sent once.

        Args:
            batch: The fields that the model takes, all with as many rows: integers or floating
                numbers, in numpy, torch or anything `np.asarray` takes. A causal language model
                takes `input_ids`, and optionally `labels` (shifted inside, −100 ignored, default
                `input_ids`) and `attention_mask`, each (n, s); `checkpoint.batch_schema` says what
                any other model takes.
            checkpoint: The model that the batch is for. A batch that does not fit it is refused
                before anything is sent, in the words in which an operator on both would be
                refused. None leaves that check to the operator.

        Returns:
            The batch, checked by the server.

        Raises:
            InvalidArgumentError: `BATCH_FIELD_INVALID`, `BATCH_EMPTY`, `SHAPE_MISMATCH`,
                `TOKEN_ID_OUT_OF_RANGE` or `NO_TARGETS`, and for a checkpoint also
                `SEQUENCE_TOO_LONG` or `BATCH_VALUE_OUT_OF_RANGE`; `field` is the entry at fault.
            ResourceExhaustedError: `DISK_FULL`.
        """
        schema = None if checkpoint is None else checkpoint.batch_schema
        return await upload_batch(self._session, batch, schema)

    async def operator(
        self,
        checkpoint: Checkpoint | str,
        batch: Batch | str,
        kind: str = "hessian",
        dtype: Any = "float32",
        micro_batch_size: int | None = None,
        precision: str | None = None,
        parameters: str | Iterable[str] | None = None,
    ) -> AsyncOperator:
        """Take the loss of a checkpoint on a batch as a linear operator; computes nothing yet.

        Args:
            checkpoint: A checkpoint or its name.
            batch: A batch or its name.
            kind: `hessian`; `ggn`, the generalised Gauss-Newton matrix Jᵀ H_out J;
                `empirical_fisher_token` or `empirical_fisher_sequence`, the sum of the outer
                products of the gradients of targets or of whole sequences, over the number of
                targets; `gradient_covariance_token` or `gradient_covariance_sequence`, the same
                with the gradients' mean taken off each.
            dtype: `float32`, also for None, or `float64`.
            micro_batch_size: Sequences a rank takes at once; None lets the server choose by
                memory. Results do not depend on it.
            precision: Precision of the operands of matrix products. `full` is the dtype's own;
                for float32 there are also `bfloat16` and, on GPUs, `tf32`. None lets the server
                choose: `bfloat16` for float32 on GPUs, else `full`.
            parameters: The parameters that θ consists of: patterns of names as shells have them,
                such as `model.layers.29.*` or `*.mlp.*`; None for all. All other parameters are
                constants: vectors have the length of the selection, and products cost what the
                selection needs. Each pattern has to select something; a tied tensor goes by its
                first name.

        Returns:
            The operator.

        Raises:
            NotFoundError: No such checkpoint or batch.
            InvalidArgumentError: `TOKEN_ID_OUT_OF_RANGE`, `SEQUENCE_TOO_LONG`,
                `DTYPE_UNSUPPORTED`, `PRECISION_UNSUPPORTED`, `KIND_UNSPECIFIED`,
                `MICRO_BATCH_INVALID`, `PARAMETERS_NOT_FOUND` or `PARAMETERS_INVALID`.
            UnimplementedError: `KIND_UNSUPPORTED`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY` or
                `DOUBLE_BACKWARD_UNSUPPORTED`.
        """
        if str(kind).lower() == "jacobian":
            raise InvalidArgumentError(
                "a Jacobian is no square matrix; client.jacobian(checkpoint, batch) gives it",
                reason="KIND_UNSUPPORTED",
                field="kind",
            )
        spec = operator_spec(
            checkpoint, batch, kind, dtype, micro_batch_size, precision, parameters
        )
        return await open_operator(self._session, spec)

    async def verify(
        self,
        checkpoint: Checkpoint | str,
        batch: Batch | str,
        dtype: Any = "float32",
        precision: str | None = None,
        parameters: str | Iterable[str] | None = None,
        seed: int = 0,
    ) -> Verification:
        """Check the curvature of a checkpoint on a batch against identities that it must obey.

        The products are those that every question asks for, in the real dtype and by the real
        kernels: symmetry, linearity, the slope along the gradient, differences of the loss at
        displaced parameters, forms against products, and, where the architecture can be rescaled
        without changing the loss, H(Gθ) = −G∇L.

        Args:
            checkpoint: A checkpoint or its name.
            batch: A batch or its name.
            dtype: As for `operator`. In float64 the differences tell most.
            precision: As for `operator`.
            parameters: As for `operator`.
            seed: Seed of the random directions.

        Returns:
            Every check with its figures; `passed`, `table()`. Cost: about 7 products, 60 forward
            passes, and a few products with two tensors each.

        Raises:
            InvalidArgumentError, FailedPreconditionError: As for `operator` and its products.
        """
        settings = {"dtype": dtype, "precision": precision, "parameters": parameters}
        H = await self.operator(checkpoint, batch, "hessian", **settings)
        try:
            G = await self.operator(checkpoint, batch, "ggn", **settings)
        except UnimplementedError:  # a model that returns its loss alone has no such matrix
            G = None
        return await verify(H, G, seed=seed)

    async def jacobian(
        self,
        checkpoint: Checkpoint | str,
        batch: Batch | str,
        dtype: Any = "float32",
        precision: str | None = None,
        parameters: str | Iterable[str] | None = None,
    ) -> AsyncJacobian:
        """Take the Jacobian of a model's outputs on a batch as an operator; computes nothing yet.

        Args:
            checkpoint: A checkpoint or its name.
            batch: A batch or its name.
            dtype: `float32`, also for None, or `float64`.
            precision: As for `operator`.
            parameters: As for `operator`.

        Returns:
            J = ∂(outputs)/∂θ, of shape (outputs, n): `J @ v` and `J.T @ u`.

        Raises:
            NotFoundError: No such checkpoint or batch.
            InvalidArgumentError: As for `operator`.
        """
        spec = operator_spec(checkpoint, batch, "jacobian", dtype, None, precision, parameters)
        return await open_jacobian(self._session, spec)

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
