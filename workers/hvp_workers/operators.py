"""The operators of one model on one rank: built when they are asked for; the latest are kept."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

import torch
from hvp_core.autodiff.product_spec import CENTRED, Draws, matrix
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.drawn_labels import DrawnLabels
from hvp_core.curvature.kronecker import KroneckerPreconditioner
from hvp_core.curvature.sections import activation_space, section_of
from hvp_core.errors import CurvatureError
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.linop.preconditioner import Preconditioner
from hvp_core.linop.symmetry import SymmetryCheck
from hvp_core.model.chain import Chain, MicroBatch
from hvp_core.model.places import Place
from hvp_core.settings import ComputeSettings
from hvp_core.vectors.output_space import OutputSpace
from hvp_core.vectors.space import ParameterSpace
from hvp_operations.solve import FACTOR_VECTORS

from hvp_workers import backend as api
from hvp_workers.memory import Memory
from hvp_workers.micro_batch import default_micro_batch
from hvp_workers.plan import DRAWING, EXACT, Policy, exact_bytes, policy

#: Unit roundoff of the operands of matrix products, where it is more than the vectors' own.
_NOISE: dict[api.Precision, float] = {"full": 0.0, "tf32": 2**-11, "bfloat16": 2**-8}
#: Products at once: more would share little more, (2 + 6K) / K GEMM units each, and each takes
#: activations of its own.
TOGETHER = 8
_SCHEDULE = "schedule_"  # notes of which begin with the kind that they are of
_KEPT = 4  # an older one's batch is read again when it is needed


def no_vector_memory(needed: int, available: int) -> CurvatureError:
    """The refusal of vectors that would leave no room for the work itself."""
    return CurvatureError(
        "VECTOR_MEMORY",
        f"vectors would take {needed} bytes on a rank and {available} are set aside for them; "
        "delete some, or use more workers",
        {"needed_bytes": str(needed), "available_bytes": str(available)},
    )


def _together(vectors: Sequence[torch.Tensor], most: int) -> Iterator[Sequence[torch.Tensor]]:
    """The vectors in their order, at most `most` at a time."""
    for start in range(0, len(vectors), most):
        yield vectors[start : start + most]


@final
@dataclass
class LoadedOperator:
    """A loss at a point, with products of every kind.

    Attributes:
        curvature: Computes the products.
        budget_bytes: Memory it may hold between products, from the first product on.
        policy: Decides what memory decides.
        has_products: Whether there has been a product, so that this memory is taken already.
    """

    curvature: Curvature
    budget_bytes: int
    policy: Policy
    _widest: Callable[[], Curvature | None]
    _budget_now: Callable[[], int] = lambda: 0
    has_products: bool = False
    _told: Mapping[str, str] = field(default_factory=dict)
    _exact: weakref.ref[LoadedOperator] | None = None

    def product(
        self,
        kind: str,
        vectors: Sequence[torch.Tensor],
        *,
        draws: Draws | None = None,
        borrow: bool = False,
    ) -> list[torch.Tensor]:
        """The product with each vector, this rank's part.

        Args:
            kind: The matrix, or a Jacobian.
            vectors: Vectors of the operator's domain, this rank's shards.
            draws: The labels of a Fisher matrix.
            borrow: Products of a matrix may be overwritten by the next call.
        """
        match kind:
            case "jacobian":
                products = self.curvature.jvp(vectors)
            case "jacobian_transposed":
                products = self.curvature.vjp(vectors)
            case _:
                try:
                    products = self.curvature.product(kind, vectors, draws=draws, borrow=borrow)
                except CurvatureError as error:
                    if error.reason != "DETERMINISTIC_MEMORY":
                        raise
                    # There may be more memory than there was when the operator was loaded.
                    self.curvature.allow(self._budget_now())
                    products = self.curvature.product(kind, vectors, draws=draws, borrow=borrow)
        self.has_products = True
        return products

    def slopes(self, vectors: Sequence[torch.Tensor]) -> list[float]:
        """∇L·v for each vector, by going forward alone."""
        return [
            value for some in _together(vectors, TOGETHER) for value in self.curvature.slopes(some)
        ]

    def forward_forms(
        self, kind: str, vectors: Sequence[torch.Tensor], draws: Draws | None = None
    ) -> list[float] | None:
        """v·Av for each vector by going forward alone; None where A has no rule for that.

        Args:
            kind: Kind of the matrix A.
            vectors: This rank's shards.
            draws: The labels of a Fisher matrix.

        Raises:
            CurvatureError: NON_FINITE.
        """
        if matrix(kind).form is None:
            return None
        return [
            value
            for some in _together(vectors, TOGETHER)
            for value in self.curvature.quadratic(kind, some, draws=draws)
        ]

    def losses_along(
        self, directions: Sequence[torch.Tensor], points: Sequence[Sequence[float]]
    ) -> list[float]:
        """L(θ + Σ aᵢ dᵢ) for each point, a few points at a time."""
        return [
            value
            for start in range(0, len(points), TOGETHER)
            for value in self.curvature.losses_along(directions, points[start : start + TOGETHER])
        ]

    def exact(self) -> LoadedOperator | None:
        """The same operator with products in float64, rounded to the vectors' dtype as they add up.

        Memory that is kept for other products is given back first. All that ask for it have one,
        for as long as one of them holds it.

        Returns:
            The loss at the same point; None where there is no memory for it.
        """
        known = None if self._exact is None else self._exact()
        if known is not None:
            return known
        self.curvature.release()
        self.has_products = False
        curvature = self._widest()
        if curvature is None:
            return None
        made = LoadedOperator(curvature, 0, self.policy, self._widest)
        self._exact = weakref.ref(made)
        return made

    def news(self) -> Mapping[str, str]:
        """Notes on how products are computed; empty if they are the same as at the last call."""
        notes = self.curvature.notes()
        if notes == self._told:
            return {}
        self._told = notes
        return notes


@final
class CurvatureOperator(LinearOperator):
    """One kind of product of a loaded operator, for algorithms.

    Args:
        loaded: The loss at a point.
        kind: Kind of the matrix.
        precision: Precision of the operands of its matrix products.
        draws: The labels of a Fisher matrix.
        is_checked: Whether the products of the first calls are compared.
    """

    symmetric = True
    most_together = TOGETHER

    def __init__(
        self,
        loaded: LoadedOperator,
        kind: str,
        precision: api.Precision,
        draws: Draws | None = None,
        *,
        is_checked: bool = True,
    ):
        self.domain = self.codomain = loaded.curvature.space
        self.semidefinite = matrix(kind).semidefinite
        self.noise = _NOISE[precision]
        self._loaded = loaded
        self._kind, self._draws = kind, draws
        self._symmetry = SymmetryCheck(self.domain, self.noise) if is_checked else None

    def apply(self, vectors: Sequence[torch.Tensor], *, borrow: bool = False) -> list[torch.Tensor]:
        """See LinearOperator. The products of the first calls are compared.

        Raises:
            CurvatureError: SYMMETRY_BROKEN; NON_FINITE.
        """
        products = self._loaded.product(self._kind, vectors, draws=self._draws, borrow=borrow)
        if products and self._symmetry is not None:
            self._symmetry.see(vectors[0], products[0])
        return products

    def forms(self, vectors: Sequence[torch.Tensor]) -> list[float] | None:
        """See LinearOperator: by going forward alone, of the matrices that have a rule for that.

        A form of centred gradients is a difference, whose rounding does not go with its size.
        """
        if self._kind in CENTRED:
            return None
        return self._loaded.forward_forms(self._kind, vectors, self._draws)

    def factored(self, damping: float, seed: int) -> Preconditioner:
        """See LinearOperator: Kronecker factors, of a Fisher matrix those of its own seed."""
        curvature = self._loaded.curvature
        draws = self._draws if matrix(self._kind).draws else Draws(seed)
        most = FACTOR_VECTORS * curvature.space.dimension
        return KroneckerPreconditioner(
            lambda: curvature.factors(self._kind, most, draws=draws), damping
        )

    def exact(self) -> LinearOperator | None:
        """See LinearOperator: products in float64 throughout.

        Memory that is kept for other products is given back first.
        """
        return self._exact

    @functools.cached_property
    def _exact(self) -> CurvatureOperator | None:
        exact = self._loaded.exact()
        return exact and CurvatureOperator(exact, self._kind, "full", self._draws)

    def notes(self) -> Mapping[str, str]:
        """How products of this kind were computed."""
        own = f"{_SCHEDULE}{matrix(self._kind).name}"
        return {
            key: note
            for key, note in self._loaded.curvature.notes().items()
            if not key.startswith(_SCHEDULE) or key == own or key.startswith(f"{own}_of_")
        }


@final
class JacobianOperator(LinearOperator):
    """The Jacobian of a loaded operator's outputs or activations, for algorithms.

    Args:
        loaded: The model at a point, on a batch.
        precision: Precision of the operands of its matrix products.
    """

    most_together = TOGETHER

    def __init__(self, loaded: LoadedOperator, precision: api.Precision):
        self.domain, self.codomain = loaded.curvature.input_space, loaded.curvature.output_space
        self.noise = _NOISE[precision]
        self._loaded = loaded
        self._check = SymmetryCheck(self.domain, self.noise, self.codomain)

    @property
    def linear(self) -> LinearOperator:
        """The operator itself, as of one that is composed."""
        return self

    def apply(self, vectors: Sequence[torch.Tensor], *, borrow: bool = False) -> list[torch.Tensor]:
        """See LinearOperator. The products of the first calls are compared.

        Raises:
            CurvatureError: SYMMETRY_BROKEN; NON_FINITE.
        """
        products = self._loaded.product("jacobian", vectors)
        if products:
            self._check.see(vectors[0], products[0])
        return products

    def apply_transposed(
        self, vectors: Sequence[torch.Tensor], *, borrow: bool = False
    ) -> list[torch.Tensor]:
        """See LinearOperator; as `apply`."""
        products = self._loaded.product("jacobian_transposed", vectors)
        if products:
            self._check.see(vectors[0], products[0], transposed=True)
        return products

    def exact(self) -> LinearOperator | None:
        """See LinearOperator: products in float64 throughout."""
        return self._exact

    @functools.cached_property
    def _exact(self) -> JacobianOperator | None:
        exact = self._loaded.exact()
        return exact and JacobianOperator(exact, "full")

    def notes(self) -> Mapping[str, str]:
        """How its products were computed: a Jacobian's leave nothing to a schedule."""
        notes = self._loaded.curvature.notes()
        return {key: note for key, note in notes.items() if not key.startswith(_SCHEDULE)}


