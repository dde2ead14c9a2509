"""(A + λI) x = b for one right-hand side or several, with the true residual of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from hvp_operations.checking import FIRST_SEED, Names, Numbers, Seed
from hvp_operations.operation import (
    Cost,
    Detail,
    Extension,
    Facts,
    Input,
    Operation,
    Result,
    Rule,
    Table,
)
from hvp_operations.rules import SEED_RULE

Method = Literal["auto", "cg", "minres"]
Factors = Literal["kronecker"]
Outcome = Literal[
    "CONVERGED",
    "MAX_PRODUCTS",
    "NEGATIVE_CURVATURE",
    "LEAST_SQUARES",
    "NOISE_LIMIT",
    "BREAKDOWN",
    "UNVERIFIED",
]

MAX_RIGHT_HAND_SIDES = 64
#: The most vectors of a low-rank preconditioner.
MAX_PRECONDITIONER_VECTORS = 1024
#: Vectors that all Kronecker factors together take at most: what would take more is diagonal.
FACTOR_VECTORS = 4
#: What to do where an operator has no factors.
NO_FACTORS = (
    "they are made of a matrix of the model's own, such as the Hessian or the ggn: give the "
    "damping to solve, not to the operator, or take a vector or a low_rank as a preconditioner"
)
#: Products of each right-hand side that are set aside: one for the residual of x, one for what else
#: is claimed, such as a negative curvature.
RESERVED_PRODUCTS = 2
#: The fewest products that do anything: the residual of a start, one step, and those above.
LEAST_PRODUCTS = 2 + RESERVED_PRODUCTS
#: Vectors of a right-hand side on its way, beside x: those of the recurrence (4 or 5), its product,
#: the product with the shift, and a residual.
WORKING_VECTORS: Mapping[Method, int] = {"cg": 7, "minres": 8, "auto": 8}


@dataclass(frozen=True)
class SolveSpec:
    """Solve (A + λI) x = b by conjugate gradients or MINRES, for one b or several at once.

    Every right-hand side ends with the residual of its x, taken from a fresh product in float64.
    Where the products of the recurrence are too coarse for the tolerance, it is begun again from
    that residual for as long as this helps. Right-hand sides go in lockstep: their products share
    what does not depend on them.

    A preconditioner is a matrix M near A that is cheap to invert. Each step applies (M + λI)⁻¹, and
    the nearer M is, the fewer steps there are. Where M is U diag(values) Uᵀ with k orthonormal
    vectors, what is orthogonal to them is multiplied by 1 / (λ + the least of the values)
    (Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44 (2023)). Instead of given vectors,
    M can be made of Kronecker factors of the model's own, at the price of a gradient (Martens and
    Grosse, ICML 2015).

    Attributes:
        b: The right-hand side, or several.
        damping: λ, which is added to the diagonal; below 0 for MINRES alone.
        method: `cg`, which needs A + λI to be positive definite and tells where it is not; `minres`
            for any symmetric matrix; `auto`: `cg` for matrices that have no negative eigenvalue,
            such as a GGN, unless λ < 0, else `minres`.
        tol: Stop when ‖b − (A + λI) x‖ ≤ tol ‖b‖, 0 < tol < 1.
        max_products: Upper bound on products for each right-hand side, those of its residual
            included; None lets the server choose.
        x0: Start for each right-hand side; zero where it is left out.
        preconditioner: Result of `low_rank`; or one vector d with dᵢ ≥ 0 and dᵢ + λ > 0, the
            diagonal of a matrix near A; or the vectors of a low-rank matrix, with their values. λ
            is added to it, as to A.
        preconditioner_values: Eigenvalues of the low-rank matrix, 0 or more, and above 0 with λ; a
            result of `low_rank` brings its own.
        factors: `kronecker`, in the place of `preconditioner`: M has a Kronecker product for each
            matrix of parameters, of its layer's inputs and of its outputs' gradients, and a
            multiple of the identity for each other parameter. For a matrix of the model's own, such
            as the Hessian or the ggn, and λ > 0.
        seed: Seed of the labels that are drawn from the model for the factors. A Fisher matrix has
            its own seed, and an empirical one the batch's labels.
    """

    b: Names
    _: KW_ONLY
    damping: float = 0.0
    method: Method = "auto"
    tol: float = 1e-6
    max_products: int | None = None
    x0: Names = ()
    preconditioner: Names = ()
    preconditioner_values: Numbers = ()
    factors: Factors | None = None
    seed: Seed = FIRST_SEED


@dataclass(frozen=True, kw_only=True)
class SolveProgress(Detail):
    """Where the right-hand sides stand.

    Attributes:
        num_ended: Number of right-hand sides that are done.
        residuals: ‖b − (A + λI) x‖ / ‖b‖ of each right-hand side, as its recurrence has it; of
            those that are done the true one.
    """

    num_ended: int = 0
    residuals: tuple[float, ...] = ()

    def table(self) -> Table:
        """The residuals of those that are furthest from their end."""
        worst = sorted(enumerate(self.residuals), key=lambda each: -each[1])[:8]
        return Table(
            headings=("right-hand side", "relative residual"),
            rows=tuple((str(index), f"{residual:.2e}") for index, residual in worst),
        )


@dataclass(frozen=True, kw_only=True)
class System:
    """How one right-hand side ended.

    Attributes:
        outcome: How it ended.
        num_products: Products that it took, those of its residuals included.
        relative_residual: ‖b − (A + λI) x‖ / ‖b‖ from a fresh product; 0 where b is zero.
        recursion_residual: The same figure as the recurrence had it at its end.
        is_exact: Whether `relative_residual`, and what else is claimed, is of products in float64;
            else there was no memory for these, and it is of the run's own kind of product.
        curvature: d·Ad / d·d of the direction d that the outcome NEGATIVE_CURVATURE was found in.
        has_direction: Whether that direction is among the result's `directions`.
        normal_residual: ‖(A + λI) r‖ / (‖A + λI‖ ‖r‖) of the residual r that the outcome
            LEAST_SQUARES ended with, with the norm of the matrix as the run knows it.
    """

    outcome: Outcome
    num_products: int
    relative_residual: float
    recursion_residual: float
    is_exact: bool
    curvature: float | None = None
    has_direction: bool = False
    normal_residual: float | None = None


@dataclass(frozen=True, kw_only=True)
class SolveResult(Result):
    """How each right-hand side ended; the solutions are vectors on the server.

    Attributes:
        systems: How each right-hand side ended, in their order.
    """

    systems: tuple[System, ...]

    vectors: ClassVar[tuple[str, ...]] = ("x", "directions")

    def vector_counts(self) -> Mapping[str, int]:
        """An x for each right-hand side, and the directions that were kept."""
        return {
            "x": len(self.systems),
            "directions": sum(each.has_direction for each in self.systems),
        }


def most_products(spec: SolveSpec, dimension: int) -> int:
    """The most products for one right-hand side."""
    return spec.max_products or max(LEAST_PRODUCTS, min(10 * dimension, 1000))


def kept_vectors(spec: SolveSpec) -> int:
    """The most vectors that the results are: x of each right-hand side, and a direction of CG's."""
    return len(spec.b) * (1 if spec.method == "minres" else 2)


