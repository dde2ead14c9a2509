"""Kinds of operator as the wire names them, and what is made of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hvp_operations.matrices import Matrix, Term, check_matrix
from hvp_operations.operation import SpecError

from hvp_service.calls.errors import ServiceError


def refused(error: SpecError) -> ServiceError:
    """The refusal of what breaks a rule that SDK and server share."""
    return ServiceError(error.reason, error.message, field=error.field, metadata=error.metadata)


def plain_kind(kind: str) -> str:
    """The plain name of a kind, whatever it is."""
    return kind.removeprefix("KIND_").lower()


def check_kind(kind: str, field: str = "kind") -> str:
    """The plain name of a kind for its enum value's name: `ggn` for `KIND_GGN`.

    Raises:
        ServiceError: KIND_UNSPECIFIED, also of a number that this server does not know.
    """
    if kind == "KIND_UNSPECIFIED":
        raise ServiceError(
            "KIND_UNSPECIFIED",
            "Say which operator: KIND_HESSIAN, KIND_GGN or another kind that this server knows.",
            field=field,
        )
    return plain_kind(kind)


def check_composition(
    kind: str, own: Term, given: Matrix, kinds: Sequence[str], field: str
) -> Matrix:
    """Check an operator that is more than one matrix as it stands.

    Args:
        kind: Name of the enum value of its kind; KIND_UNSPECIFIED where it has terms.
        own: The matrix of that kind.
        given: What the operator is besides.
        kinds: Kinds that a term may have.
        field: Path of the operator in the request, for errors.

    Returns:
        The whole, with every default filled in.

    Raises:
        ServiceError: TERMS_INVALID: a kind and terms; OPERATOR_NOT_SYMMETRIC: a Jacobian; the
            reasons of `check_matrix`.
    """
    if kind != "KIND_UNSPECIFIED":
        if given.terms:
            raise ServiceError(
                "TERMS_INVALID",
                "Give an operator a kind or terms, and not both; a kind is one of the terms.",
                field=f"{field}.kind",
            )
        if kind == "KIND_JACOBIAN":
            raise ServiceError(
                "OPERATOR_NOT_SYMMETRIC",
                "A Jacobian is no square matrix: nothing is added to it, and it has no "
                "preconditioner; ask for that of a GGN.",
                field=f"{field}.kind",
            )
        given = replace(given, terms=(own,))
    try:
        return check_matrix(given, kinds, field)
    except SpecError as error:
        raise refused(error) from None
