"""The products, as data: how the walk goes forward, what happens at the output, and how back.

    product           forward    at the output                              backward
    loss              value                                                 none
    gradient          value      G                                          cotangent
    ... of drawn ones value      G of a drawn label                         cotangent
    hessian           tangent    (G, H_out ẏ)                               pair
    ggn               tangent    H_out ẏ                                    cotangent
    fisher by token   tangent    for each target G · slope                  cotangent
    ... by sequence   tangent    slope of each row; then G · slope          cotangent
    ... of drawn ones tangent    for each target mean of G · slope          cotangent
    slopes            tangent    slope of each row                          none
    output_jvp        tangent    ẏ                                          none
    output_vjp        value      u, which is given                          cotangent

and, of quadratic forms, one number a row and nothing back. `output_rules.py` says what the words
mean. Blocks before the last know of a product only its `passes`: two products of the same passes
share their programs, what is verified of them, and what is kept from product to product. The last
block knows the rules.

A new product is a row here and, where no rule fits, a rule in `output_rules.py`. It is served where
the enum of `hvp/v1/operator.proto` has a value of the same name.

The empirical Fisher matrix
    is F = (1/W) Σ_u g_u g_uᵀ, with W the number of targets of the whole batch, the same that the
    mean loss L is divided by, and g_u the gradient of the *sum* of the losses of unit u: of one
    target (`empirical_fisher_token`), or of all targets of one row of the batch
    (`empirical_fisher_sequence`). With this one divisor both are in the units of L: where labels
    are distributed as the model says, gradients of a row's targets are uncorrelated, each given
    those before it, and both have the expectation of the Hessian and of the Gauss–Newton matrix of
    L. The mean over *rows* of the same outer products is `empirical_fisher_sequence` times W /
    rows. A row without a target adds nothing. It is not the square of the mean gradient, and its
    labels are those of the batch, not drawn from the model.

The Fisher matrix
    is that of targets (`fisher`) with labels that are drawn from the model's own distribution,
    F̂ = (1/W) Σ_t (1/S) Σ_s g_{t,s} g_{t,s}ᵀ for S draws of the label of each target t that counts
    (Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, section 5).
    The labels are drawn once (`drawn_labels.py`); given them, F̂ is one matrix, with products as
    cheap as those of one draw. Over all draws its expectation is the Gauss–Newton matrix.

The covariance of the gradients
    is C = (1/W) Σ_u (g_u − m)(g_u − m)ᵀ, with m the mean of the g_u over the U units that have a
    target. Since Σ_u g_u = W ∇L, it is F − (W/U) ∇L ∇Lᵀ: the walk is that of F, and what is taken
    off costs an inner product with the gradient, which is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from hvp_core.autodiff.passes import VALUE, Passes
from hvp_core.errors import CurvatureError
from hvp_core.losses import output_rules as rules


@final
@dataclass(frozen=True)
class Draws:
    """Which labels are drawn from the model.

    Attributes:
        seed: Key of the random numbers, from 0 to 2**64 − 1.
        num_samples: Number S of labels that are drawn for each target.
    """

    seed: int = 0
    num_samples: int = 1


@final
@dataclass(frozen=True)
class ProductSpec:
    """One product.

    Attributes:
        name: The product's name in `Curvature.product` and in notes.
        title: The product in words, to be put into a sentence.
        passes: How the product goes through the blocks before the last.
        cotangents: Rule that makes what goes back from the output: one tensor, or two for a pair.
            None where nothing goes back.
        measure: Rule that makes numbers of the output, (rows,), or a tensor like it. Where
            cotangents go back too, all pieces of a row are measured before any of them goes back.
        measured: `rows`: a number of each row, to which the row's pieces add up; `outputs`: the
            output's tangent.
        given: What the cotangents are made of beside the output. `rows`: the measured numbers of
            rows; `outputs`: a tensor like the output, which is no derivative of the loss and is
            not divided by the number of targets.
        power: Power of the measured numbers of rows that is summed for a quadratic form.
        semidefinite: The matrix has no negative eigenvalue.
        form: The product that measures v·Av of each row, by going forward alone; None where there
            is no such rule.
        of_outputs: The product is one of the model's outputs. A model that gives its loss alone has
            none.
        draws: The labels that the rules read in the place of the batch's; None for the batch's.

    Raises:
        ValueError: The fields contradict one another.
    """

    name: str
    title: str
    passes: Passes
    cotangents: rules.CotangentRule | None = None
    measure: rules.MeasureRule | None = None
    given: Literal["rows", "outputs"] | None = None
    measured: Literal["rows", "outputs"] = "rows"
    power: int = 1
    semidefinite: bool = False
    form: ProductSpec | None = None
    of_outputs: bool = True
    draws: Draws | None = None

    def __post_init__(self) -> None:
        """See that the fields do not contradict one another."""
        if (self.cotangents is None) != (self.passes.backward == "none"):
            raise ValueError(f"{self.name}: cotangents and a backward pass belong together")
        if self.passes == Passes("value", "pair"):
            raise ValueError(f"{self.name}: a pair of cotangents needs tangents")
        if self.measure is not None and self.passes.forward == "value":
            raise ValueError(f"{self.name}: there is nothing to measure without tangents")
        if (self.given == "rows") != (self.measure is not None and self.cotangents is not None):
            raise ValueError(f"{self.name}: numbers of rows go back where they are measured")

    @property
    def program(self) -> ProductSpec:
        """The product, whichever labels are drawn: what is traced does not depend on them."""
        return self.of(Draws())

    def of(self, draws: Draws) -> ProductSpec:
        """The product with these labels, if it is one with drawn labels; else itself."""
        if self.draws in (None, draws):
            return self
        return replace(self, draws=draws, form=self.form and self.form.of(draws))

    def targets_like(self, targets: Tensor) -> Tensor:
        """Some targets of the shape that the product's rules read, made of a batch's."""
        return targets if self.draws is None else torch.stack((targets, targets.flip(-1)), -1)


_GRADIENT = Passes("value", "cotangent")
_GAUSS_NEWTON = Passes("tangent", "cotangent")
_FORWARD = Passes("tangent", "none")

LOSS = ProductSpec("loss", "loss", VALUE, of_outputs=False)
GRADIENT = ProductSpec("gradient", "gradient", _GRADIENT, rules.gradient, of_outputs=False)
DRAWN_GRADIENT = ProductSpec(
    "drawn_gradient",
    "gradient of drawn labels",
    _GRADIENT,
    rules.gradient_of_a_draw,
    draws=Draws(),
)
SLOPES = ProductSpec(
    "slopes", "derivative of the loss", _FORWARD, measure=rules.slopes_of_rows, of_outputs=False
)
OUTPUT_JVP = ProductSpec(
    "output_jvp",
    "derivative of the output",
    _FORWARD,
    measure=rules.output_tangent,
    measured="outputs",
)
OUTPUT_VJP = ProductSpec(
    "output_vjp",
    "product with the output's transposed Jacobian",
    _GRADIENT,
    rules.given,
    given="outputs",
)
HESSIAN = ProductSpec(
    "hessian",
    "Hessian's product",
    Passes("tangent", "pair"),
    rules.gradient_and_curve,
    of_outputs=False,
)
GGN = ProductSpec(
    "ggn",
    "Gauss-Newton product",
    _GAUSS_NEWTON,
    rules.curve,
    semidefinite=True,
    form=ProductSpec(
        "ggn_quadratic", "Gauss-Newton form", _FORWARD, measure=rules.curvature_of_rows
    ),
)
FISHER_TOKEN = ProductSpec(
    "empirical_fisher_token",
    "product with the empirical Fisher matrix of tokens",
    _GAUSS_NEWTON,
    rules.gradient_by_slopes_of_targets,
    semidefinite=True,
    form=ProductSpec(
        "empirical_fisher_token_quadratic",
        "form of the empirical Fisher matrix of tokens",
        _FORWARD,
        measure=rules.squared_slopes_of_targets,
    ),
)
FISHER_SEQUENCE = ProductSpec(
    "empirical_fisher_sequence",
    "product with the empirical Fisher matrix of sequences",
    _GAUSS_NEWTON,
    rules.gradient_by_given_rows,
    rules.slopes_of_rows,
    given="rows",
    semidefinite=True,
    form=ProductSpec(
        "empirical_fisher_sequence_quadratic",
        "form of the empirical Fisher matrix of sequences",
        _FORWARD,
        measure=rules.slopes_of_rows,
        power=2,
    ),
)

FISHER = ProductSpec(
    "fisher",
    "product with the Fisher matrix of drawn labels",
    _GAUSS_NEWTON,
    rules.gradient_by_slopes_of_draws,
    semidefinite=True,
    draws=Draws(),
    form=ProductSpec(
        "fisher_quadratic",
        "form of the Fisher matrix of drawn labels",
        _FORWARD,
        measure=rules.squared_slopes_of_draws,
        draws=Draws(),
    ),
)

Unit = Literal["token", "sequence"]

#: Symmetric matrices on the space of the parameters, by the name of their kind, and the products
#: that they are walked by.
MATRICES = {each.name: each for each in (HESSIAN, GGN, FISHER_TOKEN, FISHER_SEQUENCE, FISHER)} | {
    "gradient_covariance_token": FISHER_TOKEN,
    "gradient_covariance_sequence": FISHER_SEQUENCE,
}
#: Matrices whose units' gradients have their mean taken off, with the units.
CENTRED: dict[str, Unit] = {
    "gradient_covariance_token": "token",
    "gradient_covariance_sequence": "sequence",
}


def matrix(kind: str, draws: Draws | None = None) -> ProductSpec:
    """The product that a kind of symmetric matrix is walked by.

    Args:
        kind: A kind of `MATRICES`.
        draws: The labels of a kind whose labels are drawn; None for those of `Draws()`. Other kinds
            do not read it.

    Raises:
        CurvatureError: KIND_UNSUPPORTED: there is none of this name.
    """
    if kind not in MATRICES:
        raise CurvatureError(
            "KIND_UNSUPPORTED",
            f"there is no matrix {kind!r}; there are {', '.join(MATRICES)}",
            {"kind": kind},
        )
    return MATRICES[kind].of(draws or Draws())


def gradient_of_factors(kind: str, draws: Draws | None, *, is_likelihood: bool) -> ProductSpec:
    """The gradient whose operands make Kronecker factors near a matrix.

    It is that of labels drawn from the model, one for each target, whose outer product has the
    Fisher matrix for its expectation; the empirical Fisher matrix is one of the batch's own labels.

    Args:
        kind: A kind of `MATRICES`.
        draws: The labels, of which the first of each target is taken.
        is_likelihood: Whether labels can be drawn. Where they cannot, those of the batch serve.

    Raises:
        CurvatureError: KIND_UNSUPPORTED.
    """
    if not is_likelihood or matrix(kind) in (FISHER_TOKEN, FISHER_SEQUENCE):
        return GRADIENT
    return DRAWN_GRADIENT.of(Draws((draws or Draws()).seed))