def working_vectors(spec: SolveSpec, method: Method) -> int:
    """Vectors of a right-hand side on its way, beside x; what a preconditioner gives is one."""
    return WORKING_VECTORS[method] + bool(spec.preconditioner or spec.factors)


def common_vectors(spec: SolveSpec) -> int:
    """Vectors that all right-hand sides share: the inverse of a diagonal, or factors."""
    if spec.factors:
        return FACTOR_VECTORS
    return int(bool(spec.preconditioner) and not spec.preconditioner_values)


def _cost(spec: SolveSpec, facts: Facts) -> Cost:
    results, working = kept_vectors(spec), working_vectors(spec, spec.method)
    beside = 2 * results + common_vectors(spec)  # in the run, and copied out of it
    return Cost(
        max_products=len(spec.b) * most_products(spec, facts.num_parameters),
        least_vectors=beside + working,
        wished_vectors=beside + len(spec.b) * working,
        results=results,
    )


_RULES: tuple[Rule[SolveSpec], ...] = (
    Rule(
        field="damping",
        reason="DAMPING_INVALID",
        holds=lambda spec, facts: spec.damping >= 0 or spec.method != "cg",
        allowed=lambda spec, facts: (
            "0 or more are possible for cg, which needs a positive definite matrix; minres takes "
            "any damping"
        ),
    ),
    Rule(
        field="tol",
        reason="TOL_INVALID",
        holds=lambda spec, facts: 0 < spec.tol < 1,
        allowed=lambda spec, facts: (
            "0 < tol < 1 is possible. It is relative to the norm of b: with 1, x = 0 would do"
        ),
    ),
    Rule(
        field="max_products",
        reason="MAX_PRODUCTS_INVALID",
        holds=lambda spec, facts: spec.max_products is None or spec.max_products >= LEAST_PRODUCTS,
        allowed=lambda spec, facts: (
            f"{LEAST_PRODUCTS} or more are possible: the residual of a start, a step, and "
            f"{RESERVED_PRODUCTS} for what is claimed; left out, the server chooses"
        ),
    ),
    Rule(
        field="x0",
        reason="X0_INVALID",
        holds=lambda spec, facts: len(spec.x0) in (0, len(spec.b)),
        allowed=lambda spec, facts: (
            f"{len(spec.b)} are possible, one for each right-hand side, or none"
        ),
    ),
    Rule(
        field="preconditioner",
        reason="PRECONDITIONER_INVALID",
        holds=lambda spec, facts: bool(spec.preconditioner_values) or len(spec.preconditioner) < 2,
        allowed=lambda spec, facts: (
            "one is possible, a diagonal, or several with a value for each in "
            "preconditioner_values, as a result of low_rank has them"
        ),
    ),
    Rule(
        field="preconditioner_values",
        reason="PRECONDITIONER_VALUES_INVALID",
        holds=lambda spec, facts: (
            len(spec.preconditioner_values) in (0, len(spec.preconditioner))
            and len(spec.preconditioner_values) <= facts.num_parameters
        ),
        allowed=lambda spec, facts: (
            f"{len(spec.preconditioner)} are possible, one for each vector of the preconditioner, "
            "or none for a diagonal"
        ),
    ),
    Rule(
        field="preconditioner_values",
        reason="PRECONDITIONER_VALUES_INVALID",
        holds=lambda spec, facts: all(
            each >= 0 and each + spec.damping > 0 for each in spec.preconditioner_values
        ),
        allowed=lambda spec, facts: (
            f"with a damping of {spec.damping:g} the least of them is "
            f"{min(spec.preconditioner_values):.6g}: a preconditioner is positive definite, so "
            "each has to be 0 or more, and above 0 with the damping; leave out vectors with others"
        ),
    ),
    Rule(
        field="factors",
        reason="FACTORS_INVALID",
        holds=lambda spec, facts: not (spec.factors and spec.preconditioner),
        allowed=lambda spec, facts: (
            "there is one preconditioner, and preconditioner names another: leave out one of them"
        ),
    ),
    Rule(
        field="factors",
        reason="OPERATOR_HAS_NO_FACTORS",
        holds=lambda spec, facts: not (spec.factors and facts.is_composed),
        allowed=lambda spec, facts: f"{facts.kind} has none; {NO_FACTORS}",
    ),
    Rule(
        field="damping",
        reason="DAMPING_INVALID",
        holds=lambda spec, facts: not spec.factors or spec.damping > 0,
        allowed=lambda spec, facts: (
            "with factors more than 0 is possible: without, their matrix is singular"
        ),
    ),
    SEED_RULE,
)


