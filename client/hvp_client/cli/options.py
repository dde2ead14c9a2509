"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"


class Dtype(StrEnum):
    """What products are computed in."""

    float32 = "float32"
    float64 = "float64"


class Kind(StrEnum):
    """Which matrix."""

    hessian = "hessian"
    ggn = "ggn"
    empirical_fisher_token = "empirical_fisher_token"  # noqa: S105 - the name of a matrix
    empirical_fisher_sequence = "empirical_fisher_sequence"


class Precision(StrEnum):
    """Of the operands of matrix products."""

    full = "full"
    tf32 = "tf32"
    bfloat16 = "bfloat16"


Address = Annotated[
    str, typer.Option(envvar="HVP_ADDRESS", help="The server, HOST:PORT.", show_envvar=True)
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]
