"""The spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from hvp_operations.checking import FIRST_SEED, Seed
from hvp_operations.operation import Cost, Detail, Extension, Facts, Operation, Result, Rule, Table
from hvp_operations.rules import SEED_RULE

# Nodes and weights travel as one message of 4 MiB, 16 bytes each pair.
MAX_NODES = 200_000
#: T's eigenproblem takes the cube of the steps: of so many, a second or two for each probe.
MAX_STEPS = 2000
#: Vectors that each probe holds beside its basis: the newest, the one before, and the product.
WORKING_VECTORS = 3


@dataclass(frozen=True)
class DensitySpec:
    """Estimate the spectral density by stochastic Lanczos quadrature.

    Each of K random probes gives an independent estimate of the whole spectrum, and the error of
    their mean falls as 1/√K. With m steps of Lanczos the moments of what a probe sees are exact up
    to degree 2m − 1, and features narrower than the spectrum's width over m are smeared.

    Attributes:
        num_probes: K, the number of random probes.
        num_steps: m, the number of Lanczos steps of each probe.
        seed: Seed of the probes.
    """

    _: KW_ONLY
    num_probes: int = 8
    num_steps: int = 80
    seed: Seed = FIRST_SEED


@dataclass(frozen=True, kw_only=True)
class DensityProgress(Detail):
    """Where the quadrature stands.

    Attributes:
        num_probes_done: Number of probes that have all their steps.
        num_steps: Lanczos steps done of the probes at hand.
        smallest: Smallest Ritz value so far.
        largest: Largest Ritz value so far.
    """

    num_probes_done: int = 0
    num_steps: int = 0
    smallest: float = 0.0
    largest: float = 0.0

    def table(self) -> Table:
        """How far the probes are, and the ends of the spectrum that they have seen."""
        return Table(
            headings=("probes done", "steps of the others", "smallest Ritz value", "largest"),
            rows=(
                (
                    str(self.num_probes_done),
                    str(self.num_steps),
                    f"{self.smallest:.6g}",
                    f"{self.largest:.6g}",
                ),
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Quadrature:
    """Gauss quadrature of the spectral measure that one probe sees.

    Attributes:
        nodes: Ritz values, ascending; fewer than asked for where the probe's Krylov space ended.
        weights: Squared first components of T's eigenvectors; they sum to one.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DensityResult(Result):
    """The quadratures, from which every density, moment and count is made.

    Attributes:
        quadratures: One quadrature for each probe.
        orthogonality_defect: Largest entry of |QᵀQ − I| over the bases that were kept orthogonal; 1
            where memory was short and they were not, so that outliers may appear more than once,
            with their weight divided among the copies.
    """

    quadratures: tuple[Quadrature, ...]
    orthogonality_defect: float


def _cost(spec: DensitySpec, facts: Facts) -> Cost:
    steps = min(spec.num_steps, facts.num_parameters)
    return Cost(
        max_products=spec.num_probes * steps,
        least_vectors=WORKING_VECTORS,
        wished_vectors=spec.num_probes * (steps + WORKING_VECTORS),
    )


def _most_steps(spec: DensitySpec) -> int:
    return min(MAX_STEPS, MAX_NODES // spec.num_probes)


_RULES: tuple[Rule[DensitySpec], ...] = (
    Rule(
        field="num_probes",
        reason="NUM_PROBES_INVALID",
        holds=lambda spec, facts: 1 <= spec.num_probes <= MAX_NODES,
        allowed=lambda spec, facts: (
            f"1 to {MAX_NODES} are possible; 2 or more for a standard error"
        ),
    ),
    Rule(
        field="num_steps",
        reason="NUM_STEPS_INVALID",
        holds=lambda spec, facts: 1 <= spec.num_steps <= _most_steps(spec),
        allowed=lambda spec, facts: (
            f"with {spec.num_probes} probes 1 to {_most_steps(spec)} are possible"
        ),
    ),
    SEED_RULE,
)

OPERATION = Operation(
    name="density",
    summary="Estimate the spectral density by stochastic Lanczos quadrature.",
    spec=DensitySpec,
    progress=DensityProgress,
    result=DensityResult,
    rules=_RULES,
    cost=_cost,
    headline=lambda spec: f"density {spec.num_probes} probes x {spec.num_steps} steps",
    algorithm="hvp_core.stochastic.density:Density",
    record="hvp_operations.density.record:DensityResult",
    has_picture=True,
    extension=Extension(
        fields=("num_probes",),
        refusal=lambda spec, result: (
            f"num_probes is {spec.num_probes}, and the job has {len(result.quadratures)} already; "
            "ask for more"
            if spec.num_probes <= len(result.quadratures)
            else ""
        ),
        takes_result=True,
    ),
)