class _Key(NamedTuple):
    """What tells one curvature of a model from another; the kind of operator does not matter."""

    batch_path: Path
    micro_batch_size: int
    precision: api.Precision
    parameters: tuple[str, ...]
    output: api.Activation | None
    by: api.Activation | None
    deterministic: bool


@final
class OperatorCache:
    """Operators of a model; they go when the model goes.

    Args:
        chain: The model.
        space: Space of its parameters.
        parameters: θ, this rank's shard.
        read: Reads a batch's file, and refuses one that does not fit the model.
        memory: The memory that this rank may use.
        tuning: Server settings of how products are computed.
    """

    def __init__(
        self,
        chain: Chain,
        space: ParameterSpace,
        parameters: torch.Tensor,
        read: Callable[[Path], MicroBatch],
        memory: Memory,
        tuning: api.Tuning,
    ):
        self._chain = chain
        self._space = space
        self._parameters = parameters
        self._read = read
        self._memory = memory
        self._tuning = tuning
        self._loaded: OrderedDict[_Key, LoadedOperator] = OrderedDict()
        self._parts: dict[tuple[str, ...], ParameterSpace] = {}
        self._activations: dict[api.Space, OutputSpace] = {}

    def space_of(self, names: Sequence[str]) -> ParameterSpace:
        """The space of the parameters of these names; of all, for none.

        Raises:
            CurvatureError: PARAMETERS_NOT_FOUND: the model has no parameter of some name.
        """
        key = tuple(names)
        if not key:
            return self._space
        if key not in self._parts:
            missing = sorted(set(key) - set(self._chain.shapes))
            if missing:
                raise CurvatureError(
                    "PARAMETERS_NOT_FOUND", f"the model has no parameter {missing[0]}"
                )
            self._parts[key] = self._space.part(set(key))
        return self._parts[key]

    def get(self, operator: api.Operator) -> LoadedOperator:
        """The operator, built at its first call; every rank must call it.

        Raises:
            CurvatureError: The batch does not fit the model; the errors of `space_of` and of
                `Curvature`.
        """
        key = _Key(
            operator.batch_path,
            operator.micro_batch_size,
            operator.precision,
            operator.space.parameters,
            operator.output,
            operator.by,
            operator.deterministic,
        )
        if key not in self._loaded:
            loaded = self._load(operator)
            while len(self._loaded) >= _KEPT:
                self._loaded.popitem(last=False)
            self._loaded[key] = loaded
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _load(self, operator: api.Operator) -> LoadedOperator:
        batch = self._read(operator.batch_path)
        micro_batch_size = operator.micro_batch_size or default_micro_batch(
            len(batch.targets),
            batch.sequence_length,
            self._space.collective.world_size,
            self._space.device.type,
        )
        decide = policy(deterministic=operator.deterministic)

        def choose() -> ComputeSettings:
            return decide.settings(
                operator.precision,
                self._tuning,
                device=self._space.device.type,
                available_bytes=self._memory.least_available(),
            )

        chosen = choose()
        if operator.output is not None or operator.by is not None:
            return self._section(operator, batch, micro_batch_size, chosen)
        selected = self.space_of(operator.space.parameters)

        def curvature_with(how: ComputeSettings, labels: DrawnLabels | None) -> Curvature:
            return Curvature(
                self._chain,
                self._space,
                self._parameters,
                batch,
                micro_batch_size,
                how,
                selected,
                labels,
            )

        def widest() -> Curvature | None:
            if self._space.dtype == torch.float64:
                return curvature
            needed = exact_bytes(self._space.layout.shard_numel, selected.layout.shard_numel)
            affordable = decide.affords_exact(needed, self._memory.least_available())
            how = decide.as_wanted(EXACT)
            return curvature_with(how, curvature.labels) if affordable else None

        # In 16 bits a sum would be rounded otherwise for each cut of the batch, and a label in a
        # hundred be another.
        labels = DrawnLabels(
            lambda draws: curvature_with(decide.as_wanted(DRAWING), None).draw(draws)
        )
        curvature = curvature_with(chosen, None if chosen.precision == "full" else labels)
        return LoadedOperator(
            curvature,
            chosen.budget_bytes or 0,
            decide,
            widest,
            _budget_now=lambda: choose().budget_bytes or 0,
        )

    def _section(
        self, operator: api.Operator, batch: MicroBatch, micro_batch_size: int, how: ComputeSettings
    ) -> LoadedOperator:
        """The Jacobian of activations, at the point of the operator without them."""
        whole = self.get(operator.plain)
        output, by = _place(operator.output), _place(operator.by)

        def section_at(point: Curvature, how: ComputeSettings) -> Curvature:
            chain, space, selected, recorded = section_of(point, output, by)
            return Curvature(
                chain,
                space,
                point.parameters,
                batch,
                micro_batch_size,
                how,
                selected,
                recorded=recorded,
            )

        curvature = section_at(whole.curvature, how)

        def widest() -> Curvature | None:
            if self._space.dtype == torch.float64:
                return curvature
            exact = whole.exact()
            return exact and section_at(exact.curvature, whole.policy.as_wanted(EXACT))

        return LoadedOperator(curvature, 0, whole.policy, widest)

    def space_of_activation(self, space: api.Space) -> OutputSpace:
        """The space of an activation on a batch; found at the first call, on all ranks together.

        Raises:
            CurvatureError: MODULE_NOT_FOUND, MODULE_UNSUPPORTED.
        """
        if space not in self._activations:
            place = _place(space.activation)
            assert place is not None
            assert space.outputs_on is not None
            plain = api.Operator(space=space.whole, batch_path=space.outputs_on)
            self._activations[space] = activation_space(self.get(plain).curvature, place)
        return self._activations[space]


def _place(activation: api.Activation | None) -> Place | None:
    return None if activation is None else Place(activation.module, activation.side)
