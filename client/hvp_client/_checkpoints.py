"""Checkpoints: a folder of config.json and safetensors, brought to the server as it is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast, get_args

from hvp_batches.schema import BatchField, BatchSchema, Kind, Unit
from hvp_protos.v1 import checkpoint_pb2, data_batch_pb2

from hvp_client._blobs import ProgressCallback, Source, upload_blobs
from hvp_client._enums import plain_name
from hvp_client._exceptions import FailedPreconditionError
from hvp_client._folders import open_folder
from hvp_client._session import Session, new_request_id


@dataclass(frozen=True, kw_only=True)
class ParameterTensor:
    """Where one parameter lies in every vector.

    Attributes:
        name: The parameter's name in the model's `named_parameters()`.
        shape: Shape of the parameter, whose elements lie row-major.
        offset: Flat index of its first element.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """Number of the tensor's elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that the server has checked and holds.

    Attributes:
        name: `projects/{project}/checkpoints/{id}`; equal files have equal names.
        state: `ACTIVE` once the checkpoint can be used.
        architecture: Model class, for example `LlamaForCausalLM`.
        num_parameters: n, the length of every vector; a tied tensor counts once.
        vocab_size: Token ids are below this; 0 for models without tokens.
        stored_dtype: Safetensors' name of the dtype in the files, such as `BF16`.
        size_bytes: Size of all files together.
        parameters: The parameters in the order of every vector; empty in a listing.
        ignored_files: Files of the uploaded folder that look like weights and are no part of the
            model, because transformers would not read them either; empty but for the call that
            uploaded it.
        labels: The caller's own texts by name; `client.relabel_checkpoint` changes them.
        etag: Tag of the present labels, which changes with them.
        task: Task of the model, such as `causal language modelling`.
        batch_schema: Fields that a batch for the model has; None from a server that does not say.
    """

    name: str
    state: str
    architecture: str
    num_parameters: int
    vocab_size: int
    stored_dtype: str
    size_bytes: int
    parameters: tuple[ParameterTensor, ...]
    ignored_files: tuple[str, ...] = field(default=(), compare=False)
    labels: Mapping[str, str] = field(default_factory=dict)
    etag: str = ""
    task: str = ""
    batch_schema: BatchSchema | None = None

    def __repr__(self) -> str:
        # Without the parameters, of which there may be thousands.
        what = f"{self.architecture} n={self.num_parameters:,} {self.stored_dtype}"
        state = "" if self.state == "ACTIVE" else f" {self.state}"
        return f"<{type(self).__name__} {what}{state} {self.name}>"


def tensors_from_proto(
    messages: Iterable[checkpoint_pb2.ParameterTensor],
) -> tuple[ParameterTensor, ...]:
    """Make the records of parameters."""
    return tuple(
        ParameterTensor(name=each.name, shape=tuple(each.shape), offset=each.offset)
        for each in messages
    )


def checkpoint_from_proto(message: checkpoint_pb2.Checkpoint) -> Checkpoint:
    """Make a `Checkpoint` of its message."""
    return Checkpoint(
        name=message.name,
        state=plain_name(checkpoint_pb2.Checkpoint.State, message.state, "STATE_"),
        architecture=message.architecture,
        num_parameters=message.num_parameters,
        vocab_size=message.vocab_size,
        stored_dtype=message.stored_dtype,
        size_bytes=message.size_bytes,
        parameters=tensors_from_proto(message.parameters),
        labels=dict(message.labels),
        etag=message.etag,
        task=message.task,
        batch_schema=_schema(message.batch_schema) if message.HasField("batch_schema") else None,
    )


def _schema(message: data_batch_pb2.BatchSchema) -> BatchSchema | None:
    """Make a schema of its message; None where it has a kind or unit new to this client."""
    kinds = {
        each.name: plain_name(data_batch_pb2.BatchField.Kind, each.kind, "KIND_").lower()
        for each in message.fields
    }
    unit = plain_name(data_batch_pb2.BatchSchema.Unit, message.unit, "UNIT_").lower()
    if unit not in get_args(Unit) or not set(kinds.values()) <= set(get_args(Kind)):
        return None
    return BatchSchema(
        fields=tuple(
            BatchField(
                name=each.name,
                kind=cast(Kind, kinds[each.name]),
                dims=tuple(each.dims),
                required=each.required,
                minimum=each.minimum if each.HasField("minimum") else None,
                maximum=each.maximum if each.HasField("maximum") else None,
                ignored=each.ignored if each.HasField("ignored") else None,
            )
            for each in message.fields
        ),
        outputs=tuple(message.outputs),
        unit=cast(Unit, unit),
        targets=message.targets,
        longest=dict(message.longest),
    )


async def get_checkpoint(session: Session, name: str) -> Checkpoint:
    """Look up a checkpoint; see Client.checkpoint."""
    answer = await session.wire.unary(
        "CheckpointService/GetCheckpoint",
        checkpoint_pb2.GetCheckpointRequest(name=name),
        checkpoint_pb2.GetCheckpointResponse,
    )
    return checkpoint_from_proto(answer.checkpoint)


async def parameter_tensors(session: Session, checkpoint: str) -> Mapping[str, ParameterTensor]:
    """Where each parameter of a checkpoint lies; asked for once, since a checkpoint never changes.

    Args:
        session: The client's session, which remembers the answer.
        checkpoint: Name of the checkpoint.

    Returns:
        Tensors by their names, in the order of every vector.

    Raises:
        NotFoundError: No such checkpoint.
    """
    if checkpoint not in session.parameters:
        found = await get_checkpoint(session, checkpoint)
        session.parameters[checkpoint] = {tensor.name: tensor for tensor in found.parameters}
    tensors: Mapping[str, ParameterTensor] = session.parameters[checkpoint]
    return tensors


async def upload_checkpoint(
    session: Session,
    directory: str | os.PathLike[str],
    progress: ProgressCallback | None,
) -> Checkpoint:
    """Upload what the server lacks of a folder and register it; see Client.upload_checkpoint."""
    folder = open_folder(directory)
    sources = [Source(content=path) for path in folder.files]
    for last_try in (False, True):
        digests = await upload_blobs(session, sources, progress)
        request = checkpoint_pb2.CreateCheckpointRequest(
            parent=session.parent,
            request_id=new_request_id(),
            files=[
                checkpoint_pb2.CheckpointFile(path=path.name, digest=digest)
                for path, digest in zip(folder.files, digests, strict=True)
            ],
        )
        try:
            answer = await session.wire.unary(
                "CheckpointService/CreateCheckpoint",
                request,
                checkpoint_pb2.CreateCheckpointResponse,
                timeout_s=session.wire.timeout.compute_s,
            )
            break
        except FailedPreconditionError as error:
            # Somebody deleted a blob between our look and our use of it.
            if error.reason != "INPUT_MISSING" or last_try:
                raise
    ignored = (*folder.ignored, *answer.ignored_files)
    return replace(checkpoint_from_proto(answer.checkpoint), ignored_files=ignored)
