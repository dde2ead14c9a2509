"""Declarations of operations: a question about an operator, its rules, cost and result."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar, final

SpecT = TypeVar("SpecT")
#: The space of the vectors that an operator takes, or that of those which it gives.
Side = Literal["domain", "codomain"]

#: Begins the names under which an extension is given the vectors of the earlier result, with the
#: result's own field behind it; no field of a spec has a dot in its name.
EARLIER = "earlier."

#: Kinds of matrices that may have negative eigenvalues; the others are sums of squares.
INDEFINITE = frozenset({"hessian"})


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of an operator that are known before anything runs.

    Attributes:
        num_parameters: n, the length of the vectors that it takes.
        kind: Kind of the operator, such as `hessian` or `ggn`; of a sum it is its formula.
        num_outputs: m, the length of its products; None where it is n.
        is_semidefinite: Of a composed matrix, whether it is known to have no negative eigenvalue;
            None where its kind says it.
        parameter_names: Names of the parameters in canonical order; () where they are not known.
    """

    num_parameters: int
    kind: str
    num_outputs: int | None = None
    is_semidefinite: bool | None = None
    parameter_names: tuple[str, ...] = ()

    @property
    def most_values(self) -> int:
        """min(m, n): the number of singular values."""
        return min(self.num_parameters, self.num_outputs or self.num_parameters)

    @property
    def is_composed(self) -> bool:
        """Whether the operator is made of matrices, or more is done to one."""
        return self.is_semidefinite is not None

    @property
    def may_be_negative(self) -> bool:
        """Whether the matrix may have a negative eigenvalue."""
        if self.is_semidefinite is None:
            return self.kind in INDEFINITE
        return not self.is_semidefinite


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """The most that a run takes: products, and room for vectors.

    Of a Jacobian, vectors are counted in pairs: one that it takes, and one that it gives.

    Attributes:
        max_products: Upper bound on products with the operator.
        least_vectors: Number of vectors whose shards every rank must have room for; with less room
            the run does not begin.
        wished_vectors: Number of vectors that the run can make use of where memory allows.
        results: Number of vectors that stay when the run has ended.
    """

    max_products: int
    least_vectors: int
    wished_vectors: int
    results: int = 0


@final
@dataclass(frozen=True, kw_only=True)
class Rule(Generic[SpecT]):
    """A condition that a spec has to meet.

    Attributes:
        field: Name of the field that is at fault where the rule is broken.
        reason: UPPER_SNAKE code of the refusal.
        holds: Tells whether a spec keeps to the rule.
        allowed: Says which values are possible and what to do, as a sentence.
    """

    field: str
    reason: str
    holds: Callable[[SpecT, Facts], bool]
    allowed: Callable[[SpecT, Facts], str]


@final
@dataclass(frozen=True, kw_only=True)
class Input:
    """A field of a spec that names vectors on the server.

    The field has the type `hvp_operations.checking.Names` and is a repeated string in the message.
    The SDK takes vectors or numbers in its place. The server checks that the vectors are there and
    of the right space, lets none go before the job has ended, and brings them to the ranks.

    Attributes:
        field: Name of the field.
        space: Space of the operator that the vectors belong to.
        least: The fewest vectors that have to be named; 0 where the field may be left out.
        most: The most vectors that can be named.
        numbers: Name of the spec's field of numbers that go with the vectors, one with each; ""
            where there is none. The SDK takes a `Spectral` for both.
        taken_from: Field of the operation's result whose vectors serve as such an input: those of a
            result in the place of vectors, and of the job that an extension goes on from; "" for
            none.
    """

    field: str
    space: Side = "domain"
    least: int = 1
    most: int = 1
    numbers: str = ""
    taken_from: str = ""


class Spectral(ABC):
    """A record of vectors with a number for each: what an input with `numbers` can be given as."""

    @property
    @abstractmethod
    def spectral(self) -> tuple[Sequence[Any], Sequence[float]]:
        """The vectors, and their numbers in the same order."""


