"""The commands that ask a question, and `hvp watch`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import typer
from hvp_operations.registry import operations
from rich.console import Console
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hvp_client import Batch, Checkpoint, Client, Jacobian, Job, Operator, Vector
from hvp_client.cli.display import print_table, show_events
from hvp_client.cli.failures import EXIT_FAILURE, EXIT_INTERRUPTED, failures_reported, usage_error
from hvp_client.cli.listing import job_name
from hvp_client.cli.uploading import upload_with_bar

_PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A question as it was typed.

    Attributes:
        operation: Name of the operation.
        values: The operation's own options, by field.
        checkpoint: Name of a checkpoint, or a folder to upload.
        ids: Name of a batch, or a file to upload.
        operator: Kind of the operator, such as `hessian`, or `jacobian`.
        dtype: Dtype to compute in.
        precision: Precision of the operands of matrix products; None lets the server choose.
        deterministic: Whether the answer is to have the same bits each time.
        micro_batch_size: Sequences that a rank takes at once; None lets the server choose.
        parameters: Patterns of parameters' names; empty for all.
        sample_seed: Seed of the labels of a Fisher matrix; None means 0.
        num_samples: Labels that it draws for each target; None means 1.
        output_module: Of a Jacobian, as `output` of `client.jacobian`.
        input_module: As its `input`.
    """

    operation: str
    values: Mapping[str, Any]
    checkpoint: str
    ids: str
    operator: str
    dtype: str
    precision: str | None
    deterministic: bool
    micro_batch_size: int | None
    parameters: Sequence[str]
    sample_seed: int | None
    num_samples: int | None
    output_module: str = "logits"
    input_module: str = "parameters"


