"""Which matrix an operator is: its algebra, and the rules that SDK, service and ranks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from hvp_operations.operation import INDEFINITE, SpecError
from hvp_operations.partition import MOST_BLOCKS, Partition

#: Kinds whose labels are drawn from the model.
DRAWN = frozenset({"fisher"})
MOST_SAMPLES = 64  # labels that are drawn for each target
MOST_TERMS = 16  # of a sum: each takes a product of its own
BLOCKS_TOGETHER = 4  # blocks of a block-diagonal matrix whose products are taken in one call


@final
@dataclass(frozen=True, kw_only=True)
class Term:
    """A multiple of a matrix.

    Attributes:
        kind: Kind of the matrix, such as `ggn`.
        coefficient: What it is multiplied by.
        sample_seed: Seed of the labels, where the kind draws labels.
        num_samples: Number of labels of each target; 0 where none are drawn.
    """

    kind: str
    coefficient: float = 1.0
    sample_seed: int = 0
    num_samples: int = 0


@final
@dataclass(frozen=True, kw_only=True)
class Matrix:
    """D^-1/2 (B(Σ c A) + λI) D^-1/2 + μI, with multiples of matrices A and a positive diagonal D.

    B makes zero of what couples two blocks of parameters, where there are blocks.

    Law: where there is no D, μ is 0. Two terms are of different matrices. Where nothing is added to
    it, a sum has one term at the least: λ is not 0, or there is a term.

    Attributes:
        terms: The multiples cA.
        damping: λ.
        precondition: Name of the vector that is the diagonal of D; "" where D is I.
        shift: μ.
        blocks: How the parameters are divided for B; None for all of the matrices.
    """

    terms: tuple[Term, ...] = ()
    damping: float = 0.0
    precondition: str = ""
    shift: float = 0.0
    blocks: Partition | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the operator is one matrix, and no more is done to it."""
        added = self.damping or self.precondition or self.shift or self.blocks
        return len(self.terms) == 1 and self.terms[0].coefficient == 1 and not added

    @property
    def is_semidefinite(self) -> bool:
        """Whether the operator is known to have no negative eigenvalue."""
        coefficients = [
            0.0 if each.coefficient == 0 else -1.0 if each.kind in INDEFINITE else each.coefficient
            for each in self.terms
        ]
        return min(*coefficients, self.damping, self.shift) >= 0

    def times(self, factor: float) -> Matrix:
        """A multiple of it."""
        return replace(
            self,
            terms=tuple(replace(t, coefficient=factor * t.coefficient) for t in self.terms),
            damping=factor * self.damping,
            shift=factor * self.shift,
        )._normal()

    def plus(self, other: Matrix) -> Matrix | None:
        """The sum; None where it has no such form: diagonals or blocks that are not for both."""
        mine, others = self, other
        if mine.blocks != others.blocks:  # a multiple of I is in blocks, whatever these are
            mine, others = mine._within(others), others._within(mine)
        if mine.precondition != others.precondition:
            # A multiple of I is added to what a diagonal preconditions, behind it.
            mine, others = mine._behind(others), others._behind(mine)
        if (mine.precondition, mine.blocks) != (others.precondition, others.blocks):
            return None
        return Matrix(
            terms=(*mine.terms, *others.terms),
            damping=mine.damping + others.damping,
            precondition=mine.precondition,
            shift=mine.shift + others.shift,
            blocks=mine.blocks,
        )._normal()

    def _within(self, other: Matrix) -> Matrix:
        return self if self.terms or self.blocks else replace(self, blocks=other.blocks)

    def _behind(self, other: Matrix) -> Matrix:
        if self.terms or self.precondition or not other.precondition:
            return self
        return replace(self, damping=0.0, precondition=other.precondition, shift=self.damping)

    def _normal(self) -> Matrix:
        """The same with one term for each matrix, and none that is multiplied by 0 but the last."""
        sums: dict[Term, float] = {}
        for each in self.terms:
            key = replace(each, coefficient=1.0)
            sums[key] = sums.get(key, 0.0) + each.coefficient
        merged = [replace(each, coefficient=c) for each, c in sums.items()]
        terms = [each for each in merged if each.coefficient]
        if not terms and not self.damping:
            terms = merged[:1]
        return replace(self, terms=tuple(terms))

    def __str__(self) -> str:
        """The formula, such as `2 hessian + 0.001 identity`; of a plain matrix its kind."""
        if self.is_plain:
            return self.terms[0].kind
        inner = [(each.coefficient, _called(each)) for each in self.terms]
        if self.blocks and inner:
            inner = [(1.0, f"block_diagonal[{self.blocks}]({_formula(inner)})")]
        inner += [(self.damping, "identity")] if self.damping or not inner else []
        if not self.precondition:
            return _formula(inner)
        whole = f"D^-1/2 ({_formula(inner)}) D^-1/2"
        return f"{whole} {_signed(self.shift, 'identity')}" if self.shift else whole


def _called(term: Term) -> str:
    if term.kind not in DRAWN:
        return term.kind
    return f"{term.kind}[seed {term.sample_seed}, {term.num_samples} drawn]"


