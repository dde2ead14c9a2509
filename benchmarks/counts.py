"""How many floating-point operations a product needs, whoever computes it.

One GEMM pass over n weights and T tokens is 2nT operations. A gradient takes 3 passes (the output,
and the cotangents of input and weight), a Hessian product 8: the 3 on values, and 5 on tangents,
where a matrix product has two terms and the weight's own cotangent is not needed. A second product
at the same point needs 6 of the 8 when the primal half is kept. A Gauss-Newton product takes 5:
value, tangent (2 terms), and the two cotangents.

Attention adds products of S × S × d tiles, 2·S²·d operations each, half of that under a causal
mask: 7 for a gradient (2 forward, 5 backward with S computed again), 21 for a Hessian product, 14
of them on tangents, and 11 for a Gauss-Newton product, 8 of them on tangents.

Recomputation is not counted: a way that computes a block twice has a lower rate by this count, not
a higher one.
"""

from __future__ import annotations

from typing import Literal

Product = Literal["gradient", "hvp", "ggn"]

# product -> (GEMM passes, tile products): what all probes share, and what each probe adds
_COUNTS: dict[Product, tuple[tuple[int, int], tuple[int, int]]] = {
    "gradient": ((0, 0), (3, 7)),
    "hvp": ((2, 7), (6, 14)),
    "ggn": ((1, 3), (4, 8)),
}


def flops(
    product: Product,
    *,
    weights: int,
    rows: int,
    tokens: int,
    layers: int,
    width: int,
    probes: int = 1,
    cached: bool = False,
) -> float:
    """Operations of one product, by the counts above.

    Args:
        product: What is computed.
        weights: Elements of the matrices that multiply activations: a table that is only looked up
            does not count, one that is tied to the head does.
        rows: Sequences.
        tokens: Of each sequence.
        layers: With attention.
        width: Query heads times their dimension.
        probes: That share the primal half; the answer is for one of them.
        cached: The primal half is there already.
    """
    shared, own = _COUNTS[product]
    if cached:
        shared = (0, 0)
    passes = shared[0] / probes + own[0]
    tiles = shared[1] / probes + own[1]
    gemms = passes * 2 * weights * rows * tokens
    attention = tiles * 2 * tokens**2 * width * rows * layers / 2
    return gemms + attention
