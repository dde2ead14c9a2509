"""Commands and their options; what they do is imported when they are run, so that help is quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from hvp_operations.registry import operations

from hvp_client._address import DEFAULT_ADDRESS
from hvp_client.cli.options import Address, Dtype, Format, FormatOption, Precision
from hvp_client.cli.questions import command

app = typer.Typer(
    name="hvp",
    help="Curvature of large models as a service: Hessian-vector products and spectra.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


JobArgument = Annotated[str, typer.Argument(help="The job's name, or its id alone.")]


# Its flags are the server's settings, which the server's package knows and this one need not have.
@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Start a server; SIGTERM or Ctrl-C lets it finish its calls and ends it."""
    from hvp_client.cli.serving import run_server

    run_server(context.args)


@app.command()
def upload(
    directory: Annotated[Path, typer.Argument(help="Folder of config.json and *.safetensors.")],
    address: Address = DEFAULT_ADDRESS,
    format_: FormatOption = Format.table,
) -> None:
    """Bring a checkpoint to the server; what it has already is not sent again."""
    from hvp_client.cli.uploading import upload_checkpoint

    upload_checkpoint(address, directory, as_json=format_ is Format.json)


for _operation in operations().values():
    app.command(_operation.name, help=_operation.summary)(command(_operation))


@app.command()
def jobs(
    state: Annotated[
        list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    format_: FormatOption = Format.table,
) -> None:
    """List jobs, the newest first."""
    from hvp_client.cli.listing import list_jobs

    list_jobs(address, states=state, as_json=format_ is Format.json)


@app.command()
def watch(
    job: JobArgument, address: Address = DEFAULT_ADDRESS, format_: FormatOption = Format.table
) -> None:
    """Follow a job to its end and print its result."""
    from hvp_client.cli.asking import follow_job

    follow_job(address, job, as_json=format_ is Format.json)


@app.command()
def cancel(job: JobArgument, address: Address = DEFAULT_ADDRESS) -> None:
    """Ask a job to stop between two products."""
    from hvp_client.cli.listing import cancel_job

    cancel_job(address, job)


@app.command()
def delete(
    names: Annotated[
        list[str],
        typer.Argument(help="Full names of checkpoints, batches, blobs, vectors or ended jobs."),
    ],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Delete things on the server and free their room on its disk."""
    from hvp_client.cli.deleting import delete as run

    run(address, names)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def demo(context: typer.Context) -> None:
    """Run the whole service on a real language model and draw what it finds."""
    # The demo declares its own options, which only its own help needs.
    from hvp_client.cli.demo import demo as run

    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(run)
    command(args=context.args, prog_name="hvp demo")


@app.command()
def verify(
    checkpoint: Annotated[
        str, typer.Option(help="Name of an uploaded checkpoint, or a folder to upload.")
    ],
    ids: Annotated[
        str,
        typer.Option(help="Name of an uploaded batch, or a .safetensors or .npz file to upload."),
    ],
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of vectors; in float64 differences tell most.")
    ] = Dtype.float32,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of the operands of matrix products.", show_default="the server's choice"
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Option(help="Pattern of parameters' names; may be given again.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random directions.")] = 0,
    address: Address = DEFAULT_ADDRESS,
    format_: FormatOption = Format.table,
) -> None:
    """Check a model's curvature: symmetry, differences of the loss, rescalings; 1 if a check fails.

    The products are those that every question asks for. A check is undecided where rounding hides
    the number; take float64 then.
    """
    from hvp_client.cli.verifying import verify_checkpoint

    verify_checkpoint(
        address,
        checkpoint,
        ids,
        dtype=dtype.value,
        precision=None if precision is None else precision.value,
        parameters=parameters or None,
        seed=seed,
        as_json=format_ is Format.json,
    )


keys = typer.Typer(
    help="API keys: what opens a server to people and programs.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys, name="keys")

KeyStateDir = Annotated[
    Path | None,
    typer.Option(
        help="State folder of the server, on its machine: needs no key, and so makes the first.",
        show_default="ask the server at --address",
    ),
]
KeyProject = Annotated[
    str | None,
    typer.Option(
        envvar="HVP_PROJECT",
        help="The project that keys open; -: every one.",
        show_default="that of HVP_API_KEY, else default",
    ),
]


class Role(StrEnum):
    """What a key may do."""

    read = "read"
    submit = "submit"
    admin = "admin"


@keys.command("create")
def create_key(
    role: Annotated[
        Role,
        typer.Option(
            help="read: look and download. submit: upload, compute and delete too. admin: make "
            "keys too."
        ),
    ],
    project: KeyProject = None,
    label: Annotated[str, typer.Option(help="Words by which you tell it from others.")] = "",
    days: Annotated[
        float | None, typer.Option(help="Days until it expires.", show_default="never")
    ] = None,
    state_dir: KeyStateDir = None,
    address: Address = DEFAULT_ADDRESS,
    format_: FormatOption = Format.table,
) -> None:
    """Make an API key; its text is shown this once."""
    from hvp_client.cli.keys import create

    create(
        address,
        state_dir,
        project=project,
        role=role.value,
        label=label,
        days=days,
        as_json=format_ is Format.json,
    )


@keys.command("list")
def list_keys(
    project: KeyProject = None,
    state_dir: KeyStateDir = None,
    address: Address = DEFAULT_ADDRESS,
    format_: FormatOption = Format.table,
) -> None:
    """List a project's keys, without their texts."""
    from hvp_client.cli.keys import list_all

    list_all(address, state_dir, project=project, as_json=format_ is Format.json)


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="The key's name, or its id alone.")],
    project: KeyProject = None,
    state_dir: KeyStateDir = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Revoke a key for good: within seconds its calls are refused and end."""
    from hvp_client.cli.keys import revoke

    revoke(address, state_dir, key, project=project)


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="HVP_ADDRESS",
            help="The server that ought to answer.",
            show_default=f"{DEFAULT_ADDRESS}, if one is there",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(envvar="HVP_CONFIG", help="A server's file of settings, and what it names."),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where a server would keep its state.", show_default="that of the settings"
        ),
    ] = None,
    format_: FormatOption = Format.table,
) -> None:
    """Check this machine and a server; exit code 1 tells of a problem."""
    from hvp_client.cli.doctor import examine

    raise typer.Exit(
        examine(
            address,
            DEFAULT_ADDRESS,
            state_dir=state_dir,
            as_json=format_ is Format.json,
            config_file=config,
        )
    )
