"""One command for each operation, made from its declaration; and `hvp watch`."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from hvp_operations.checking import Numbers, Seed, field_types, without_none
from hvp_operations.documentation import attributes, paragraphs
from hvp_operations.operation import Input, Operation
from hvp_operations.partition import WORDS, Partition

from hvp_client._address import DEFAULT_ADDRESS
from hvp_client.cli.options import (
    Address,
    Dtype,
    Format,
    FormatOption,
    Kind,
    Precision,
)


def command(operation: Operation[Any]) -> Callable[..., None]:
    """Make the command of an operation.

    Args:
        operation: The operation's declaration.

    Returns:
        A function whose signature declares the command's options to typer.
    """

    def run(**typed: Any) -> None:
        from hvp_client.cli.asking import Order, ask

        order = Order(
            operation=operation.name,
            values={
                name: _blocks(typed[name]) if hint is Partition else _plain(typed[name])
                for name, hint in field_types(operation.spec).items()
            },
            checkpoint=typed["checkpoint"],
            ids=typed["ids"],
            operator=_plain(typed.get("operator", "jacobian")),
            dtype=typed["dtype"].value,
            precision=_plain(typed["precision"]),
            deterministic=typed["deterministic"],
            micro_batch_size=typed.get("micro_batch_size"),
            parameters=typed["parameters"],
            sample_seed=typed["sample_seed"],
            num_samples=typed["num_samples"],
            output_module=typed.get("of", "logits"),
            input_module=typed["by"] if operation.asked_of == "jacobian" else "parameters",
        )
        ask(
            typed["address"],
            order,
            watch=typed["watch"],
            plan=typed["plan"],
            output=typed["output"],
            picture=typed.get("plot"),
            as_json=typed["format_"] is Format.json,
        )

    first, last = _common(operation)
    parameters = [*first, *_own(operation), *last]
    run.__doc__ = "\n\n".join([operation.summary, *paragraphs(operation.spec)[1:]])
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def _blocks(typed: list[str]) -> Any:
    """A partition of the parameters: a word, or the patterns of each block."""
    (first, *others) = typed
    return first if first in WORDS and not others else [each.split(",") for each in typed]


def _parameter(name: str, kind: Any, option: Any, default: Any = ...) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is ... else default,
        annotation=Annotated[kind, option],
    )


def _own(operation: Operation[Any]) -> list[inspect.Parameter]:
    """The options that are the operation's alone."""
    told = attributes(operation.spec)
    defaults = inspect.signature(operation.spec).parameters
    made = []
    for name, hint in field_types(operation.spec).items():
        kind, may_be_none = without_none(hint)
        default: Any = defaults[name].default
        given = next((each for each in operation.inputs if each.field == name), None)
        if given is not None:
            made.append(_vectors(given, told[name]))
            continue
        if hint is Partition:
            made.append(_partition(name, told[name], default))
            continue
        shown: str | bool = True
        if may_be_none:
            shown = "none" if kind is float else "the server's choice"
        if typing.get_origin(kind) is Literal:
            kind = _words(typing.get_args(kind))
            default = None if default is None else kind(default)
            shown = "none" if may_be_none else True
        elif kind is Seed:
            kind = int
        elif kind == Numbers:
            kind, default, shown = list[float], list(default), "none"
        flags = [f"--{name.replace('_', '-')}", *([f"-{name}"] if len(name) == 1 else [])]
        option = typer.Option(*flags, help=told[name], show_default=shown)
        made.append(_parameter(name, kind | None if may_be_none else kind, option, default))
    return made


def _vectors(declared: Input, told: str) -> inspect.Parameter:
    """The option of vectors: names of them on the server, or files of numbers."""
    option = typer.Option(
        f"--{declared.field.replace('_', '-')}",
        metavar="VECTOR",
        help=f"{told} A name (projects/...), or a .npy or .safetensors file."
        + (" May be given several times." if declared.most > 1 else ""),
        show_default=False,
    )
    return _parameter(declared.field, list[str], option, ... if declared.least else [])


