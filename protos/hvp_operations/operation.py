"""What an operation is: a question about an operator, and what the service asks of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, final

SpecT = TypeVar("SpecT")


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an operator before anything runs.

    Attributes:
        num_parameters: n, the length of its vectors.
        kind: `hessian` or `ggn`.
    """

    num_parameters: int
    kind: str


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an answer takes at most.

    Attributes:
        max_products: Products with the operator.
        least_vectors: Vectors that every rank must have room for, in shards; with fewer the run
            does not begin.
        wished_vectors: Vectors to have room for where memory allows; more would be of no use.
        results: Vectors that stay when the run has ended.
    """

    max_products: int
    least_vectors: int
    wished_vectors: int
    results: int = 0


@final
@dataclass(frozen=True, kw_only=True)
class Rule(Generic[SpecT]):
    """What a spec has to keep to.

    Attributes:
        field: The field at fault.
        reason: Code of the refusal.
        holds: Whether a spec keeps to it.
        allowed: What is possible and what to do, as a sentence.
    """

    field: str
    reason: str
    holds: Callable[[SpecT, Facts], bool]
    allowed: Callable[[SpecT, Facts], str]


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
        headings: Of the columns.
        rows: Cells as texts.
        title: Above it.
        notes: Sentences below it.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Detail:
    """Where a run stands, as only its operation can tell; the base of every `progress`."""

    def table(self) -> Table:
        """The figures, for people."""
        return Table(headings=(), rows=())


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every run finds beside its answer; the base of every `result`.

    Attributes:
        num_products: Products with the operator.
        loss: L(θ), nats.
        provenance: What the figures rest on: versions, digests, dtype, seed.
    """

    num_products: int
    loss: float = 0.0
    provenance: Mapping[str, str] = field(default_factory=dict)

    vectors: ClassVar[str] = ""  # the field that names vectors on the server, where there is one


@final
@dataclass(frozen=True, kw_only=True)
class Operation(Generic[SpecT]):
    """A question about an operator.

    Law: `spec`, `progress` and `result` have the fields of their messages, but for `operator`,
        which
    every spec's message has, and for the vectors of a result.

    Attributes:
        name: The field of `JobSpec.spec`, `JobProgress.detail` and `JobResult.result`, the SDK's
            method and the command.
        summary: What it computes, in a line for `hvp --help`.
        spec: A frozen dataclass; its docstring says what each field means.
        progress: A `Detail`.
        result: A `Result`.
        rules: What a spec has to keep to.
        cost: What an answer takes, of a spec that keeps to the rules.
        headline: What was asked, in a few words for a list of jobs.
        algorithm: `module:class` of `hvp_core.runs.algorithm.Algorithm`; imported on ranks alone.
        record: `module:class` of what the SDK gives; imported by clients alone.
        has_picture: Whether the record has `plot(path)`.
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
    has_picture: bool = False


def load(reference: str) -> Any:
    """Import what `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
