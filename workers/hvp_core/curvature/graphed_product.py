"""A whole product as one CUDA graph: no launch waits for Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.blame import whose

logger = logging.getLogger(__name__)


@final
class GraphedProduct:
    """A captured walk.

    Args:
        graph: The CUDA graph, which reads `inputs` and writes `outputs`.
        inputs: Vectors, in the dtype of the operands of products.
        outputs: The products of these vectors.
    """

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ):
        self._graph, self._inputs, self._outputs = graph, inputs, outputs

    @staticmethod
    def capture(
        walk: Callable[[Sequence[Tensor], Sequence[Tensor]], object],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> GraphedProduct | None:
        """Run a walk once more and record it; None, with a warning, where that is not possible."""
        graph = torch.cuda.CUDAGraph()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up on a stream's first use
                walk(inputs, outputs)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                walk(inputs, outputs)
        except RuntimeError as error:
            if whose(error) != "model":
                raise
            torch.cuda.synchronize()
            logger.warning(
                "products are launched kernel by kernel, which is slower: %s", str(error)[:200]
            )
            return None
        return GraphedProduct(graph, inputs, outputs)

    def __call__(self, vectors: Sequence[Tensor], *, borrow: bool) -> list[Tensor]:
        """The products of these vectors.

        Args:
            vectors: Vectors; one that is an input of the graph itself is not copied.
            borrow: Give the graph's own outputs, valid until the next call, instead of copies.
        """
        for each, vector in zip(self._inputs, vectors, strict=True):
            if each is not vector:
                each.copy_(vector)
        self._graph.replay()
        return [each if borrow else each.clone() for each in self._outputs]


@final
class GraphedProducts:
    """CUDA graphs of products, each by its key and recorded at the product's second walk.

    The first walk compiles kernels and keeps what later walks read.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, GraphedProduct | None] = {}
        self._walked: set[Hashable] = set()

    def get(
        self,
        key: Hashable,
        walk: Callable[[Sequence[Tensor], Sequence[Tensor]], object],
        inputs: Callable[[], Sequence[Tensor]],
        outputs: Callable[[], Sequence[Tensor]],
    ) -> GraphedProduct | None:
        """The graph of a product; None the first time, and where there can be none.

        Args:
            key: What tells this product from others.
            walk: The walk to record, called as (vectors, products to write).
            inputs: Makes the vectors that the walk reads.
            outputs: Makes the products that the walk writes.
        """
        if key not in self._walked:
            self._walked.add(key)
            return None
        if key not in self._found:
            self._found[key] = GraphedProduct.capture(walk, inputs(), outputs())
        return self._found[key]