def _partition(name: str, told: str, default: Partition) -> inspect.Parameter:
    """The option of a partition: a word, or the patterns of one block each time."""
    option = typer.Option(
        f"--{name}",
        metavar="|".join([*WORDS, "GLOB[,GLOB...]"]),
        help=f"{told} With patterns it is given once for each block.",
        show_default=str(default),
    )
    return _parameter(name, list[str], option, [str(default)])


def _words(words: tuple[str, ...]) -> Any:
    """A choice of words, as typer takes it."""
    return StrEnum("Words", {word: word for word in words})


def _common(operation: Operation[Any]) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """The options that every question has: before its own, and behind them."""
    first = [
        _parameter(
            "checkpoint",
            str,
            typer.Option(help="Name of an uploaded checkpoint, or a folder to upload."),
        ),
        _parameter(
            "ids",
            str,
            typer.Option(
                help="Name of an uploaded batch, or a .safetensors or .npz file of "
                "input_ids (n, s), and optionally labels and attention_mask."
            ),
        ),
    ]
    last = [
        _parameter(
            "operator",
            Kind,
            typer.Option(help="Of which matrix; ggn is the Gauss-Newton matrix."),
            Kind["hessian"],
        ),
        _parameter(
            "parameters",
            list[str],
            typer.Option(
                metavar="GLOB",
                help="Which parameters, such as 'model.layers.3.*'; all others are constants. May "
                "be given several times.",
                show_default="all",
            ),
            [],
        ),
        _parameter(
            "sample_seed",
            int | None,
            typer.Option(help="Of --operator fisher: the seed of its labels.", show_default="0"),
            None,
        ),
        _parameter(
            "num_samples",
            int | None,
            typer.Option(
                help="Of --operator fisher: labels drawn for each target.", show_default="1"
            ),
            None,
        ),
        _parameter("dtype", Dtype, typer.Option(help="To compute in."), Dtype.float32),
        _parameter(
            "precision",
            Precision | None,
            typer.Option(
                help="Of the operands of matrix products; full: the dtype's own.",
                show_default="bfloat16 for float32 on GPUs, else full",
            ),
            None,
        ),
        _parameter(
            "deterministic",
            bool,
            typer.Option(
                "--deterministic",
                help="The same bits each time, or a refusal where memory is short.",
            ),
            False,
        ),
        _parameter(
            "micro_batch_size",
            int | None,
            typer.Option(help="Sequences a rank takes at once.", show_default="by memory"),
            None,
        ),
        _parameter(
            "watch", bool, typer.Option(help="Stay and show progress and the result."), True
        ),
        _parameter(
            "plan", bool, typer.Option("--plan", help="Tell what it would take, and go."), False
        ),
        _parameter(
            "output", Path | None, typer.Option(help="Write the result here as JSON."), None
        ),
    ]
    if operation.asked_of == "jacobian":  # there is one kind, and outputs have one cut
        last = [each for each in last if each.name not in ("operator", "micro_batch_size")]
        of = typer.Option(help="The submodule whose output J is of, as model.layers.3; or logits.")
        by = typer.Option(
            help="What J is taken by: parameters, a submodule's output, or input, for what the "
            "other's submodule is given."
        )
        last = [_parameter("of", str, of, "logits"), _parameter("by", str, by, "parameters"), *last]
    if operation.has_picture:
        option = typer.Option(help="Draw the result here, as .png, .svg or .pdf.")
        last.append(_parameter("plot", Path | None, option, None))
    plain = inspect.Parameter.KEYWORD_ONLY
    last += [
        inspect.Parameter("address", plain, default=DEFAULT_ADDRESS, annotation=Address),
        inspect.Parameter("format_", plain, default=Format.table, annotation=FormatOption),
    ]
    return first, last
