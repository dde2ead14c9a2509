"""The products, as data: how the walk goes forward, what the head's cotangents are, and back.

    product    forward    cotangents of the output                  backward
    loss       value                                                none
    gradient   value      G                                         cotangent
    hessian    tangent    (G, H_out ẏ)                              pair
    ggn        tangent    H_out ẏ                                   cotangent

with G = ∂(Σ w ℓ)/∂y and H_out = ∂²(Σ w ℓ)/∂y² of the loss by the model's output y. Blocks before
the last know of a product only its `passes`: two products of the same passes share their programs,
what is verified of them, and what is kept from product to product. The last block knows the rule.

A new product is a row here and, where no rule fits, a rule in `output_rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from hvp_core.output_rules import CotangentRule, curve, gradient, gradient_and_curve


class Passes(NamedTuple):
    """How a product goes through the blocks before the last.

    Attributes:
        forward: With values y alone, or with tangents ẏ beside them.
        backward: Not at all; with one cotangent ȳ for each product; or with the pair of the
            gradient's cotangent ȳ and its tangent ȳ̇, which needs tangents forward.
    """

    forward: Literal["value", "tangent"]
    backward: Literal["none", "cotangent", "pair"]

    @property
    def keeps(self) -> bool:
        """Whether a primal half is worth keeping for later products: they take it both ways."""
        return self.forward == "tangent" and self.backward != "none"


@final
@dataclass(frozen=True)
class ProductSpec:
    """One product.

    Attributes:
        name: As `Curvature.product` and notes call it.
        title: What it is, in a sentence.
        passes: Through the blocks before the last.
        cotangents: What goes back from the output: one tensor, or two for a pair. None where
            nothing goes back.

    Raises:
        ValueError: The fields contradict one another.
    """

    name: str
    title: str
    passes: Passes
    cotangents: CotangentRule | None = None

    def __post_init__(self) -> None:
        """See that what goes back has a beginning."""
        if (self.cotangents is None) != (self.passes.backward == "none"):
            raise ValueError(f"{self.name}: cotangents and a backward pass belong together")
        if self.passes == Passes("value", "pair"):
            raise ValueError(f"{self.name}: a pair of cotangents needs tangents")


LOSS = ProductSpec("loss", "loss", Passes("value", "none"))
GRADIENT = ProductSpec("gradient", "gradient", Passes("value", "cotangent"), gradient)
HESSIAN = ProductSpec("hessian", "Hessian's product", Passes("tangent", "pair"), gradient_and_curve)
GGN = ProductSpec("ggn", "Gauss-Newton product", Passes("tangent", "cotangent"), curve)

#: Square matrices on the space of the parameters, by the name of their kind.
MATRICES = {each.name: each for each in (HESSIAN, GGN)}
