"""The client: calls on a project's checkpoints, batches, blobs, vectors and jobs, as coroutines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, final

from hvp_operations.matrices import Matrix

from hvp_client._address import DEFAULT_ADDRESS
from hvp_client._algebra import matrix_of, number, with_matrix
from hvp_client._batches import Batch, upload_batch
from hvp_client._blobs import ProgressCallback
from hvp_client._channels import Way
from hvp_client._checkpoints import (
    Checkpoint,
    upload_checkpoint,
)
from hvp_client._credentials import Credentials, project_for
from hvp_client._exceptions import HvpError, InvalidArgumentError, UnimplementedError
from hvp_client._session import Session
from hvp_client._settings import Retry, Timeout, Tls
from hvp_client._specs import name_activations, operator_spec
from hvp_client._verification import Verification
from hvp_client._wire import Wire
from hvp_client.awaited._verifying import verify
from hvp_client.awaited.catalogue import AsyncCatalogue
from hvp_client.awaited.jacobian import AsyncJacobian, open_jacobian
from hvp_client.awaited.operator import AsyncOperator, open_operator
from hvp_client.awaited.vector import AsyncVector


@final
class AsyncClient(AsyncCatalogue):
    """A connection to a server; close it, or use it in a `with` block.

    Every call of a `Client` blocks until it is done; it may be used from several threads at once,
    and in a notebook. An `AsyncClient` has the same names to be awaited, products and arithmetic
    too, as in `w = await (H @ v)`; it belongs to the event loop in which its first call is made.
    Nothing is connected before the first call.

    Args:
        address: HOST:PORT of a server; without certificates one on this machine. With `https://`
            before it everything is encrypted, also where `tls` names no certificates.
        api_key: An API key of the server's, or a token of an identity provider that it believes,
            which every call shows; or a function that gives one, asked at each call. None takes
            HVP_API_KEY, or what the file HVP_API_KEY_FILE holds.
        project: The project in which checkpoints, batches, vectors and jobs are named. None takes
            HVP_PROJECT, or that of the API key, or `default`.
        timeout: Longest waits of calls; None means `Timeout()`.
        retry: How long a call that may succeed later is tried again; None means `Retry()`.
        tls: Certificates, with which everything is encrypted; None takes those that the environment
            names (`Tls.from_environment`), or clear text where it names none.

    Raises:
        InvalidArgumentError: `ADDRESS_INVALID`: the address is malformed. `CLEARTEXT_REFUSED`: it
            is of another machine, and there are no certificates. `TLS_FILES_INVALID`: a file of
            certificates or of a key cannot be read. `API_KEY_INVALID`: the key is no word.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | Callable[[], str] | None = None,
        project: str | None = None,
        timeout: Timeout | None = None,
        retry: Retry | None = None,
        tls: Tls | None = None,
    ):
        key = Credentials.given(api_key)
        way = Way.to(address, tls or Tls.from_environment(), key)
        wire = Wire(way, timeout or Timeout(), retry or Retry())
        self._session = Session(wire, project_for(project, key))

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
        sample_seed: int | None = None,
        num_samples: int | None = None,
        damping: float = 0.0,
        precondition: AsyncVector | Any = None,
        *,
        deterministic: bool = False,
    ) -> AsyncOperator:
        """Take the loss of a checkpoint on a batch as a linear operator; computes nothing yet.

        Args:
            checkpoint: A checkpoint or its name.
            batch: A batch or its name.
            kind: `hessian`; `ggn`, the generalised Gauss-Newton matrix Jᵀ H_out J;
                `empirical_fisher_token` or `empirical_fisher_sequence`, the sum of the outer
                products of the gradients of targets or of whole sequences, over the number of
                targets; `gradient_covariance_token` or `gradient_covariance_sequence`, the same
                with the gradients' mean taken off each; `fisher`, that of targets with labels
                that are drawn from the model, whose expectation is the Gauss-Newton matrix.
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
            sample_seed: Of `fisher`: the seed of the drawn labels, from 0 to 2**64 − 1; None means
                0. It gives the same labels on any number of ranks, and another seed another matrix.
            num_samples: Of `fisher`: how many labels are drawn for each target, up to 64; None
                means 1. A product costs the same with more.
            damping: A number λ that is added to the diagonal of the matrix.
            precondition: The diagonal of D, for D^-1/2 (A + λI) D^-1/2: a vector or numbers, as
                `Operator.preconditioned` takes it.
            deterministic: Whether every result is to have the same bits each time it is asked for,
                on this kind of machine and number of ranks: nothing that changes rounding goes by
                free memory, time or history. What there is no memory for is refused
                (docs/operators.md).

        Returns:
            The operator.

        Raises:
            NotFoundError: No such checkpoint or batch.
            InvalidArgumentError: `TOKEN_ID_OUT_OF_RANGE`, `SEQUENCE_TOO_LONG`,
                `DTYPE_UNSUPPORTED`, `PRECISION_UNSUPPORTED`, `KIND_UNSPECIFIED`,
                `MICRO_BATCH_INVALID`, `PARAMETERS_NOT_FOUND`, `PARAMETERS_INVALID`,
                `SEED_INVALID`, `NUM_SAMPLES_INVALID` or `COEFFICIENT_INVALID`; as
                `Operator.preconditioned`.
            UnimplementedError: `KIND_UNSUPPORTED`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY` or
                `DOUBLE_BACKWARD_UNSUPPORTED`; `LOSS_HAS_NO_DISTRIBUTION` of a product;
                `DETERMINISTIC_MEMORY` or `DETERMINISM_UNSUPPORTED` of whatever is computed.
        """
        if str(kind).lower() == "jacobian":
            raise InvalidArgumentError(
                "a Jacobian is no square matrix; client.jacobian(checkpoint, batch) gives it",
                reason="KIND_UNSUPPORTED",
                field="kind",
            )
        spec = operator_spec(
            checkpoint,
            batch,
            kind,
            dtype,
            micro_batch_size,
            precision,
            parameters,
            sample_seed,
            num_samples,
            deterministic=deterministic,
        )
        spec = with_matrix(spec, replace(matrix_of(spec), damping=number(damping, "damping")))
        H = await open_operator(self._session, spec)
        return H if precondition is None else await H.preconditioned(precondition)

    def identity(self, operator: AsyncOperator) -> AsyncOperator:
        """The identity I on an operator's vectors, as in `H + 1e-3 * I`.

        Args:
            operator: The operator.

        Returns:
            An operator of the same loss, whose products compute nothing.

        Raises:
            InvalidArgumentError: `OPERATOR_EXPECTED`: it is no operator's handle.
        """
        if not isinstance(operator, AsyncOperator):
            raise InvalidArgumentError(
                f"operator must be an operator's handle, not {type(operator).__name__}",
                reason="OPERATOR_EXPECTED",
                field="operator",
            )
        return operator._of(Matrix(damping=1.0), ())

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
        # Differences of a loss that rounds tell of its roundings.
        whole = await self.operator(
            checkpoint, batch, "hessian", **settings | {"precision": "full"}
        )
        try:
            G = await self.operator(checkpoint, batch, "ggn", **settings)
        except UnimplementedError:  # a model that returns its loss alone has no such matrix
            G = None
        return await verify(H, G, whole, seed=seed)

    async def jacobian(
        self,
        checkpoint: Checkpoint | str,
        batch: Batch | str,
        dtype: Any = "float32",
        precision: str | None = None,
        parameters: str | Iterable[str] | None = None,
        *,
        output: str = "logits",
        input: str = "parameters",  # noqa: A002 (the field's word)
        deterministic: bool = False,
    ) -> AsyncJacobian:
        """Take a Jacobian of a model on a batch as an operator; of the outputs by θ, or of others.

        Args:
            checkpoint: A checkpoint or its name.
            batch: A batch or its name.
            dtype: `float32`, also for None, or `float64`.
            precision: As for `operator`.
            parameters: As for `operator`; only where the input is `parameters`.
            output: The outputs, `logits`, or the name of a submodule, such as `model.layers.30` or
                `model.layers.3.mlp.down_proj`, whose output is meant.
            input: What derivatives are taken by: `parameters`; the name of a submodule, whose
                output is meant; or `input`, for what the output's submodule is given. By an
                activation all parameters are constants.
            deterministic: As for `operator`.

        Returns:
            J = ∂(output)/∂(input): `J @ v` and `J.T @ u`. Where a submodule is named the server
            runs the model up to there once, to see the shapes.

        Raises:
            NotFoundError: No such checkpoint or batch.
            InvalidArgumentError: As for `operator`. `MODULE_NOT_FOUND`: no submodule has that name;
                the message lists the nearest. `MODULE_UNSUPPORTED`: it does not give one tensor
                with a row for each row of the batch, or is not called once.
                `MODULES_OUT_OF_ORDER`: the output is not made after the input.
        """
        spec = operator_spec(
            checkpoint,
            batch,
            "jacobian",
            dtype,
            None,
            precision,
            parameters,
            deterministic=deterministic,
        )
        name_activations(spec, output, input)
        return await open_jacobian(self._session, spec)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"
