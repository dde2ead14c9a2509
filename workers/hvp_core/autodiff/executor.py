"""The interface of what takes a block through a product, and the records that it is handed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from hvp_core.autodiff.passes import Passes, Retention
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.reference import Params
from hvp_core.autodiff.sums import Accumulator


@final
@dataclass
class Residuals:
    """What one block keeps of one micro-batch on the way forward.

    Attributes:
        primal: Values, by name, that do not depend on a tangent.
        tangents: For each probe, the values that do.
        complete: `primal` holds what every leg needs: the primal legs need not run again.
    """

    primal: Env = field(default_factory=dict)
    tangents: list[Env] = field(default_factory=list)
    complete: bool = False


@final
@dataclass
class Cotangents:
    """Cotangents of one micro-batch between two blocks.

    Attributes:
        primal: ȳ of a pair; None where it is kept in the residuals, or where the product has no
            pair.
        dots: For each probe ȳ̇ of a pair, or the one cotangent that the product has.
    """

    primal: Tensor | None
    dots: list[Tensor | None]


def joined(cotangents: Sequence[Cotangents]) -> Cotangents:
    """The cotangents of a micro-batch from those of its pieces, laid end to end."""
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
    """A block's parameters `p` by name, and for each probe tangents `v` of the selected ones."""

    p: Params
    v: Sequence[Params]


class Bytes(NamedTuple):
    """Memory that a block keeps on the way forward, under each retention."""

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
        """What the executor's program was traced from; None if it has no program to compare."""
        return None

    @abstractmethod
    def kept_bytes(self, passes: Passes, num_probes: int) -> Bytes:
        """Memory that the block would keep of one micro-batch for a product of these passes."""

    @abstractmethod
    def value(self, p: Params, x: Tensor) -> Tensor:
        """The block's output y = f(p, x)."""

    @abstractmethod
    def like(self, p: Params, x: Tensor) -> Tensor:
        """A tensor of y's shape and dtype; its values do not matter."""

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
        """(y, ẏ of each probe, residuals).

        Args:
            passes: How the product goes through the block.
            way: What the block keeps for the way back.
            weights: The block's parameters and their tangents.
            x: The block's input.
            x_dots: Tangent of the input in each probe; None where it has none.
            kept: Residuals of an earlier product of these passes at the same θ; None for none.
        """

    @abstractmethod
    def backward(
        self,
        passes: Passes,
        way: Retention,
        weights: ParamsAndTangents,
        residuals: Residuals,
        cotangents: Cotangents,
        sums: Sequence[Accumulator],
    ) -> Cotangents:
        """Cotangents of x; adds the parameters' derivatives to `sums`.

        Args:
            passes: How the product goes through the block.
            way: What the block has kept, as in `forward`.
            weights: The block's parameters and their tangents.
            residuals: The residuals that `forward` gave.
            cotangents: Cotangents of y.
            sums: Sums of the parameters' derivatives, one for each probe.
        """


class HeadExecutor(ABC):
    """Takes one piece of a micro-batch through the last block and a product's rules.

    Law: all heads of one product give the same numbers, to rounding.
    """

    @property
    def key(self) -> Hashable | None:
        """What the head's program was traced from; None if it has no program to compare."""
        return None

    @abstractmethod
    def measure(
        self, weights: ParamsAndTangents, x: Tensor, x_dots: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """What the product measures of the piece, for each probe: (rows,), or like y.

        Args:
            weights: The block's parameters and their tangents.
            x: Input of the piece.
            x_dots: Tangent of the input in each probe.
        """

    @abstractmethod
    def run(
        self,
        weights: ParamsAndTangents,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Accumulator],
        *,
        wants_primal: bool,
        given: Sequence[Tensor] = (),
    ) -> Cotangents:
        """Cotangents of x; adds the parameters' derivatives to `sums`.

        Args:
            weights: The block's parameters and their tangents.
            x: Input of the piece.
            x_dots: Tangent of the input in each probe.
            sums: Sums of the parameters' derivatives, one for each probe. Without tangents there is
                one for each tensor of `given`, or a single one.
            wants_primal: Of a pair of cotangents x̄ is wanted too. It is the same for every product
                at this θ.
            given: For each probe the tensor that its cotangents are made of, where the product is
                given one.
        """