def _number(coefficient: float) -> str:
    return repr(float(coefficient)).removesuffix(".0")


def _formula(parts: Sequence[tuple[float, str]]) -> str:
    (first, name), *rest = parts
    begin = {1.0: name, -1.0: f"-{name}"}.get(first) or f"{_number(first)} {name}"
    return " ".join([begin, *(_signed(*each) for each in rest)])


def _signed(coefficient: float, name: str) -> str:
    size = "" if abs(coefficient) == 1 else f"{_number(abs(coefficient))} "
    return f"{'-' if coefficient < 0 else '+'} {size}{name}"


def check_matrix(matrix: Matrix, kinds: Sequence[str], field: str = "") -> Matrix:
    """Check a sum of matrices.

    Args:
        matrix: The sum as it was given.
        kinds: Kinds that a term may have.
        field: Path of the operator in the request, for errors.

    Returns:
        The sum with every default filled in, and one term for each matrix.

    Raises:
        SpecError: KIND_UNSPECIFIED, TERMS_INVALID, COEFFICIENT_INVALID, SEED_INVALID,
            NUM_SAMPLES_INVALID.
    """
    path = f"{field}." if field else ""
    for name in ("damping", "shift"):
        _check_finite(getattr(matrix, name), f"{path}{name}")
    if len(matrix.terms) > MOST_TERMS:
        raise SpecError(
            "TERMS_INVALID",
            f"A sum of {len(matrix.terms)} matrices; at most {MOST_TERMS} are possible.",
            f"{path}terms",
        )
    if not matrix.terms and not (matrix.damping or matrix.shift):
        raise SpecError(
            "KIND_UNSPECIFIED",
            f"Say which operator: {', '.join(kinds)}, or a sum of them.",
            f"{path}kind",
        )
    if matrix.shift and not matrix.precondition:
        raise SpecError(
            "TERMS_INVALID",
            "A shift is added behind a preconditioner, and there is none; give it as damping.",
            f"{path}shift",
        )
    terms = []
    for index, each in enumerate(matrix.terms):
        where = f"{path}terms[{index}]"
        if each.kind not in kinds:
            raise SpecError(
                "KIND_UNSPECIFIED",
                f"A sum has no term {each.kind}; it may have {', '.join(kinds)}.",
                f"{where}.kind",
            )
        _check_finite(each.coefficient, f"{where}.coefficient")
        drawn = check_samples(each.kind, each.sample_seed, each.num_samples, where)
        terms.append(replace(each, num_samples=drawn))
    checked = replace(matrix, terms=tuple(terms))._normal()
    for each in checked.terms:
        _check_finite(each.coefficient, f"{path}terms")
    return checked


def check_blocks(blocks: Partition, names: Sequence[str], field: str) -> None:
    """Check that parameters can be divided into the blocks of an operator.

    Args:
        blocks: How they are divided.
        names: Names of the operator's parameters, in canonical order.
        field: Name of the request's field, for errors.

    Raises:
        SpecError: PARAMETERS_INVALID, PARAMETERS_NOT_FOUND; BLOCKS_INVALID: there are too many.
    """
    count = len(blocks.divide(names, field))
    if count > MOST_BLOCKS:
        raise SpecError(
            "BLOCKS_INVALID",
            f"{blocks} makes {count} blocks, each of which takes a product; at most {MOST_BLOCKS} "
            "are possible. Give larger ones, or restrict the operator first.",
            field,
            {"blocks": str(count)},
        )


def _check_finite(number: float, field: str) -> None:
    if not math.isfinite(number):
        raise SpecError(
            "COEFFICIENT_INVALID",
            f"{field.rpartition('.')[2]} is {number}; a finite number is possible.",
            field,
        )


def check_samples(kind: str, sample_seed: int, num_samples: int, field: str = "") -> int:
    """Check which labels a kind of matrix draws.

    Args:
        kind: The kind, such as `fisher`.
        sample_seed: Seed of the labels, from 0 to 2**64 − 1; 0 also where none are drawn.
        num_samples: Number of labels of each target; 0 for the default, or where none are drawn.
        field: Path of the operator in the request, for errors.

    Returns:
        Number of labels that are drawn for each target; 0 for a kind that draws none.

    Raises:
        SpecError: SEED_INVALID, NUM_SAMPLES_INVALID.
    """
    path = f"{field}." if field else ""
    if kind in DRAWN:
        if not 0 <= num_samples <= MOST_SAMPLES:
            raise SpecError(
                "NUM_SAMPLES_INVALID",
                f"num_samples is {num_samples}; 1 to {MOST_SAMPLES} labels are drawn for each "
                "target.",
                f"{path}num_samples",
                {"num_samples": str(num_samples)},
            )
        return num_samples or 1
    for name, given, reason in (
        ("sample_seed", sample_seed, "SEED_INVALID"),
        ("num_samples", num_samples, "NUM_SAMPLES_INVALID"),
    ):
        if given:
            raise SpecError(
                reason,
                f"{name} is {given}, and the {kind} draws no labels; leave it out, or ask for the "
                f"{' or '.join(sorted(DRAWN))}.",
                f"{path}{name}",
                {name: str(given)},
            )
    return 0
