"""Specs made of untrusted values: types are checked first, then the operation's rules."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar

from hvp_operations.operation import Facts, Input, Operation, SpecError
from hvp_operations.partition import Partition
from hvp_operations.wording import clipped, shown

SpecT = TypeVar("SpecT")

#: A field of this type is an unsigned number of 64 bits; other integers have 31.
Seed = typing.NewType("Seed", int)
FIRST_SEED = Seed(0)

#: A field of this type names vectors on the server; see `hvp_operations.operation.Input`.
Names = tuple[str, ...]

#: A field of this type holds finite numbers.
Numbers = tuple[float, ...]

_BITS = {int: 31, Seed: 64}


def checked(operation: Operation[SpecT], values: Mapping[str, Any], facts: Facts) -> SpecT:
    """Make a spec that can be run.

    Args:
        operation: The operation whose spec it is.
        values: Values by field; a field that is left out has its default.
        facts: Facts of the operator that the question is about.

    Returns:
        The spec.

    Raises:
        SpecError: As `typed`, `OPERATOR_NOT_SYMMETRIC`, `OPERATOR_NOT_JACOBIAN`,
            `VECTORS_MISSING`, `<FIELD>_INVALID` for a field that names too many vectors, or a
            rule's reason.
    """
    spec = typed(operation, values)
    _check_operator(operation, facts)
    for each in operation.inputs:
        _check_number(each, len(getattr(spec, each.field)))
    for rule in operation.rules:
        if not rule.holds(spec, facts):
            given = getattr(spec, rule.field)
            if isinstance(given, tuple):
                is_named = rule.field in {each.field for each in operation.inputs}
                given = f"{len(given)} {'vectors' if is_named else 'numbers'}"
            raise SpecError(
                rule.reason,
                f"{rule.field} is {given}; {rule.allowed(spec, facts)}.",
                rule.field,
                {rule.field: str(given), "num_parameters": str(facts.num_parameters)},
            )
    return spec


def _check_operator(operation: Operation[Any], facts: Facts) -> None:
    """Check that a question is about an operator of its kind."""
    is_jacobian = facts.kind.startswith("jacobian")
    if is_jacobian and operation.asked_of == "matrix":
        raise SpecError(
            "OPERATOR_NOT_SYMMETRIC",
            f"{operation.name} is asked of a symmetric matrix, which the {facts.kind} is not.",
            "operator",
        )
    if not is_jacobian and operation.asked_of == "jacobian":
        raise SpecError(
            "OPERATOR_NOT_JACOBIAN",
            f"{operation.name} is asked of a Jacobian, and the {facts.kind} is a symmetric matrix, "
            "whose singular values are the magnitudes of its eigenvalues: ask for those.",
            "operator",
        )


def _check_number(declared: Input, given: int) -> None:
    """Check how many vectors a field names."""
    if given < declared.least:
        few = "one vector or more" if declared.most > 1 else "one vector"
        raise SpecError("VECTORS_MISSING", f"{declared.field} has to be {few}.", declared.field)
    if given > declared.most:
        raise SpecError(
            f"{declared.field.upper()}_INVALID",
            f"{declared.field} is {given} vectors; at most {declared.most} are possible.",
            declared.field,
        )


def typed(operation: Operation[SpecT], values: Mapping[str, Any]) -> SpecT:
    """Make a spec of values of the right types, whatever the operation's rules say.

    Args:
        operation: The operation whose spec it is.
        values: Values by field; a field that is left out has its default.

    Returns:
        The spec.

    Raises:
        SpecError: `FIELD_UNKNOWN`; `<FIELD>_INVALID` for a value of the wrong type;
            `<FIELD>_UNSUPPORTED` for a word that is none of the field's; `PARAMETERS_INVALID` for a
            value that is no partition.
    """
    types = field_types(operation.spec)
    if unknown := sorted(values.keys() - types.keys()):
        raise SpecError(
            "FIELD_UNKNOWN",
            f"{operation.name} has no {clipped(unknown[0])}; it has {', '.join(types)}.",
            unknown[0],
        )
    given = {each.field: () for each in operation.inputs} | dict(values)
    return operation.spec(
        **{name: _typed_value(name, types[name], value) for name, value in given.items()}
    )


def reasons(operation: Operation[Any]) -> set[str]:
    """Every reason for which a spec of an operation may be refused, but `FIELD_UNKNOWN`."""
    found = {rule.reason for rule in operation.rules}
    if operation.inputs:
        found |= {"VECTORS_MISSING", "VECTOR_SPACE_MISMATCH"}
    for name, hint in field_types(operation.spec).items():
        is_word = typing.get_origin(without_none(hint)[0]) is Literal
        found.add(f"{name.upper()}_{'UNSUPPORTED' if is_word else 'INVALID'}")
    return found


def field_types(spec: type) -> Mapping[str, Any]:
    """The type of each field of a dataclass, by name and in order."""
    hints = typing.get_type_hints(spec)
    return {field.name: hints[field.name] for field in dataclasses.fields(spec)}


def without_none(hint: Any) -> tuple[Any, bool]:
    """A type and whether None is one of its values."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType]
        return kinds[0], len(kinds) < len(typing.get_args(hint))
    return hint, False


def _typed_value(name: str, hint: Any, given: Any) -> Any:
    """The value in its field's type; SpecError where it is of another."""
    kind, may_be_none = without_none(hint)
    if given is None and may_be_none:
        return None
    if typing.get_origin(kind) is Literal:
        return _word(name, typing.get_args(kind), given)
    if kind in _BITS:
        return _whole(name, given, 1 << _BITS[kind])
    if kind is float:
        return _number(name, given)
    if kind == Names:
        return _names(name, given)
    if kind == Numbers:
        return _numbers(name, given)
    if kind is Partition:
        return Partition.of(given, name)
    raise TypeError(f"no spec has a field of {kind}")


def _word(name: str, words: tuple[str, ...], given: Any) -> str:
    if given not in words:
        raise SpecError(
            f"{name.upper()}_UNSUPPORTED",
            f"{name} is {shown(given)}; possible are {', '.join(words)}.",
            name,
        )
    return str(given)


def _whole(name: str, given: Any, end: int) -> int:
    # numpy's integers are whole numbers too; True is not meant as one.
    is_whole = hasattr(given, "__index__") and not isinstance(given, bool)
    if not is_whole or not -end <= given.__index__() < end:
        raise _invalid(name, given, f"a whole number below {end} is possible")
    return int(given)


def _number(name: str, given: Any) -> float:
    try:
        number = math.nan if isinstance(given, (str, bool)) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _invalid(name, given, "a finite number is possible")
    return number


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        raise _invalid(name, given, "finite numbers are possible")
    return tuple(_number(name, each) for each in given)


def _names(name: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) for each in given):
        raise _invalid(name, given, "names of vectors are possible")
    return tuple(given)


def _invalid(name: str, given: Any, possible: str) -> SpecError:
    return SpecError(f"{name.upper()}_INVALID", f"{name} is {shown(given)}; {possible}.", name)
