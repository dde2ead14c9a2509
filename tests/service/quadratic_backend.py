"""A second backend: the loss ½ θᵀAθ, whose Hessian A lies in the checkpoint, in numpy.

A checkpoint is a safetensors file of `A` (n, n) and `theta` (n,), both F64, and a config of
model_type `quadratic`. Ranks are pretended to be lost, or products to take long, on demand.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from hvp_batches.schema import causal_schema
from hvp_operations.density import DensityResult, DensitySpec, Quadrature
from hvp_operations.eigsh import EigshProgress, EigshResult
from hvp_operations.operation import Result
from hvp_operations.solve import SolveResult, SolveSpec, System
from hvp_workers.backend import (
    NO_INPUTS,
    Backend,
    BackendError,
    CheckpointDescription,
    Combination,
    Form,
    GroupLostError,
    Operator,
    Parameters,
    ParameterTensor,
    RankInfo,
    RawFile,
    RunProgress,
    Seeded,
    Source,
    Space,
    Zeros,
)
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[Any]

VOCAB_SIZE = 64
MAX_POSITIONS = 16


@final
class QuadraticBackend(Backend):
    """One rank in this process.

    Attributes:
        lose_after: Number of calls on the ranks until they are lost, or None.
        lose_each_time: What `lose_after` is after each start anew.
        gate: A product of a run waits for it.
        num_products: Products of runs since the beginning.
        num_starts: Times the ranks were started.
        start_errors: What the next starts raise, one after another.
        memory_bytes: What its rank says it has in all.
        asked: Operators of products and runs, in order.
        resident: Vectors that the ranks hold.
    """

    def __init__(self) -> None:
        self.lose_after: int | None = None
        self.lose_each_time: int | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_products = 0
        self.asked: list[Operator] = []
        self.num_starts = 0
        self.start_errors: list[Exception] = []
        self.memory_bytes = 1 << 40
        self.resident: dict[str, Array] = {}
        self._ended = asyncio.Event()
        self._generation = ""

    async def start(self) -> None:
        if not self._generation:
            self.num_starts += 1
            if self.start_errors:
                raise self.start_errors.pop(0)
            self._ended = asyncio.Event()
            self.lose_after = self.lose_each_time
            self._generation = uuid.uuid4().hex

    async def close(self) -> None:
        self._ended.set()
        self.resident.clear()
        self._generation = ""

    @property
    def generation(self) -> str:
        return self._generation

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def num_ranks(self) -> int:
        return 1

    def _reach_ranks(self) -> None:
        if not self._generation:
            raise GroupLostError("WORKER_GROUP_LOST", "the ranks are not there")
        if self.lose_after is not None:
            self.lose_after -= 1
            if self.lose_after < 0:
                self.lose_after = None
                self.resident.clear()
                self._generation = ""
                raise GroupLostError("WORKER_GROUP_LOST", "rank 0 died")

    async def _pass_gate(self) -> None:
        """Wait as long as a product takes, or until the ranks are ended in its midst."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, self._ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._ended.is_set():
            raise GroupLostError("WORKER_GROUP_LOST", "the ranks were ended")

    async def ranks(self) -> list[RankInfo]:
        return [
            RankInfo(
                rank=0,
                hostname="here",
                pid=os.getpid(),
                resident_bytes=1,
                num_threads=1,
                memory_bytes=self.memory_bytes,
            )
        ]

    async def describe_checkpoint(self, checkpoint_dir: Path) -> CheckpointDescription:
        config = json.loads((checkpoint_dir / "config.json").read_text())
        if config["model_type"] != "quadratic":
            raise BackendError("ARCHITECTURE_UNKNOWN", f"no model of type {config['model_type']}")
        if "theta" not in _tensors(checkpoint_dir):
            raise BackendError("TENSOR_MISSING", "there is no theta", {"tensor": "theta"})
        theta = _tensors(checkpoint_dir)["theta"]
        return CheckpointDescription(
            architecture="Quadratic",
            num_parameters=theta.size,
            vocab_size=VOCAB_SIZE,
            max_positions=MAX_POSITIONS,
            stored_dtype="F64",
            parameters=(ParameterTensor(name="theta", shape=theta.shape, offset=0),),
            task="causal language modelling",
            batch_schema=causal_schema(VOCAB_SIZE, MAX_POSITIONS),
        )

    def default_micro_batch(self, num_sequences: int, sequence_length: int) -> int:
        return 1

    async def loss(self, operator: Operator) -> float:
        self._reach_ranks()
        theta = _theta(operator.space)
        with np.errstate(invalid="ignore"):
            loss = float(0.5 * theta @ _matrix(operator.space) @ theta)
        if not np.isfinite(loss):
            raise BackendError("NON_FINITE", "the loss is not finite", {"block": "theta"})
        return loss

    async def gradient(self, operator: Operator, output: str) -> None:
        self._reach_ranks()
        self.resident[output] = _matrix(operator.space) @ _theta(operator.space)

    async def apply(
        self, operator: Operator, inputs: Sequence[str], outputs: Sequence[str]
    ) -> Mapping[str, str]:
        self._reach_ranks()
        await self._pass_gate()
        first = not self.asked
        self.asked.append(operator)
        for name, output in zip(inputs, outputs, strict=True):
            self.resident[output] = _matrix(operator.space) @ self._held(name)
        return {"schedule": "by hand"} if first else {}

    async def evaluate_forms(
        self, operator: Operator, form: Form, inputs: Sequence[str]
    ) -> list[float]:
        self._reach_ranks()
        matrix, theta = _matrix(operator.space), _theta(operator.space)
        along = {"quadratic": lambda v: v @ matrix @ v, "slope": lambda v: theta @ matrix @ v}
        return [float(along[form](self._held(name))) for name in inputs]

    async def shape(self, space: Space) -> tuple[int, ...]:
        raise BackendError("MODULE_NOT_FOUND", "a quadratic form has no submodules")

    async def check_jacobian(self, operator: Operator) -> None:
        raise BackendError("MODULE_NOT_FOUND", "a quadratic form has no submodules")

    async def losses_along(
        self, operator: Operator, directions: Sequence[str], points: Sequence[Sequence[float]]
    ) -> list[float]:
        self._reach_ranks()
        matrix, theta = _matrix(operator.space), _theta(operator.space)
        held = [self._held(name) for name in directions]
        at = [theta + sum(a * d for a, d in zip(each, held, strict=True)) for each in points]
        return [float(x @ matrix @ x) / 2 for x in at]

    async def create_vector(self, name: str, space: Space, source: Source) -> None:
        self._reach_ranks()
        n = _theta(space).size
        match source:
            case Seeded(seed=seed, distribution=distribution):
                made = _probe(seed, distribution, n)
            case RawFile(path=path):
                made = np.fromfile(path, space.dtype)
                bad = np.flatnonzero(~np.isfinite(made))
                if bad.size:
                    raise BackendError(
                        "NON_FINITE", "an element is not finite", {"index": str(bad[0])}
                    )
            case Combination(terms=terms):
                made = sum((c * self._held(term) for c, term in terms), np.zeros(n))
            case Zeros():
                made = np.zeros(n)
            case Parameters():
                made = _theta(space)
        self.resident[name] = made.astype(space.dtype)

    async def delete_vectors(self, names: Sequence[str]) -> None:
        self._reach_ranks()
        for name in names:
            self.resident.pop(name, None)

    async def inner_products(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self._reach_ranks()
        return [
            float(self._held(left).astype(np.float64) @ self._held(right)) for left, right in pairs
        ]

    async def save_vector(
        self, name: str, path: Path, start: int = 0, stop: int | None = None
    ) -> None:
        self._reach_ranks()
        self._held(name)[start:stop].tofile(path)

    async def run(
        self,
        operator: Operator,
        operation: str,
        spec: Any,
        outputs: Sequence[str],
        inputs: Mapping[str, Sequence[str]] = NO_INPUTS,
        earlier: Result | None = None,
    ) -> AsyncIterator[RunProgress | Result]:
        self.asked.append(operator)
        if operation == "solve":
            async for item in self._solve(operator, spec, outputs, inputs):
                yield item
            return
        if operation == "density":
            async for item in self._density(operator, spec, earlier):
                yield item
            return
        assert operation == "eigsh"
        matrix = _matrix(operator.space)
        n = matrix.shape[0]
        yield RunProgress(operation=operation, stage="loading", num_products=0, max_products=n)
        basis = [_probe(spec.seed, "sphere", n)]
        for step in range(n):
            self._reach_ranks()
            await self._pass_gate()
            self.num_products += 1
            product = matrix @ basis[-1]
            rows = np.array(basis)
            ritz = np.linalg.eigvalsh(rows @ matrix @ rows.T)
            yield RunProgress(
                operation=operation,
                stage="iterating",
                num_products=step + 1,
                max_products=n,
                seconds_per_product=0.25,
                detail=EigshProgress(ritz_values=tuple(ritz[-spec.k :])),
            )
            for _ in range(2):
                product -= rows.T @ (rows @ product)
            if np.linalg.norm(product) < 1e-12:
                break
            basis.append(product / np.linalg.norm(product))
        rows = np.array(basis)
        values, coordinates = np.linalg.eigh(rows @ matrix @ rows.T)
        vectors = rows.T @ coordinates
        chosen = _wanted(values, spec.k, spec.which)
        for index, output in zip(chosen, outputs, strict=True):
            self.resident[output] = vectors[:, index].astype(operator.space.dtype)
        yield EigshResult(
            eigenvalues=tuple(float(values[i]) for i in chosen),
            residuals=tuple(
                float(np.linalg.norm(matrix @ vectors[:, i] - values[i] * vectors[:, i]))
                for i in chosen
            ),
            num_products=len(basis),
            outcome="CONVERGED",
            symmetry_defect=0.0,
            ritz_values=tuple(values),
            ritz_weights=tuple(coordinates[0] ** 2),
            loss=0.0,
            provenance={"seed": str(spec.seed)},
        )

    async def _density(
        self, operator: Operator, spec: DensitySpec, earlier: Result | None
    ) -> AsyncIterator[RunProgress | Result]:
        """The whole measure that each probe sees; a probe is a step, and a product."""
        values, u = np.linalg.eigh(_matrix(operator.space))
        known = earlier.quadratures if isinstance(earlier, DensityResult) else ()
        quadratures = list(known)
        yield RunProgress(operation="density", stage="loading", num_products=0, max_products=0)
        for index in range(len(known), spec.num_probes):
            self._reach_ranks()
            await self._pass_gate()
            self.num_products += 1
            weights = (u.T @ _probe(spec.seed + index, "sphere", len(values))) ** 2
            quadratures.append(Quadrature(nodes=tuple(values), weights=tuple(weights)))
            yield RunProgress(
                operation="density",
                stage="iterating",
                num_products=index + 1 - len(known),
                max_products=spec.num_probes - len(known),
            )
        yield DensityResult(
            quadratures=tuple(quadratures),
            orthogonality_defect=0.0,
            num_products=spec.num_probes - len(known),
        )

    async def _solve(
        self,
        operator: Operator,
        spec: SolveSpec,
        outputs: Sequence[str],
        inputs: Mapping[str, Sequence[str]],
    ) -> AsyncIterator[RunProgress | Result]:
        """Dense solves, a right-hand side a step; the ranks hold them from the beginning on."""
        yield RunProgress(operation="solve", stage="loading", num_products=0, max_products=0)
        self._reach_ranks()
        matrix = _matrix(operator.space) + spec.damping * np.eye(len(_theta(operator.space)))
        held = [self._held(name) for name in inputs["b"]]
        for index, (b, output) in enumerate(zip(held, outputs, strict=False)):
            await self._pass_gate()
            self._reach_ranks()
            self.resident[output] = np.linalg.solve(matrix, b).astype(operator.space.dtype)
            yield RunProgress(
                operation="solve", stage="iterating", num_products=index + 1, max_products=len(held)
            )
        system = System(
            outcome="CONVERGED",
            num_products=1,
            relative_residual=0.0,
            recursion_residual=0.0,
            is_exact=True,
        )
        yield SolveResult(systems=(system,) * len(held), num_products=len(held))

    def _held(self, name: str) -> Array:
        if name not in self.resident:
            raise BackendError("INPUT_MISSING", f"the ranks do not hold {name}")
        return self.resident[name]


def _tensors(checkpoint_dir: Path) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for path in checkpoint_dir.glob("*.safetensors"):
        found |= load_file(path)
    return found


def _theta(space: Space) -> Array:
    return _tensors(space.checkpoint_dir)["theta"]


def _matrix(space: Space) -> Array:
    return _tensors(space.checkpoint_dir)["A"]


def _probe(seed: int, distribution: str, n: int) -> Array:
    generator = np.random.default_rng(seed)
    if distribution == "rademacher":
        return generator.choice([-1.0, 1.0], n)
    sample = generator.standard_normal(n)
    return sample / np.linalg.norm(sample) if distribution == "sphere" else sample


def _wanted(values: Array, k: int, which: str) -> list[int]:
    order = list(range(len(values)))
    if which == "LM":
        order.sort(key=lambda i: -abs(values[i]))
        return sorted(order[:k])
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return order[:low] + order[len(order) - (k - low) :]