def ask(
    address: str,
    order: Order,
    *,
    watch: bool,
    plan: bool,
    output: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Upload what the server lacks, queue the job, and follow it to its end where asked to.

    Args:
        address: Address of the server.
        order: The question.
        watch: Whether to follow the job to its end; else its name is printed at once.
        plan: Print what the job would cost, and queue nothing.
        output: File for the result, as JSON.
        picture: File for the result's picture.
        as_json: Print JSON.
    """
    for option, path in (("--output", output), ("--plot", picture)):
        if path is not None and not watch:
            usage_error(f"{option} needs the result; leave out --no-watch")
        if path is not None and not path.absolute().parent.is_dir():
            usage_error(f"{option} {path} is in no folder that there is")
    if picture is not None and (picture.suffix not in _PICTURES or picture.is_dir()):
        usage_error(f"--plot {picture} must be a file that ends in {', '.join(_PICTURES)}")
    files = _vector_files(order)
    tensors = read_unless_named(order.ids)
    with failures_reported(), Client(address) as client:
        checkpoint, batch = brought(client, order.checkpoint, order.ids, tensors)
        H = _operator(client, checkpoint, batch, order)
        values = {**order.values, **_vectors(client, H, order, files)}
        if plan:
            told = H.plan(order.operation, **values)
            if as_json:
                print(json.dumps(asdict(told), indent=2))
            else:
                print_table(told.table())
            raise typer.Exit(0 if told.fits else EXIT_FAILURE)
        job = getattr(H, order.operation)(**values)
        if watch:
            _stay(job, output=output, picture=picture, as_json=as_json)
        else:
            print(json.dumps({"job": job.name}) if as_json else job.name)


def _operator(
    client: Client, checkpoint: Checkpoint, batch: Batch, order: Order
) -> Operator | Jacobian:
    """The operator that a question is about."""
    parameters = order.parameters or None
    if order.operator == "jacobian":
        return client.jacobian(
            checkpoint,
            batch,
            dtype=order.dtype,
            precision=order.precision,
            parameters=parameters,
            output=order.output_module,
            input=order.input_module,
            deterministic=order.deterministic,
        )
    return client.operator(
        checkpoint,
        batch,
        kind=order.operator,
        dtype=order.dtype,
        micro_batch_size=order.micro_batch_size,
        precision=order.precision,
        parameters=parameters,
        sample_seed=order.sample_seed,
        num_samples=order.num_samples,
        deterministic=order.deterministic,
    )


def follow_job(address: str, job: str, *, as_json: bool) -> None:
    """Show a job until it ends, then its result.

    Args:
        address: Address of the server.
        job: Name or id of the job.
        as_json: Print JSON.
    """
    with failures_reported(), Client(address) as client:
        _stay(client.job(job_name(job)), output=None, picture=None, as_json=as_json)


def read_unless_named(ids: str) -> Mapping[str, Any] | None:
    """The fields of a batch's file; None where a batch on the server is named.

    Raises:
        typer.Exit: With code 2, as `read_batch`.
    """
    return None if ids.startswith("projects/") else read_batch(Path(ids))


def brought(
    client: Client, checkpoint: str, ids: str, tensors: Mapping[str, Any] | None
) -> tuple[Checkpoint, Batch]:
    """A checkpoint and a batch on the server, uploaded where they are no names.

    Args:
        client: The client.
        checkpoint: Name of a checkpoint, or a folder.
        ids: Name of a batch, where there are no tensors.
        tensors: The fields of the batch to upload.
    """
    if checkpoint.startswith("projects/"):
        found = client.checkpoint(checkpoint)
    else:
        found = upload_with_bar(client, Path(checkpoint))
    return found, client.batch(ids) if tensors is None else client.upload_batch(tensors)


def read_batch(path: Path) -> Mapping[str, Any]:
    """Read the fields of a batch from a file.

    Args:
        path: A `.safetensors` or `.npz` file.

    Returns:
        Arrays by field.

    Raises:
        typer.Exit: With code 2: there is no such file, or it cannot be read in its format.
    """
    if not path.is_file():
        usage_error(f"{path} is neither a file nor the name of a batch (projects/...)")
    if path.suffix not in (".safetensors", ".npz"):
        usage_error(f"{path} must be a .safetensors or .npz file")
    try:
        if path.suffix == ".safetensors":
            tensors: Mapping[str, Any] = load_file(path)
            return tensors
        with np.load(path) as archive:  # refuses pickled objects by default
            return dict(archive)
    except (SafetensorError, BadZipFile, TypeError, ValueError, OSError) as error:
        usage_error(f"{path} cannot be read: {error}")


def _vector_files(order: Order) -> Mapping[str, Any]:
    """The arrays of the files that a question's vectors were typed as, by path."""
    typed = [
        each
        for declared in operations()[order.operation].inputs
        for each in order.values[declared.field]
    ]
    return {each: _read_vector(Path(each)) for each in typed if not each.startswith("projects/")}


def _read_vector(path: Path) -> Any:
    """Read a vector's numbers (n,), or arrays by parameter.

    Raises:
        typer.Exit: With code 2: there is no such file, or it cannot be read in its format.
    """
    if not path.is_file():
        usage_error(f"{path} is neither a file nor the name of a vector (projects/...)")
    if path.suffix not in (".safetensors", ".npy"):
        usage_error(f"{path} must be a .safetensors or .npy file")
    try:
        return load_file(path) if path.suffix == ".safetensors" else np.load(path)
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        usage_error(f"{path} cannot be read: {error}")


def _vectors(
    client: Client, H: Operator | Jacobian, order: Order, files: Mapping[str, Any]
) -> Mapping[str, list[Vector]]:
    """The vectors of a question on the server, by field."""
    return {
        declared.field: [
            H.vector(_flat(H, each, files[each])) if each in files else client.vector(each)
            for each in order.values[declared.field]
        ]
        for declared in operations()[order.operation].inputs
    }


def _flat(H: Operator | Jacobian, path: str, found: Any) -> Any:
    """The elements (n,) of a file: its one array, or those of every parameter in order."""
    if not isinstance(found, dict):
        return found
    names = H.parameter_names
    if len(found) == 1 and not found.keys() <= set(names):
        return next(iter(found.values()))
    if missing := [name for name in names if name not in found]:
        usage_error(f"{path} has no tensor {missing[0]}; one for each parameter is needed")
    return np.concatenate([found[name].ravel() for name in names])


def _stay(job: Job[Any], *, output: Path | None, picture: Path | None, as_json: bool) -> None:
    console = Console(stderr=True)
    try:
        show_events(job.watch(), job.name, console)
        result = job.result()
    except KeyboardInterrupt:
        console.print(
            f"{job.name} goes on: `hvp watch {job.name}` to come back, `hvp cancel {job.name}` to "
            "stop it",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    document = json.dumps({"job": job.name, **result.to_json()}, indent=2)
    if output is not None:
        output.write_text(document + "\n")
    if as_json:
        print(document)
    else:
        print_table(result.table())
    if picture is not None:
        _draw(result, picture)


def _draw(result: Any, picture: Path) -> None:
    try:
        result.plot(picture)
    except ImportError:
        usage_error("--plot needs matplotlib: pip install matplotlib")
    except ValueError as error:  # such a result has no picture
        usage_error(f"--plot {picture}: {error}")
    except OSError as error:
        usage_error(f"--plot {picture} cannot be written: {error.strerror}")
