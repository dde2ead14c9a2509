"""The mass of a matrix outside of its diagonal blocks, estimated by random vectors."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from hvp_operations.checking import FIRST_SEED, Seed
from hvp_operations.operation import (
    Cost,
    Detail,
    Extension,
    Facts,
    Operation,
    Result,
    Rule,
    SpecError,
    Table,
)
from hvp_operations.partition import MOST_BLOCKS, Partition
from hvp_operations.rules import SEED_RULE, of_estimates

Outcome = Literal["CONVERGED", "MAX_PRODUCTS", "NOISE_LIMIT", "UNVERIFIED", "ZERO_OPERATOR"]

#: Parts of a random vector whose products are taken in one call, at most.
TOGETHER = 8
#: Probes with coarse and exact products, where products are coarse.
CORRECTIONS = 4
#: Random vectors; of fewer than eight an interval often has no upper end.
LEAST_PROBES, _MOST_PROBES = 8, 4096
#: Products for each block: of eight probes, and of two more whose coarse products are compared with
#: exact ones.
_LEAST_PRODUCTS = 12
#: The random vector, its part on a block and the product.
_LEAST_VECTORS = 3


@dataclass(frozen=True)
class BlockMassSpec:
    """Estimate how much of the matrix lies outside of its diagonal blocks, with an interval.

    The parameters are divided into blocks, and the matrix A into blocks A_ab of rows a and columns
    b. Their masses ‖A_ab‖², squares of Frobenius norms, are estimated by products with the parts
    that random vectors have on each block: of B blocks each vector takes B products. The run stops
    when the standard error of the off-block fraction, the mass off the diagonal blocks over the
    whole mass, is at most rtol times it, or at most `atol`.

    Attributes:
        by: How to divide the parameters into blocks: `layer` (names that agree up to the first
            number, and of the others those of one module), `tensor`, or the patterns of each block;
            2 to 128 blocks that are disjoint and together all of the parameters.
        num_probes: Upper bound on the random vectors, 8 to 4096.
        rtol: Tolerance on the fraction's standard error, relative to the fraction, 0 < rtol < 1.
        atol: Tolerance on that standard error itself; the larger of the two counts.
        max_products: Upper bound on products; None lets the server choose.
        seed: Seed of the random vectors.
    """

    by: Partition = Partition(per="layer")  # noqa: RUF009 - frozen
    _: KW_ONLY
    num_probes: int = 64
    rtol: float = 0.05
    atol: float = 1e-4
    max_products: int | None = None
    seed: Seed = FIRST_SEED


@dataclass(frozen=True, kw_only=True)
class BlockMassProgress(Detail):
    """How far the run of an estimate has come.

    Attributes:
        off_block_fraction: The estimate so far.
        standard_error: Its standard error; infinite before there are two probes.
        num_probes: Random vectors so far that had all their products.
    """

    off_block_fraction: float = 0.0
    standard_error: float = float("inf")
    num_probes: int = 0

    def table(self) -> Table:
        """The estimate so far."""
        told = f"{self.off_block_fraction:.4g}", f"{self.standard_error:.2g}"
        return Table(
            headings=("probes", "off-block fraction so far", "standard error"),
            rows=((str(self.num_probes), *told),),
        )


@dataclass(frozen=True, kw_only=True)
class MassLevel:
    """The part of a result that probes have shown of one mean.

    Attributes:
        means: Mean masses of the matrix' blocks, (B · B,) row by row.
        squares: Sums of squared distances from them.
        off_block: Mass off the diagonal blocks, of each probe.
        total: The whole mass, of each probe.
    """

    means: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    off_block: tuple[float, ...] = ()
    total: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockMassResult(Result):
    """The masses of the blocks, and how far the fraction off the diagonal can be trusted.

    Attributes:
        blocks: Names of the blocks of parameters.
        block_sizes: Their numbers of parameters.
        masses: Estimates of ‖A_ab‖², (B · B,) row by row.
        standard_errors: Their standard errors.
        off_block_fraction: The mass off the diagonal blocks over the whole mass.
        standard_error: Its standard deviation over the choice of random vectors.
        low: Lower end of its 95 % interval.
        high: Upper end of the interval.
        rounding: What the rounding of products can have moved the fraction by.
        outcome: How the run ended.
        num_probes: Random vectors that the masses are made of.
        num_exact_products: Products with the exact operator, where the others are coarser.
        levels: What an extension goes on from: of the products, and of the differences between
            exact and coarse ones.
        size: Sum over the probes of the squares by which the rounding of products goes.
    """

    blocks: tuple[str, ...]
    block_sizes: tuple[int, ...]
    masses: tuple[float, ...]
    standard_errors: tuple[float, ...]
    off_block_fraction: float
    standard_error: float
    low: float
    high: float
    rounding: float
    outcome: Outcome
    num_probes: int
    num_exact_products: int = 0
    levels: tuple[MassLevel, ...] = ()
    size: float = 0.0


def _refusal(spec: BlockMassSpec, facts: Facts) -> SpecError | None:
    """Why the parameters cannot be divided so."""
    try:
        spec.by.divide(facts.parameter_names)
    except SpecError as error:
        return error
    return None


def _num_blocks(spec: BlockMassSpec, facts: Facts) -> int:
    """B; 2 where the parameters are not known."""
    return len(spec.by.divide(facts.parameter_names)) if facts.parameter_names else 2


def _is_known_as(reason: str) -> Rule[BlockMassSpec]:
    """The rule that a division is not refused for a reason."""

    def holds(spec: BlockMassSpec, facts: Facts) -> bool:
        refusal = _refusal(spec, facts) if facts.parameter_names else None
        return refusal is None or refusal.reason != reason

    def allowed(spec: BlockMassSpec, facts: Facts) -> str:
        message = str(_refusal(spec, facts))
        return message[0].lower() + message[1:].removesuffix(".")

    return Rule(field="by", reason=reason, holds=holds, allowed=allowed)


_RULES: tuple[Rule[BlockMassSpec], ...] = (
    _is_known_as("PARAMETERS_NOT_FOUND"),
    _is_known_as("PARAMETERS_INVALID"),
    Rule(
        field="by",
        reason="BY_INVALID",
        holds=lambda spec, facts: 2 <= _num_blocks(spec, facts) <= MOST_BLOCKS,
        allowed=lambda spec, facts: (
            f"that divides the operator's parameters into {_num_blocks(spec, facts)}, and 2 to "
            f"{MOST_BLOCKS} are possible: nothing is outside of one block, and each block takes a "
            "product for each random vector. Give patterns of blocks, or restrict the operator"
        ),
    ),
    Rule(
        field="num_probes",
        reason="NUM_PROBES_INVALID",
        holds=lambda spec, facts: LEAST_PROBES <= spec.num_probes <= _MOST_PROBES,
        allowed=lambda spec, facts: f"{LEAST_PROBES} to {_MOST_PROBES} are possible",
    ),
    *of_estimates("the off-block fraction"),
    Rule(
        field="max_products",
        reason="MAX_PRODUCTS_INVALID",
        holds=lambda spec, facts: (
            spec.max_products is None
            or spec.max_products >= _LEAST_PRODUCTS * _num_blocks(spec, facts)
        ),
        allowed=lambda spec, facts: (
            f"at least {_LEAST_PRODUCTS * _num_blocks(spec, facts)} are needed, {_LEAST_PRODUCTS} "
            "for each block; left out, the server chooses"
        ),
    ),
    SEED_RULE,
)


def _nothing_to_go_on_from(spec: BlockMassSpec, result: BlockMassResult) -> str:
    if not result.levels:
        return "all its products were zero, and more would be"
    if spec.num_probes < result.num_probes:
        return (
            f"num_probes is {spec.num_probes}, and the job has {result.num_probes} already; ask "
            "for more"
        )
    return ""


def _cost(spec: BlockMassSpec, facts: Facts) -> Cost:
    most = _num_blocks(spec, facts) * (spec.num_probes + 2 * CORRECTIONS)
    return Cost(
        max_products=most if spec.max_products is None else min(most, spec.max_products),
        least_vectors=_LEAST_VECTORS,
        wished_vectors=2 * TOGETHER + 1,
    )


OPERATION = Operation(
    name="block_mass",
    summary="Estimate how much of the matrix lies outside of its diagonal blocks.",
    spec=BlockMassSpec,
    progress=BlockMassProgress,
    result=BlockMassResult,
    rules=_RULES,
    cost=_cost,
    headline=lambda spec: f"mass outside of blocks by {spec.by} to {spec.rtol:g}",
    algorithm="hvp_core.stochastic.block_mass:BlockMass",
    record="hvp_operations.block_mass.record:BlockMassResult",
    has_picture=True,
    extension=Extension(
        fields=("num_probes", "rtol", "atol", "max_products"),
        refusal=_nothing_to_go_on_from,
        takes_result=True,
    ),
)
