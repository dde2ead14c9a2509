"""One rank's engine: models in shards, vectors by name, products and runs. It knows nothing of Ray.

Every method is called on all ranks with the same arguments, in the same order; what depends on one
rank's data alone (a NaN in its stretch of a file) is agreed on before anybody raises.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar, cast, final

import torch
from hvp_core.collective import Collective
from hvp_core.eigenpairs import Eigenpairs, Plan, Progress
from hvp_core.errors import CurvatureError, is_out_of_memory
from hvp_core.lanczos import eigsh

from hvp_workers import backend as api
from hvp_workers.memory import Memory
from hvp_workers.models import ModelStore
from hvp_workers.operators import LoadedOperator
from hvp_workers.plan import plan_eigsh

P = ParamSpec("P")
R = TypeVar("R")


def command(
    method: Callable[Concatenate[RankEngine, P], R],
) -> Callable[Concatenate[RankEngine, P], R]:
    """Give every failure of the mathematics the form that crosses processes."""

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
    """A Lanczos run between two products."""

    steps: Generator[Progress, None, Eigenpairs]
    space: api.Space
    loaded: LoadedOperator
    loss: float
    max_products: int
    provenance: dict[str, str]
    seconds: list[float] = field(default_factory=list)


@final
class RankEngine:
    """What one rank holds and can be told to do.

    Args:
        collective: How it talks to the other ranks.
        device: `cpu` or a CUDA device.
        tuning: How products are computed.
    """

    def __init__(self, collective: Collective, device: str, tuning: api.Tuning):
        self.collective = collective
        self.device = torch.device(device)
        self._memory = Memory(collective, self.device)
        self._models = ModelStore(collective, self.device, self._memory, tuning)
        self._vectors: dict[str, _Vector] = {}
        self._runs: dict[str, _Run] = {}
        self._vector_budget = min(collective.gather_objects(self._memory.total() // 2))

    # Operators --------------------------------------------------------------------------------

    def _operator(self, operator: api.Operator) -> LoadedOperator:
        return self._models.get(operator.space).operators.get(operator)

    # Products -----------------------------------------------------------------------------------

    @command
    def loss(self, operator: api.Operator) -> float:
        """L(θ)."""
        return self._operator(operator).curvature.loss()

    @command
    def gradient(self, operator: api.Operator, output: str) -> None:
        """Store ∇L(θ)."""
        self._reserve(operator.space, [output])
        gradient = self._operator(operator).curvature.gradient()
        self._vectors[output] = _Vector(operator.space, gradient)

    @command
    def apply(
        self, operator: api.Operator, inputs: Sequence[str], outputs: Sequence[str]
    ) -> Mapping[str, str]:
        """Store the product with each input; what is new about how they are computed."""
        vectors = [self._vector(name) for name in inputs]
        for name, vector in zip(inputs, vectors, strict=True):
            if vector.space != operator.space:
                raise CurvatureError(
                    "VECTOR_SPACE_MISMATCH", f"{name} belongs to another checkpoint or dtype"
                )
        self._reserve(operator.space, outputs)
        loaded = self._operator(operator)
        products = loaded.product(operator.kind, [vector.shard for vector in vectors])
        for name, product in zip(outputs, products, strict=True):
            self._vectors[name] = _Vector(operator.space, product)
        return loaded.news()

    # Vectors ------------------------------------------------------------------------------------

    def _vector(self, name: str) -> _Vector:
        if name not in self._vectors:
            raise CurvatureError(
                "INPUT_MISSING", f"{name} is not on the ranks; make it again", {"vector": name}
            )
        return self._vectors[name]

    def _reserve(self, space: api.Space, names: Sequence[str]) -> None:
        """Refuse vectors that would leave no room for the work itself."""
        numbers = self._models.get(space).space
        held = sum(v.shard.nbytes for n, v in self._vectors.items() if n not in names)
        needed = held + len(names) * numbers.vector_bytes
        if needed > self._vector_budget:
            raise CurvatureError(
                "VECTOR_MEMORY",
                f"vectors would take {needed} bytes on a rank and {self._vector_budget} are set "
                "aside for them; delete some, or use more workers",
                {"needed_bytes": str(needed), "available_bytes": str(self._vector_budget)},
            )

    @command
    def create_vector(self, name: str, space: api.Space, source: api.Source) -> None:
        """Make a vector; replaces one of that name."""
        self._reserve(space, [name])
        model = self._models.get(space)
        numbers = model.space
        match source:
            case api.Seeded(seed, distribution):
                shard = numbers.random(seed, distribution)
            case api.RawFile(path):
                shard = numbers.read(path)
            case api.Combination(terms):
                vectors = [(coefficient, self._vector(term)) for coefficient, term in terms]
                if any(vector.space != space for _, vector in vectors):
                    raise CurvatureError(
                        "VECTOR_SPACE_MISMATCH", "a term belongs to another checkpoint or dtype"
                    )
                shard = numbers.combine([(c, vector.shard) for c, vector in vectors])
            case api.Zeros():
                shard = numbers.zeros()
            case api.Parameters():
                shard = model.parameters.clone()
        self._vectors[name] = _Vector(space, shard)

    @command
    def delete_vectors(self, names: Sequence[str]) -> None:
        """Free vectors; unknown names are ignored."""
        for name in names:
            self._vectors.pop(name, None)

    @command
    def inner_products(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """u·v for each pair."""
        values = []
        for left, right in pairs:
            u, v = self._vector(left), self._vector(right)
            if u.space != v.space:
                raise CurvatureError(
                    "VECTOR_SPACE_MISMATCH", f"{left} and {right} are of different spaces"
                )
            values.append(self._models.get(u.space).space.dot(u.shard, v.shard))
        return values

    @command
    def save_vector(self, name: str, path: Path, start: int = 0, stop: int | None = None) -> None:
        """Write a range of a vector as one file of raw elements."""
        vector = self._vector(name)
        self._models.get(vector.space).space.write(vector.shard, path, start, stop)

    # Runs ---------------------------------------------------------------------------------------

    @command
    def eigsh_start(self, run: str, operator: api.Operator, spec: api.EigshSpec) -> None:
        """Plan a run and evaluate the loss; no product yet."""
        loaded = self._operator(operator)
        space = loaded.curvature.space
        # What the first product will keep has to fit beside the basis.
        promised = 0 if loaded.has_products else loaded.budget_bytes
        plan = plan_eigsh(
            spec,
            dimension=space.layout.numel,
            vector_bytes=space.vector_bytes,
            available_bytes=self._memory.least_available() - promised,
            semidefinite=operator.kind == "ggn",
            precision=operator.precision,
        )
        self._runs[run] = _Run(
            steps=self._steps(loaded, operator.kind, plan, spec.seed),
            space=operator.space,
            loaded=loaded,
            loss=loaded.curvature.loss(),
            max_products=plan.max_products,
            provenance=self._provenance(operator, loaded, plan, spec.seed),
        )

    def _steps(
        self, loaded: LoadedOperator, kind: api.Kind, plan: Plan, seed: int
    ) -> Generator[Progress, None, Eigenpairs]:
        """The run, not begun: the basis is allocated with the first product."""
        space = loaded.curvature.space

        def random(index: int) -> torch.Tensor:
            # Far from the seeds that people choose, and different for each index.
            return space.random((seed + index * 0x9E3779B97F4A7C15) % 2**64, "gaussian")

        return (
            yield from eigsh(
                # Lanczos has read a product before it asks for the next.
                lambda v: loaded.product(kind, [v], borrow=True)[0],
                random(0),
                space.layout.numel,
                plan,
                dots=space.dots,
                random=random,
                agree=lambda found: self.collective.gather_objects(found)[0],
                verifier=lambda: loaded.exact(kind),
            )
        )

    @command
    def eigsh_step(self, run: str, outputs: Sequence[str]) -> api.EigshProgress | api.EigshResult:
        """One more product; the result, its vectors stored under `outputs`, after the last."""
        state = self._runs[run]
        began = time.perf_counter()
        try:
            progress = next(state.steps)
        except StopIteration as stop:
            return self._finish(run, stop.value, outputs)
        state.seconds.append(time.perf_counter() - began)
        return api.EigshProgress(
            stage=progress.stage,
            num_products=progress.num_products,
            max_products=state.max_products,
            num_restarts=progress.num_restarts,
            ritz_values=progress.ritz_values,
            residual_estimates=progress.residual_estimates,
            seconds_per_product=statistics.median(state.seconds),
        )

    def _finish(self, run: str, pairs: Eigenpairs, outputs: Sequence[str]) -> api.EigshResult:
        state = self._runs.pop(run)
        for name, row in zip(outputs, pairs.eigenvectors, strict=True):
            self._vectors[name] = _Vector(state.space, row.clone())
        return api.EigshResult(
            eigenvalues=tuple(pairs.eigenvalues.tolist()),
            residuals=tuple(pairs.residuals.tolist()),
            num_products=pairs.num_products,
            outcome=pairs.outcome,
            error_bounds=tuple(pairs.error_bounds.tolist()),
            completeness=api.Completeness(**asdict(pairs.completeness)),
            symmetry_defect=pairs.symmetry_defect,
            ritz_values=tuple(pairs.ritz_values.tolist()),
            ritz_weights=tuple(pairs.ritz_weights.tolist()),
            loss=state.loss,
            provenance={
                **state.provenance,
                **state.loaded.curvature.notes(),
                "verified_in": "float64" if len(pairs.error_bounds) else "not verified",
            },
        )

    @command
    def eigsh_end(self, run: str) -> None:
        """Drop a run and its basis; unknown runs are ignored."""
        state = self._runs.pop(run, None)
        if state is not None:
            state.steps.close()
        self._memory.give_back()

    def _provenance(
        self, operator: api.Operator, loaded: LoadedOperator, plan: Plan, seed: int
    ) -> dict[str, str]:
        curvature = loaded.curvature
        return {
            "hvp": version("hvp"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "operator": operator.kind,
            "dtype": operator.space.dtype,
            "precision": operator.precision,
            "device": self.device.type,
            "num_ranks": str(self.collective.world_size),
            "num_targets": str(curvature.num_targets),
            "num_parameters": str(curvature.space.layout.numel),
            "num_lanczos_vectors": str(plan.num_vectors),
            "seed": str(seed),
            "probe": "Philox4x32-10 by flat index, Box-Muller",
            "blocks": str(len(curvature.chain.blocks)),
        }
