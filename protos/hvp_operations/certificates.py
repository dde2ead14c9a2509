"""What a search for values of a spectrum can claim: how it ended, and whether any was missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "CONVERGED", "MAX_PRODUCTS", "MULTIPLICITY_UNCERTAIN", "NOISE_LIMIT", "UNVERIFIED"
]


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """Whether a search for k values of a spectrum may have missed some of the wanted ones.

    Attributes:
        shown: Whether it is shown that none was missed, copies of repeated ones included: counted
            from its end of the spectrum, the i-th wanted value lies at most `margin` further
            out than the i-th of the pairs.
        margin: The tolerance and the noise of the search, in units of the values; infinite
            where nothing is known.
        failure_probability: Probability that `shown` is wrong, over the random starting vectors of
            the search for missed eigenvalues; 0 where the basis spanned the whole space.
        num_products: Operator products spent on that search.
    """

    shown: bool = False
    margin: float = float("inf")
    failure_probability: float = 1.0
    num_products: int = 0
