"""Checks that a block takes each row alone: then micro-batches change memory, and no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch

from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Block, Chain, MicroBatch, function_of, rows

#: Error relative to the largest number: a matrix product of two rows adds in another order than
#: that of one.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@final
class RowCheck:
    """Walks two rows through the blocks, together and one by one.

    Args:
        chain: The model.
        pair: The two rows; None where nothing is to be checked.
    """

    def __init__(self, chain: Chain, pair: MicroBatch | None):
        batches = [] if pair is None else [pair, rows(pair, 0, 1), rows(pair, 1, 2)]
        self._contexts = [chain.context(batch) for batch in batches]
        #: The model gives the mean loss of the rows that it is given, once for each.
        self._gives_mean = not chain.loss.has_outputs
        self._xs = [chain.first_input(batch) for batch in batches]

    @torch.no_grad()
    def __call__(self, block: Block, p: Mapping[str, torch.Tensor]) -> None:
        """Check the next block of the chain.

        Args:
            block: The block; each is checked once, in the order of the chain.
            p: Parameters of the block.

        Raises:
            CurvatureError: MODEL_UNSUPPORTED, naming the block.
        """
        if not self._xs:
            return
        self._xs = [
            _run(block, context, p, x) for context, x in zip(self._contexts, self._xs, strict=True)
        ]
        together, *alone = self._xs
        if self._gives_mean:
            mean = (alone[0] + alone[1]) / 2
            alone = [mean, mean]
        if not _alike([together, *alone]):
            if self._gives_mean:
                raise CurvatureError(
                    "MODEL_UNSUPPORTED",
                    f"{block.name} does not return the mean loss of its rows: of two rows it is "
                    "not the mean of what each has alone. Rows are cut into micro-batches and "
                    "dealt out to ranks: let it be a mean over rows, or register outputs and a "
                    "loss",
                    {"block": block.name, "operation": "its value for two rows"},
                )
            raise CurvatureError(
                "MODEL_UNSUPPORTED",
                f"block {block.name} does not give each row what it gives it alone: it computes "
                "across rows, or with random numbers; the loss of such a model is no sum over rows",
                {"block": block.name, "operation": "its value for two rows"},
            )


def _run(
    block: Block, context: object, p: Mapping[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    dtypes = [each.dtype for each in p.values()]
    body = block.body(context, dense=True)
    body = body.cast(dtypes[0]) if dtypes else body
    return function_of(body)(p, x)


def _alike(ys: Sequence[torch.Tensor]) -> bool:
    """Whether the first tensor equals the others, laid end to end, to rounding."""
    both, *alone = ys
    if both.dim() == 0 or any(each.shape[1:] != both.shape[1:] for each in alone):
        return False
    apart = torch.cat(list(alone))
    if apart.shape != both.shape:
        return False
    if not both.is_floating_point() or not both.numel():
        return torch.equal(both, apart)
    # What is no number is said of the loss.
    both, apart = both.nan_to_num(), apart.nan_to_num()
    tolerance = _TOLERANCE.get(both.dtype, 5e-2)
    return float((both - apart).abs().max()) <= tolerance * max(1.0, float(apart.abs().max()))
