"""One rank's engine: models in shards, vectors by name, products and runs. It knows nothing of Ray.

Every method is called on all ranks with the same arguments, in the same order. A failure that
depends on one rank's data alone (a NaN in its stretch of a file) is agreed on before any rank
raises.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast, final

import torch
from hvp_core.autodiff.product_spec import matrix
from hvp_core.autodiff.verify import keep_verdicts
from hvp_core.errors import CurvatureError, is_out_of_memory
from hvp_core.linop.symmetry import SymmetryCheck
from hvp_core.precision import reproducible
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found
from hvp_core.sharding.collective import Collective
from hvp_core.vectors.output_space import OutputSpace
from hvp_core.vectors.space import ShardedSpace
from hvp_operations.checking import checked
from hvp_operations.operation import EARLIER, Facts, Result, Side, SpecError, load
from hvp_operations.registry import operations

from hvp_workers import backend as api
from hvp_workers.composed import (
    ComposedOperator,
    draws_of,
    inverse_root,
    quadratic,
)
from hvp_workers.memory import Memory
from hvp_workers.models import ModelStore
from hvp_workers.operators import JacobianOperator, LoadedOperator, no_vector_memory
from hvp_workers.plan import Policy
from hvp_workers.room import composed_vectors

P = ParamSpec("P")
R = TypeVar("R")


def command(
    method: Callable[Concatenate[RankEngine, P], R],
) -> Callable[Concatenate[RankEngine, P], R]:
    """Let a method raise every CurvatureError, and every lack of memory, as a BackendError."""

    @functools.wraps(method)
    def wrapper(self: RankEngine, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except CurvatureError as error:
            told = dict(error.metadata)
            trace = told.pop("traceback", "")  # for the server's log alone
            raise api.BackendError(error.reason, error.message, told, trace) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise api.BackendError(
                "OUT_OF_MEMORY",
                f"rank {self.collective.rank} has no memory left; use a smaller micro-batch, "
                "float32, fewer Lanczos vectors or more workers",
            ) from None

    return cast("Callable[Concatenate[RankEngine, P], R]", wrapper)


@final
@dataclass(frozen=True)
class _Vector:
    """A shard under a name."""

    space: api.Space
    shard: torch.Tensor


@final
@dataclass
class _Run:
    """A run between two steps.

    Attributes:
        operation: Name of the operation.
        operator: The operator that the question is about.
        algorithm: The configured algorithm.
        spaces: Space of the vectors that the operator takes, and of those that it gives.
        loss: L(θ).
        max_products: The most products that the run may make.
        provenance: Facts that the answer will rest on, by name.
        policy: Decides what memory decides.
        state: State of the algorithm; None before the first step, which takes its memory.
        num_products: Number of products so far.
        seconds: Seconds for a product, for each step.
    """

    operation: str
    operator: ComposedOperator | JacobianOperator
    algorithm: Algorithm[Any]
    spaces: Mapping[Side, api.Space]
    loss: float
    max_products: int
    provenance: dict[str, str]
    policy: Policy
    state: Any = None
    num_products: int = 0
    seconds: list[float] = field(default_factory=list)

    def step(self) -> Advance | None:
        """Go on by one step; the first one allocates the run's memory."""
        with reproducible(self.policy.is_deterministic):
            if self.state is None:
                self.state = self.algorithm.begin(self.operator.linear)
            return self.algorithm.step(self.operator.linear, self.state)

    def found(self) -> Found:
        """The answer, once the algorithm has finished."""
        with reproducible(self.policy.is_deterministic):
            return self.algorithm.result(self.operator.linear, self.state)


