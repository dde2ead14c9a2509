"""Checkpoints: a folder of config.json and safetensors, brought to the server as it is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from hvp_protos.v1 import checkpoint_pb2

from hvp_client._blobs import ProgressCallback, Source, upload_blobs
from hvp_client._enums import plain_name
from hvp_client._exceptions import FailedPreconditionError, InvalidArgumentError
from hvp_client._session import Session, new_request_id

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@dataclass(frozen=True, kw_only=True)
class ParameterTensor:
    """Where one parameter lies in every vector.

    Attributes:
        name: As in the model's `named_parameters()`.
        shape: Row-major.
        offset: Its first flat index.
    """

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that the server has checked and holds.

    Attributes:
        name: `projects/{project}/checkpoints/{id}`; equal files have equal names.
        state: `ACTIVE` once it can be used.
        architecture: Model class, for example `LlamaForCausalLM`.
        num_parameters: n, the length of every vector; a tied tensor counts once.
        vocab_size: Token ids are below this.
        stored_dtype: Safetensors' name of the dtype of the files.
        size_bytes: Of all files.
        parameters: In the order of every vector; empty in a listing.
    """

    name: str
    state: str
    architecture: str
    num_parameters: int
    vocab_size: int
    stored_dtype: str
    size_bytes: int
    parameters: tuple[ParameterTensor, ...]


def checkpoint_from_proto(message: checkpoint_pb2.Checkpoint) -> Checkpoint:
    """Make the record of a message."""
    return Checkpoint(
        name=message.name,
        state=plain_name(checkpoint_pb2.Checkpoint.State, message.state, "STATE_"),
        architecture=message.architecture,
        num_parameters=message.num_parameters,
        vocab_size=message.vocab_size,
        stored_dtype=message.stored_dtype,
        size_bytes=message.size_bytes,
        parameters=tuple(
            ParameterTensor(name=tensor.name, shape=tuple(tensor.shape), offset=tensor.offset)
            for tensor in message.parameters
        ),
    )


def find_checkpoint_files(directory: str | os.PathLike[str]) -> list[Path]:
    """List the files that make up the model in a folder: the config first.

    Where there is an index only the files it names are taken, so that a second copy of the weights
    in the same folder is not sent.

    Args:
        directory: Folder of config.json and safetensors.

    Returns:
        The files.

    Raises:
        InvalidArgumentError: `CHECKPOINT_FILES_INVALID` or `PICKLE_REFUSED`.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise _invalid(f"{folder} is not a folder; give the one that holds config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise InvalidArgumentError(
                f"{folder} holds only pickle files ({', '.join(pickles[:3])}), which can run any "
                "program when they are opened; load the model where you trust it and write it with "
                "`model.save_pretrained(folder, safe_serialization=True)`",
                reason="PICKLE_REFUSED",
                field="directory",
                metadata={"path": pickles[0]},
            )
        raise _invalid(f"{folder} holds no *.safetensors file")
    config = folder / "config.json"
    if not config.is_file():
        raise _invalid(f"{folder} holds no config.json", path="config.json")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise _invalid(f"{folder} holds {len(indexes)} indexes; leave one", path=indexes[1].name)
    if indexes:
        weights = _indexed_files(indexes[0])
    return [config, *indexes, *weights]


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _invalid(
            f"{index} is not a safetensors index: a JSON object with a weight_map of file names",
            path=index.name,
        ) from None
    for name in names:
        # A name with a folder in it would reach for files outside of the checkpoint.
        if not isinstance(name, str) or name != Path(name).name:
            raise _invalid(f"{index} names {name!r}, which is not a file name", path=index.name)
        if not (index.parent / name).is_file():
            raise _invalid(f"{index} names {name}, which is not there", path=name)
    return [index.parent / name for name in names]


def _invalid(message: str, path: str = "") -> InvalidArgumentError:
    return InvalidArgumentError(
        message,
        reason="CHECKPOINT_FILES_INVALID",
        field="directory",
        metadata={"path": path} if path else {},
    )


async def upload_checkpoint(
    session: Session,
    directory: str | os.PathLike[str],
    progress: ProgressCallback | None,
) -> Checkpoint:
    """Upload what the server lacks of a folder and register it; see Client.upload_checkpoint."""
    paths = find_checkpoint_files(directory)
    sources = [Source(content=path) for path in paths]
    for last_try in (False, True):
        digests = await upload_blobs(session, sources, progress)
        request = checkpoint_pb2.CreateCheckpointRequest(
            parent=session.parent,
            request_id=new_request_id(),
            files=[
                checkpoint_pb2.CheckpointFile(path=path.name, digest=digest)
                for path, digest in zip(paths, digests, strict=True)
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
    return checkpoint_from_proto(answer.checkpoint)