def _headline(spec: SolveSpec) -> str:
    damped = f" damping={spec.damping:g}" if spec.damping else ""
    helped = " preconditioned" if spec.preconditioner else ""
    helped = f" {spec.factors} factors" if spec.factors else helped
    several = f" of {len(spec.b)} right-hand sides" if len(spec.b) > 1 else ""
    return f"solve {spec.method}{damped} tol={spec.tol:g}{helped}{several}"


OPERATION = Operation(
    name="solve",
    summary="Solve (A + damping I) x = b by conjugate gradients or MINRES.",
    spec=SolveSpec,
    progress=SolveProgress,
    result=SolveResult,
    rules=_RULES,
    cost=_cost,
    headline=_headline,
    algorithm="hvp_core.krylov.solve:Solve",
    record="hvp_operations.solve.record:SolveResult",
    inputs=(
        Input(field="b", space="codomain", most=MAX_RIGHT_HAND_SIDES),
        Input(field="x0", space="domain", least=0, most=MAX_RIGHT_HAND_SIDES, taken_from="x"),
        Input(
            field="preconditioner",
            space="domain",
            least=0,
            most=MAX_PRECONDITIONER_VECTORS,
            numbers="preconditioner_values",
        ),
    ),
    extension=Extension(fields=("tol", "max_products")),
)