@final
@dataclass(frozen=True, kw_only=True)
class Extension(Generic[SpecT]):
    """What a job may change that goes on from the result of another one.

    Attributes:
        fields: Fields of the spec that may differ.
        refusal: Says, of the extension's spec and the earlier result, why there is nothing to go on
            from and what to do, as a sentence; "" where there is something.
        takes_result: Whether the algorithm needs the earlier result (`Budget.earlier`); otherwise
            the vectors of `Input.taken_from` are all.
        vectors: Fields of the earlier result whose vectors the algorithm needs beside it; they are
            among `Budget.inputs` behind `EARLIER`.
        new_seed: Whether the seed has to differ, and the SDK counts it up.
    """

    fields: tuple[str, ...]
    refusal: Callable[[SpecT, Any], str] = lambda spec, result: ""
    takes_result: bool = False
    vectors: tuple[str, ...] = ()
    new_seed: bool = False


class SpecError(Exception):
    """A spec that cannot be run.

    Attributes:
        reason: UPPER_SNAKE code.
        message: What is wrong and what is possible.
        field: Name of the field at fault.
        metadata: Figures that a program may want.
    """

    def __init__(
        self, reason: str, message: str, field: str, metadata: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.reason, self.message, self.field = reason, message, field
        self.metadata = dict(metadata or {})


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """Something to be shown in rows.

    Attributes:
        headings: Headings of the columns.
        rows: Rows of cells, as texts.
        title: Title above the table; "" for none.
        notes: Sentences below the table.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Detail:
    """An operation's own figures of where a run stands; the base of every `progress`."""

    def table(self) -> Table:
        """The figures, for people."""
        return Table(headings=(), rows=())


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures that every run gives beside its answer; the base of every `result`.

    Attributes:
        num_products: Products with the operator that were spent.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    num_products: int
    loss: float = 0.0
    provenance: Mapping[str, str] = field(default_factory=dict)

    #: Fields of the message that hold vectors on the server, which the dataclass does not have.
    vectors: ClassVar[tuple[str, ...]] = ()
    #: Those of these fields whose vectors are of the operator's codomain; others are of its domain.
    of_codomain: ClassVar[tuple[str, ...]] = ()

    def vector_counts(self) -> Mapping[str, int]:
        """The number of vectors in each field of `vectors`, in their order."""
        return {}

    def vector_spaces(self) -> tuple[Side, ...]:
        """The side of the operator that each of the vectors belongs to, in their order."""
        return tuple(
            "codomain" if field in self.of_codomain else "domain"
            for field, count in self.vector_counts().items()
            for _ in range(count)
        )


@final
@dataclass(frozen=True, kw_only=True)
class Operation(Generic[SpecT]):
    """A question about an operator.

    Law: `spec`, `progress` and `result` have the fields of their messages, but for `operator`,
    which every spec's message has, and for the vectors of a result.

    Attributes:
        name: The field of `JobSpec.spec`, `JobProgress.detail` and `JobResult.result`, the SDK's
            method and the command.
        summary: One line for `hvp --help` that says what the operation computes.
        spec: Frozen dataclass of the question; its docstring says what each field means.
        progress: Subclass of `Detail` for the run's progress.
        result: Subclass of `Result` for the run's result.
        rules: Conditions that a spec has to meet.
        cost: Gives the cost of a spec that keeps to the rules, beside the vectors that it names.
        inputs: Fields of the spec that name vectors on the server.
        headline: Says a spec in a few words, for a list of jobs.
        algorithm: `module:class` of `hvp_core.runs.algorithm.Algorithm`; imported on ranks alone.
        record: `module:class` of the SDK's record of a result; imported by clients alone.
        has_picture: Whether the record has `plot(path)`.
        asked_of: Whether it is a question about a symmetric matrix or about a Jacobian.
        extension: How a job is extended; None where it cannot be.
    """

    name: str
    summary: str
    spec: type[SpecT]
    progress: type[Detail]
    result: type[Result]
    rules: tuple[Rule[SpecT], ...]
    cost: Callable[[SpecT, Facts], Cost]
    headline: Callable[[SpecT], str]
    algorithm: str
    record: str
    inputs: tuple[Input, ...] = ()
    has_picture: bool = False
    asked_of: Literal["matrix", "jacobian"] = "matrix"
    extension: Extension[SpecT] | None = None

    def named(self, spec: SpecT) -> Mapping[str, tuple[str, ...]]:
        """Names of the vectors that a spec names, by field."""
        return {each.field: getattr(spec, each.field) for each in self.inputs}


def load(reference: str) -> Any:
    """Import what `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
