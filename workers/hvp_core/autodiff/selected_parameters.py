"""The parameters that move: those that vectors have. All others are constants of the model.

Nothing before the first block that uses a selected parameter has a derivative: its values do not
change from product to product, and nothing goes back to it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, final

from hvp_core.autodiff.passes import VALUE, Passes
from hvp_core.model.chain import Chain
from hvp_core.vectors.space import ParameterSpace


class Link(NamedTuple):
    """A block in its place in a chain, and what of it has a derivative.

    Attributes:
        name: Name of the block.
        parameters: Names of all of its parameters.
        selected: Names of the parameters that it is differentiated by.
        takes_data: The block's input has no derivative.
    """

    name: str
    parameters: Sequence[str]
    selected: Collection[str]
    takes_data: bool

    @property
    def moves(self) -> bool:
        """Whether the block has a derivative, by its parameters or by its input."""
        return bool(self.selected) or not self.takes_data


@final
class SelectedParameters:
    """The parameters of a space of vectors, block by block.

    Args:
        chain: The model.
        space: Space of the vectors, which have all of the model's parameters or some.

    Attributes:
        first: Index of the first block that has a derivative: that uses a selected parameter or,
            where the chain's input moves, the first. Where none does, index of the last block.
    """

    def __init__(self, chain: Chain, space: ParameterSpace):
        selected = {parameter.name for parameter in space.layout.parameters}
        of = [selected.intersection(block.parameters) for block in chain.blocks]
        self.first = min((i for i, names in enumerate(of) if names), default=len(of) - 1)
        if chain.input_moves:
            self.first = 0
        #: The blocks, in their order.
        self.links = [
            Link(
                block.name,
                block.parameters,
                names,
                index <= self.first and not chain.input_moves,
            )
            for index, (block, names) in enumerate(zip(chain.blocks, of, strict=True))
        ]

    def passes(self, index: int, passes: Passes) -> Passes:
        """The product's passes through a block: values alone before the first that moves."""
        return VALUE if index < self.first else passes
