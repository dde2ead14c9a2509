"""How a block is taken through a product: what whoever takes it gives, and is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from hvp_core.autodiff.passes import Passes, Retention
from hvp_core.autodiff.reference import Params
from hvp_core.autodiff.sums import Sums
from hvp_core.autodiff.trace import Env


@final
@dataclass
class Residuals:
    """What one block keeps of one micro-batch on the way forward.

    Attributes:
        primal: What does not depend on a tangent.
        tangents: For each probe, the rest.
        complete: `primal` holds what every leg needs: the primal ones need not run again.
    """

    primal: Env = field(default_factory=dict)
    tangents: list[Env] = field(default_factory=list)
    complete: bool = False


@final
@dataclass
class Cotangents:
    """Cotangents of one micro-batch between two blocks.

    Attributes:
        primal: ȳ of a pair; None where it is kept on a residuals, or nothing is a pair.
        dots: For each probe ȳ̇ of a pair, or the one cotangent that a product has.
    """

    primal: Tensor | None
    dots: list[Tensor | None]


def joined(cotangents: Sequence[Cotangents]) -> Cotangents:
    """Cotangents of pieces, one behind the other."""
    dots = [
        _cat([each.dots[probe] for each in cotangents]) for probe in range(len(cotangents[0].dots))
    ]
    return Cotangents(_cat([each.primal for each in cotangents]), dots)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    return found[0] if len(found) == 1 else torch.cat(found, 1)


@final
@dataclass(frozen=True)
class ParamsAndTangents:
    """A block's parameters, and tangents of the selected ones in each probe."""

    p: Params
    v: Sequence[Params]


class Bytes(NamedTuple):
    """Memory that a block keeps on the way forward, by what it keeps."""

    lean: int
    fast: int
    shared: int  # within a product: the primal half and the tangents
    cached: int  # from product to product: the primal half alone


class BlockExecutor(ABC):
    """Takes one block, with the constants of one micro-batch, forward and backward.

    Law: all executors give the same numbers, to rounding.
    """

    @property
    def key(self) -> Hashable | None:
        """What its program was traced from; None where there is no program to be compared."""
        return None

    @abstractmethod
    def kept_bytes(self, passes: Passes, num_probes: int) -> Bytes:
        """What it would keep of one micro-batch for a product of these passes."""

    @abstractmethod
    def value(self, p: Params, x: Tensor) -> Tensor:
        """Y = f(p, x)."""

    @abstractmethod
    def like(self, p: Params, x: Tensor) -> Tensor:
        """A tensor shaped as y."""

    @abstractmethod
    def forward(
        self,
        passes: Passes,
        way: Retention,
        weights: ParamsAndTangents,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        kept: Residuals | None,
    ) -> tuple[Tensor, list[Tensor | None], Residuals]:
        """(y, ẏ of each probe, residuals); `kept` are those of an earlier one at the same θ."""

    @abstractmethod
    def backward(
        self,
        passes: Passes,
        way: Retention,
        weights: ParamsAndTangents,
        residuals: Residuals,
        cotangents: Cotangents,
        sums: Sequence[Sums],
    ) -> Cotangents:
        """Cotangents of x; adds the parameters' derivatives to `sums`, one for each probe."""


class HeadExecutor(ABC):
    """Takes one piece of a micro-batch through the last block and a product's rules.

    Law: all heads of one product give the same numbers, to rounding.
    """

    @property
    def key(self) -> Hashable | None:
        """What its program was traced from; None where there is no program to be compared."""
        return None

    @abstractmethod
    def measure(
        self, weights: ParamsAndTangents, x: Tensor, x_dots: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """What the product measures of the piece, for each probe: (rows,), or like y.

        Args:
            weights: The block's.
            x: Input of the piece.
            x_dots: Its tangent in each probe.
        """

    @abstractmethod
    def run(
        self,
        weights: ParamsAndTangents,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Sums],
        *,
        wants_primal: bool,
        given: Sequence[Tensor] = (),
    ) -> Cotangents:
        """Cotangents of x; adds the parameters' derivatives to `sums`.

        Args:
            weights: The block's.
            x: Input of the piece.
            x_dots: Its tangent in each probe.
            sums: One for each probe; without tangents, for each thing that is given, or one.
            wants_primal: Of a pair x̄ is needed too; it does not change from product to product.
            given: For each probe what its cotangents are made of, where the product is given that.
        """
