"""What goes with each micro-batch through each block, as whoever takes it there sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor

from hvp_core.autodiff.executor import BlockExecutor, HeadExecutor
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.reference import Params
from hvp_core.autodiff.selected_parameters import SelectedParameters
from hvp_core.model.chain import Body


class Executors(ABC):
    """The executors of one operator, for each block and each micro-batch of this rank.

    Attributes:
        executor_of: By block and micro-batch, as far as they have been asked for.
        selected: The parameters that have a derivative.
    """

    executor_of: Mapping[tuple[int, int], BlockExecutor]
    selected: SelectedParameters

    @abstractmethod
    def body(self, index: int, batch: int, dense: bool) -> Body:
        """A block's body, its constants in the precision of the products."""

    @abstractmethod
    def executor(self, index: int, batch: int, p: Params, x: Tensor) -> BlockExecutor:
        """Of a block, not the last, with one micro-batch; of p and x only shapes matter."""

    @abstractmethod
    def head(
        self, spec: ProductSpec, batch: int, piece: int, p: Params, x: Tensor, target: Tensor
    ) -> HeadExecutor:
        """Of the last block and a product's rule, with one piece of a micro-batch."""

    @abstractmethod
    def pieces(self, batch: int, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What of the last block's input goes through it at once, with its targets."""
