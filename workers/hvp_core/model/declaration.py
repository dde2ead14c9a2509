"""Whether a registered family declares fields and outputs that a batch can have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from hvp_batches.contents import check_names
from hvp_batches.fitting import BatchError
from hvp_batches.schema import ROWS, BatchField, Kind
from hvp_operations.wording import shown

from hvp_core.errors import CurvatureError

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DIMS = (
    f"possible is a tuple of {ROWS!r}, the rows, and behind it symbols such as 's' or sizes in "
    "digits such as '3'"
)


def check_declaration(
    family: str, fields: Sequence[Any], *, outputs: Sequence[Any] | None, targets: str
) -> None:
    """Check what a family declares of its batches, before anything is made of it.

    Args:
        family: Name of the family's class.
        fields: What the family gives as its fields.
        outputs: Dimensions of the outputs; None where the module returns its own loss.
        targets: Name of the field of the targets, where there are outputs.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED, naming the family, the field, what is wrong with it and
            what is possible; metadata has both names.
    """
    for each in fields:
        if not isinstance(each, BatchField):
            raise _wrong(family, "", f"fields gives {shown(each)}; possible are BatchFields")
    try:
        check_names([str(each.name) for each in fields])
    except BatchError as error:
        raise _wrong(family, error.field, error.message.removesuffix(".")) from None
    names = [each.name for each in fields]
    for place, each in enumerate(fields):
        if each.name in names[:place]:
            raise _wrong(family, each.name, "it is declared twice; give each field its own name")
        _check_field(family, each)
    if outputs is None:
        return
    if targets not in names or len(names) < 2:
        raise _wrong(
            family,
            targets,
            f"targets is {shown(targets)}; possible is the name of one of its fields, beside "
            f"one that the module takes: {', '.join(names)}",
        )
    symbols = {dim for each in fields for dim in each.dims if not dim.isdecimal()}
    known = [dim for dim in outputs if isinstance(dim, str) and (_is_size(dim) or dim in symbols)]
    if isinstance(outputs, str) or not outputs or len(known) < len(outputs) or outputs[0] != ROWS:
        raise _wrong(
            family,
            "",
            f"outputs is {shown(outputs)}; {_DIMS}, of the symbols that its fields have: "
            f"{', '.join(sorted(symbols))}",
        )


def _check_field(family: str, field: BatchField) -> None:
    if field.kind not in get_args(Kind):
        raise _wrong(
            family,
            field.name,
            f"its kind is {shown(field.kind)}; possible are {' and '.join(get_args(Kind))}",
        )
    dims: Any = field.dims
    if not isinstance(dims, tuple | list) or not dims:
        raise _wrong(family, field.name, f"its dims are {shown(dims)}; {_DIMS}")
    for place, dim in enumerate(dims):
        is_dim = isinstance(dim, str) and (_is_size(dim) or _SYMBOL.fullmatch(dim))
        if not is_dim or (place == 0 and dim != ROWS):
            raise _wrong(family, field.name, f"dimension {place} of it is {shown(dim)}; {_DIMS}")
    least, most = field.minimum, field.maximum
    if least is not None and most is not None and least > most:
        raise _wrong(
            family,
            field.name,
            f"its minimum is {least} and its maximum {most}; possible is a minimum of at most "
            "the maximum",
        )


def _is_size(dim: str) -> bool:
    return dim.isascii() and dim.isdecimal() and int(dim) > 0


def _wrong(family: str, field: str, what: str) -> CurvatureError:
    of = f"{family}, field {shown(field)}" if field else family
    return CurvatureError(
        "MODEL_UNSUPPORTED",
        f"{of}: {what}. Correct the declaration in the package that is installed beside the server",
        {"family": family, "field": field[:80]},
    )
