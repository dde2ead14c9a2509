"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hvp_client._kinds import KINDS


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"


class Dtype(StrEnum):
    """Dtype of vectors and products."""

    float32 = "float32"
    float64 = "float64"


#: Kinds of operator, of all that the protos know.
Kind = StrEnum("Kind", {kind: kind for kind in KINDS})  # type: ignore[misc]


class Precision(StrEnum):
    """Precision of the operands of matrix products."""

    full = "full"
    tf32 = "tf32"
    bfloat16 = "bfloat16"


Address = Annotated[
    str, typer.Option(envvar="HVP_ADDRESS", help="The server, HOST:PORT.", show_envvar=True)
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]