@final
class RankEngine:
    """One rank's models, vectors and runs, and the methods that work on them.

    Args:
        collective: The exchange with the other ranks.
        device: `cpu` or a CUDA device.
        tuning: Settings of how products are computed.
    """

    def __init__(self, collective: Collective, device: str, tuning: api.Tuning):
        self.collective = collective
        self.device = torch.device(device)
        self._memory = Memory(collective, self.device)
        self._models = ModelStore(collective, self.device, self._memory, tuning)
        if tuning.compile_cache is not None:
            keep_verdicts(tuning.compile_cache / "verified", self.device)
        self._vectors: dict[str, _Vector] = {}
        self._runs: dict[str, _Run] = {}
        self._vector_budget = min(collective.gather_objects(self._memory.total() // 2))

    # Operators --------------------------------------------------------------------------------

    def _operator(self, operator: api.Operator) -> LoadedOperator:
        return self._models.get(operator.space).operators.get(operator)

    def _space(self, space: api.Space) -> ShardedSpace:
        """The space as it is cut over the ranks.

        Outputs are cut as the batch is by default, so a Jacobian has no other micro-batch size.
        """
        model = self._models.get(space)
        if space.outputs_on is None:
            return model.operators.space_of(space.parameters)
        if space.activation is not None:
            return model.operators.space_of_activation(space)
        operator = api.Operator(space=space.whole, batch_path=space.outputs_on, kind="jacobian")
        return model.operators.get(operator).curvature.output_space

    def _composed(
        self, operator: api.Operator, loaded: LoadedOperator, *, is_checked: bool = False
    ) -> ComposedOperator:
        """An operator as it is named.

        Raises:
            CurvatureError: INPUT_MISSING, VECTOR_SPACE_MISMATCH or PRECONDITIONER_INVALID, for the
                diagonal.
        """
        root = None
        if operator.composition is not None and operator.composition.precondition:
            (diagonal,) = self._shards(operator.space, [operator.composition.precondition])
            root = inverse_root(loaded.curvature.space, diagonal)
        return ComposedOperator(loaded, operator, root, is_checked=is_checked)

    # Products -----------------------------------------------------------------------------------

    @command
    def loss(self, operator: api.Operator) -> float:
        """L(θ), the same on every rank."""
        return self._operator(operator.plain).curvature.loss()

    @command
    def gradient(self, operator: api.Operator, output: str) -> None:
        """Store ∇L(θ) under the name `output`."""
        self._reserve(operator.space, [output])
        gradient = self._operator(operator.plain).curvature.gradient()
        self._vectors[output] = _Vector(operator.space, gradient)

    @command
    def apply(
        self, operator: api.Operator, inputs: Sequence[str], outputs: Sequence[str]
    ) -> Mapping[str, str]:
        """Store the product with each input; new notes on how the products are computed."""
        vectors = self._shards(operator.domain, inputs)
        self._reserve(operator.codomain, outputs)
        loaded = self._operator(operator)
        if operator.composition is None:
            products = loaded.product(operator.kind, vectors, draws=draws_of(operator))
        else:
            products = self._composed(operator, loaded).linear.apply(vectors)
        for name, product in zip(outputs, products, strict=True):
            self._vectors[name] = _Vector(operator.codomain, product)
        return loaded.news()

    @command
    def evaluate_forms(
        self, operator: api.Operator, form: api.Form, inputs: Sequence[str]
    ) -> list[float]:
        """A number for each input; products that are made on the way do not outlive the call."""
        vectors = self._shards(operator.space, inputs)
        loaded = self._operator(operator.plain)
        match form:
            case "slope":
                return loaded.slopes(vectors)
            case "quadratic":
                assert operator.kind not in api.JACOBIANS  # which the service refuses
                room = self._vector_budget - self._held_bytes()
                forms, beside = None, composed_vectors(operator.composition)
                if operator.composition is None:
                    forms = loaded.forward_forms(operator.kind, vectors, draws_of(operator))
                if forms is not None:
                    return forms
                return quadratic(
                    self._composed(operator, loaded).linear, vectors, room, beside, loaded.policy
                )

    @command
    def losses_along(
        self, operator: api.Operator, directions: Sequence[str], points: Sequence[Sequence[float]]
    ) -> list[float]:
        """The loss at each point, the same on every rank; nothing outlives the call."""
        vectors = self._shards(operator.space, directions)
        return self._operator(operator.plain).losses_along(vectors, points)

    @command
    def shape(self, space: api.Space) -> tuple[int, ...]:
        """The shape of vectors of a space of activations."""
        found = self._space(space)
        assert isinstance(found, OutputSpace)
        return found.shape

    @command
    def check_jacobian(self, operator: api.Operator) -> None:
        """Build a Jacobian of activations, so far as no product is made."""
        self._operator(operator)

    # Vectors ------------------------------------------------------------------------------------

    def _vector(self, name: str) -> _Vector:
        if name not in self._vectors:
            raise CurvatureError(
                "INPUT_MISSING", f"{name} is not on the ranks; make it again", {"vector": name}
            )
        return self._vectors[name]

    def _shards(self, space: api.Space, names: Sequence[str]) -> list[torch.Tensor]:
        """This rank's shards of the named vectors, which must belong to this space.

        Raises:
            CurvatureError: INPUT_MISSING, VECTOR_SPACE_MISMATCH.
        """
        vectors = [self._vector(name) for name in names]
        for name, vector in zip(names, vectors, strict=True):
            if vector.space != space:
                raise CurvatureError(
                    "VECTOR_SPACE_MISMATCH",
                    f"{name} belongs to another checkpoint, selection of parameters, batch or "
                    "dtype than the operator's vectors",
                )
        return [vector.shard for vector in vectors]

    def _held_bytes(self, without: Sequence[str] = ()) -> int:
        return sum(v.shard.nbytes for name, v in self._vectors.items() if name not in without)

    def _reserve(self, space: api.Space, names: Sequence[str]) -> None:
        """Refuse vectors that would leave no room for the work itself.

        Raises:
            CurvatureError: VECTOR_MEMORY.
        """
        needed = self._held_bytes(names) + len(names) * self._space(space).vector_bytes
        if needed > self._vector_budget:
            raise no_vector_memory(needed, self._vector_budget)

    @command
    def create_vector(self, name: str, space: api.Space, source: api.Source) -> None:
        """Make a vector; replaces one of that name.

        Raises:
            BackendError: VECTOR_MEMORY; SHAPE_MISMATCH or NON_FINITE, for a file; INPUT_MISSING or
                VECTOR_SPACE_MISMATCH, for a combination.
        """
        self._reserve(space, [name])
        numbers = self._space(space)
        match source:
            case api.Seeded(seed, distribution):
                shard = numbers.random(seed, distribution)
            case api.RawFile(path):
                shard = numbers.read(path)
            case api.Combination(terms):
                vectors = [(coefficient, self._vector(term)) for coefficient, term in terms]
                if any(vector.space != space for _, vector in vectors):
                    raise CurvatureError(
                        "VECTOR_SPACE_MISMATCH",
                        "a term belongs to another checkpoint, selection of parameters or dtype",
                    )
                shard = numbers.combine([(c, vector.shard) for c, vector in vectors])
            case api.Zeros():
                shard = numbers.zeros()
            case api.Parameters():
                shard = self._models.get(space).part_of_parameters(space.parameters)
        self._vectors[name] = _Vector(space, shard)

    @command
    def delete_vectors(self, names: Sequence[str]) -> None:
        """Free vectors; unknown names are ignored."""
        for name in names:
            self._vectors.pop(name, None)

    @command
    def inner_products(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """u·v for each pair, the same on every rank.

        Raises:
            BackendError: INPUT_MISSING; VECTOR_SPACE_MISMATCH: a pair is of two spaces.
        """
        values = []
        for left, right in pairs:
            u, v = self._vector(left), self._vector(right)
            if u.space != v.space:
                raise CurvatureError(
                    "VECTOR_SPACE_MISMATCH", f"{left} and {right} are of different spaces"
                )
            values.append(self._space(u.space).dot(u.shard, v.shard))
        return values

    @command
    def save_vector(self, name: str, path: Path, start: int = 0, stop: int | None = None) -> None:
        """Write a range of a vector as one file of raw elements."""
        vector = self._vector(name)
        self._space(vector.space).write(vector.shard, path, start, stop)

    # Runs ---------------------------------------------------------------------------------------

    @command
    def run_start(
        self,
        run: str,
        operator: api.Operator,
        operation: str,
        spec: Any,
        inputs: Mapping[str, Sequence[str]],
        earlier: Result | None = None,
    ) -> None:
        """Plan a run and evaluate the loss; no product is made yet.

        Args:
            run: Name of the run.
            operator: The operator that the question is about.
            operation: Name of the operation.
            spec: Spec of the operation.
            inputs: Names of the vectors that the spec names, by field; none where it is left out;
                and those of the result that the run goes on from, behind `EARLIER`.
            earlier: Result that the run goes on from; None for a run of its own.

        Raises:
            BackendError: INSUFFICIENT_CLUSTER_MEMORY; NON_FINITE; INPUT_MISSING or
                VECTOR_SPACE_MISMATCH, for an input or the operator's preconditioner;
                PRECONDITIONER_INVALID; the reason of a spec that breaks
                a rule of its operation.
        """
        declared = operations()[operation]
        loaded = self._operator(operator)
        composition = operator.composition
        facts = Facts(
            num_parameters=self._space(operator.domain).dimension,
            kind=operator.kind,
            num_outputs=self._space(operator.codomain).dimension,
            is_semidefinite=composition and composition.is_semidefinite,
            parameter_names=tuple(self._space(operator.domain).parts()),
        )
        # Once more: the row that the spec comes from may have been damaged.
        try:
            spec = checked(declared, vars(spec), facts)
        except SpecError as error:
            raise CurvatureError(error.reason, error.message, error.metadata) from None
        given = {
            each.field: tuple(
                self._shards(getattr(operator, each.space), inputs.get(each.field, ()))
            )
            for each in declared.inputs
        }
        if earlier is not None and declared.extension is not None:
            for field in declared.extension.vectors:
                side = "codomain" if field in declared.result.of_codomain else "domain"
                name = f"{EARLIER}{field}"
                given[name] = tuple(self._shards(getattr(operator, side), inputs.get(name, ())))
        cost = declared.cost(spec, facts)
        vector_bytes = self._vector_bytes(operator)
        # What the first product will keep has to fit beside the run's own vectors.
        promised = 0 if loaded.has_products else loaded.budget_bytes
        composed: ComposedOperator | JacobianOperator
        if operator.kind in api.JACOBIANS:
            composed = JacobianOperator(loaded, operator.precision)
            held = SymmetryCheck.NUM_VECTORS
        else:
            composed = self._composed(operator, loaded, is_checked=True)
            held = SymmetryCheck.NUM_VECTORS * composed.num_matrices
            held += composed_vectors(composition)
        promised += held * vector_bytes
        budget = Budget(
            max_products=cost.max_products,
            num_vectors=loaded.policy.room_for(
                cost,
                vector_bytes=vector_bytes,
                available_bytes=self._memory.least_available() - promised,
            ),
            inputs=given,
            earlier=earlier,
        )
        self._runs[run] = _Run(
            operation=operation,
            operator=composed,
            algorithm=load(declared.algorithm).configure(spec, composed.linear, budget),
            spaces={"domain": operator.domain, "codomain": operator.codomain},
            loss=self._operator(operator.plain).curvature.loss(),
            max_products=cost.max_products,
            provenance=self._provenance(operator, loaded, budget),
            policy=loaded.policy,
        )

    def _vector_bytes(self, operator: api.Operator) -> int:
        """Bytes of a run's vector on the rank where it has most; of a Jacobian, of one each way."""
        spaces = {operator.domain, operator.codomain}
        own = sum(self._space(space).vector_bytes for space in spaces)
        most: int = max(self.collective.gather_objects(own))
        return most

    @command
    def run_step(self, run: str, outputs: Sequence[str]) -> api.RunProgress | Result:
        """Make one more step: its progress; after the last one, the result.

        The result's vectors are stored under the first of the names `outputs`.
        """
        state = self._runs[run]
        began = time.perf_counter()
        advance = state.step()
        if advance is None:
            return self._finish(run, outputs)
        state.seconds.append(
            (time.perf_counter() - began) / max(1, advance.num_products - state.num_products)
        )
        state.num_products = advance.num_products
        return api.RunProgress(
            operation=state.operation,
            stage=advance.stage,
            num_products=advance.num_products,
            max_products=state.max_products,
            seconds_per_product=statistics.median(state.seconds),
            detail=advance.detail,
        )

    def _finish(self, run: str, outputs: Sequence[str]) -> Result:
        state = self._runs.pop(run)
        found = state.found()
        sides = found.result.vector_spaces()
        for name, side, vector in zip(outputs[: len(sides)], sides, found.vectors, strict=True):
            self._vectors[name] = _Vector(state.spaces[side], vector.clone())
        result: Result = replace(
            found.result,
            loss=state.loss,
            provenance={
                **state.provenance,
                **found.result.provenance,
                **state.operator.notes(),
            },
        )
        return result

    @command
    def run_end(self, run: str) -> None:
        """Drop a run and what it holds; unknown runs are ignored."""
        self._runs.pop(run, None)
        self._memory.give_back()

    def _provenance(
        self, operator: api.Operator, loaded: LoadedOperator, budget: Budget
    ) -> dict[str, str]:
        curvature = loaded.curvature
        drawn = {}
        is_matrix = operator.composition is None and operator.kind not in api.JACOBIANS
        if is_matrix and matrix(operator.kind).draws is not None:
            drawn["sample_seed"] = str(operator.sample_seed)
            drawn["num_samples"] = str(operator.num_samples)
        activations = {"output": operator.output, "input": operator.by}
        return {
            **{
                key: f"{each.side} of {each.module}"
                for key, each in activations.items()
                if each is not None
            },
            "hvp": version("hvp"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "operator": operator.kind,
            **drawn,
            "dtype": operator.space.dtype,
            "precision": operator.precision,
            "device": self.device.type,
            "num_ranks": str(self.collective.world_size),
            "num_targets": str(curvature.num_targets),
            "num_parameters": str(curvature.space.dimension),
            "num_tensors": str(len(curvature.space.layout.parameters)),
            "probe": "Philox4x32-10 by flat index, Box-Muller",
            "blocks": str(len(curvature.chain.blocks)),
            **loaded.policy.provenance(curvature, budget.num_vectors),
        }
