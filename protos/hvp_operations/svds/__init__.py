"""The k largest singular values of a Jacobian, verified, and whether any of them was missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

from hvp_operations.certificates import Completeness, Outcome
from hvp_operations.checking import FIRST_SEED, Seed
from hvp_operations.operation import Cost, Detail, Extension, Facts, Operation, Result, Rule, Table
from hvp_operations.rules import SEED_RULE, of_basis, of_more

# About 440 bytes of a result are one triplet's, and a result travels as one message of 4 MiB.
MAX_TRIPLETS = 5_000
#: Pairs of vectors that a run holds beside its bases and its results: the next right vector, a
#: product, a random restart.
WORKING_PAIRS = 3


@dataclass(frozen=True)
class SvdsSpec:
    """Search for the k largest singular values by Golub-Kahan-Lanczos bidiagonalisation.

    Both bases are kept orthogonal, every triplet is verified by a product each way in float64, and
    a run from a fresh random vector looks for what the first one may have missed.

    Attributes:
        k: Number of singular values, 1 ≤ k ≤ min(m, n).
        tol: Stop when every wanted triplet's estimated residual is at most tol times the largest
            singular value, 0 ≤ tol < 1; 0 means the dtype's rounding.
        max_products: Upper bound on products with J and with Jᵀ together, those that show
            completeness and those of the final residuals included; None lets the server choose.
        seed: Seed of the starting vector.
        num_lanczos_vectors: Vectors of each of the two bases, more than k where k < min(m, n); None
            lets the server choose by memory.
    """

    k: int = 6
    _: KW_ONLY
    tol: float = 0.0
    max_products: int | None = None
    seed: Seed = FIRST_SEED
    num_lanczos_vectors: int | None = None


@dataclass(frozen=True, kw_only=True)
class SvdsProgress(Detail):
    """How far the search for eigenpairs or singular values has come.

    Attributes:
        num_restarts: Number of times that the bases were compressed.
        singular_values: Estimates of the wanted singular values, descending; of many, the 64
            furthest from converged.
        residual_estimates: Estimated residual of each, at least the rounding of the products.
    """

    num_restarts: int = 0
    singular_values: tuple[float, ...] = ()
    residual_estimates: tuple[float, ...] = ()

    def table(self) -> Table:
        """Values with the estimates of their residuals, the furthest from converged first."""
        pairs = sorted(
            zip(self.singular_values, self.residual_estimates, strict=False),
            key=lambda pair: -pair[1],
        )
        return Table(
            headings=("singular value", "residual estimate"),
            rows=tuple((f"{value:.8g}", f"{estimate:.1e}") for value, estimate in pairs),
        )


@dataclass(frozen=True, kw_only=True)
class SvdsResult(Result):
    """The singular values that a search found, and their errors; the vectors are on the server.

    Attributes:
        singular_values: u·Jv of the verifying products, descending.
        residuals: ‖J v − σ u‖ of each triplet, from a fresh product in float64.
        transposed_residuals: ‖Jᵀ u − σ v‖, likewise.
        outcome: How the search ended.
        adjoint_defect: |u·Jv − v·Jᵀu| relative to the products' norms, over the run's own vectors;
            of an extension, over the triplets alone, relative to ‖J‖.
        error_bounds: Bound b of each triplet: [σ − b, σ + b] holds a singular value of the exact
            Jacobian; empty where nothing is claimed.
        completeness: Whether any of the wanted may have been missed.
    """

    singular_values: tuple[float, ...]
    residuals: tuple[float, ...]
    transposed_residuals: tuple[float, ...]
    outcome: Outcome
    adjoint_defect: float
    error_bounds: tuple[float, ...] = ()
    completeness: Completeness = field(default_factory=Completeness)

    vectors: ClassVar[tuple[str, ...]] = ("u", "v")
    of_codomain: ClassVar[tuple[str, ...]] = ("u",)

    def vector_counts(self) -> Mapping[str, int]:
        """A left and a right vector for each singular value."""
        return {"u": len(self.singular_values), "v": len(self.singular_values)}


def default_max_products(spec: SvdsSpec, most_values: int) -> int:
    """The budget of products: the spec's own, or a default where it has none."""
    return spec.max_products or 2 * min(10 * most_values, max(300 + spec.k, 3 * spec.k))


def basis_sizes(spec: SvdsSpec, most_values: int) -> tuple[int, int]:
    """The smallest bases that will do, and those to have where memory allows.

    Args:
        spec: The question.
        most_values: min(m, n).
    """
    asked, k = spec.num_lanczos_vectors, spec.k
    if asked:
        return asked, asked
    steps = default_max_products(spec, most_values) // 2 - k
    wish = min(max(2 * k + 16, 40), most_values, max(steps, k + 1))
    return min(k + 8, wish), wish


def _cost(spec: SvdsSpec, facts: Facts) -> Cost:
    least, wish = basis_sizes(spec, facts.most_values)
    beside = WORKING_PAIRS + spec.k
    return Cost(
        max_products=default_max_products(spec, facts.most_values),
        least_vectors=least + beside,
        wished_vectors=wish + beside,
        results=2 * spec.k,
    )


def _least_basis(spec: SvdsSpec, facts: Facts) -> int:
    """Vectors that the smallest basis has: one more than the values, or all that there are."""
    return min(spec.k + 1, facts.most_values)


_RULES: tuple[Rule[SvdsSpec], ...] = (
    Rule(
        field="k",
        reason="K_INVALID",
        holds=lambda spec, facts: 1 <= spec.k <= min(facts.most_values, MAX_TRIPLETS),
        allowed=lambda spec, facts: (
            f"a Jacobian of {facts.num_outputs} rows and {facts.num_parameters} columns has "
            f"{facts.most_values} singular values, of which 1 to "
            f"{min(facts.most_values, MAX_TRIPLETS)} can be asked in one job"
        ),
    ),
    Rule(
        field="tol",
        reason="TOL_INVALID",
        holds=lambda spec, facts: 0 <= spec.tol < 1,
        allowed=lambda spec, facts: (
            "0 <= tol < 1 is possible. It is relative to the largest singular value: with 1, any "
            "vectors would do"
        ),
    ),
    Rule(
        field="max_products",
        reason="MAX_PRODUCTS_INVALID",
        holds=lambda spec, facts: spec.max_products is None or spec.max_products >= 4 * spec.k,
        allowed=lambda spec, facts: (
            f"bases of k = {spec.k} take {2 * spec.k} and the residuals as many; left out, the "
            "server chooses"
        ),
    ),
    of_basis(_least_basis, lambda facts: facts.most_values),
    SEED_RULE,
)

OPERATION = Operation(
    name="svds",
    summary="Compute the k largest singular values of a Jacobian, with their vectors.",
    spec=SvdsSpec,
    progress=SvdsProgress,
    result=SvdsResult,
    rules=_RULES,
    cost=_cost,
    headline=lambda spec: f"svds k={spec.k}",
    algorithm="hvp_core.krylov.svds:Svds",
    record="hvp_operations.svds.record:SvdsResult",
    asked_of="jacobian",
    extension=Extension(
        fields=("k", "tol", "max_products", "seed", "num_lanczos_vectors"),
        refusal=lambda spec, result: of_more(spec.k, len(result.singular_values)),
        takes_result=True,
        vectors=("u", "v"),
        new_seed=True,
    ),
)
