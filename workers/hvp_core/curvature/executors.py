"""The interface of an operator's executors, as `Passage` and the search for NaN use it."""

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
        executor_of: Executors by (index of the block, index of the micro-batch), as far as they
            have been asked for.
        selected: The parameters that have a derivative.
    """

    executor_of: Mapping[tuple[int, int], BlockExecutor]
    selected: SelectedParameters

    @abstractmethod
    def body(self, index: int, batch: int, dense: bool) -> Body:
        """A block's body, its constants in the dtype of the operands of products.

        Args:
            index: Index of the block.
            batch: Index of the micro-batch whose constants the body computes with.
            dense: The body gets its attention masks as tensors.
        """

    @abstractmethod
    def executor(self, index: int, batch: int, p: Params, x: Tensor) -> BlockExecutor:
        """The executor of a block, not the last, with one micro-batch.

        Of p and x only shapes, dtypes and devices matter.
        """

    @abstractmethod
    def head(
        self, spec: ProductSpec, batch: int, piece: int, p: Params, x: Tensor, target: Tensor
    ) -> HeadExecutor:
        """The executor of the last block and a product's rule, with one piece of a micro-batch."""

    @abstractmethod
    def targets(self, spec: ProductSpec, batch: int) -> Tensor:
        """The targets that a product's rules read: a micro-batch's own, or those that are drawn."""

    @abstractmethod
    def pieces(
        self, batch: int, x: Tensor, targets: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces of the last block's input that go through it one by one, with their targets.

        Args:
            batch: Index of the micro-batch.
            x: The last block's whole input of that micro-batch, or a tensor cut like it.
            targets: What is cut along with it, (rows, ...); None for the micro-batch's targets.
        """
