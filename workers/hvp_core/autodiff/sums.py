"""Derivatives of parameters, added up where they belong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class GradientTerm:
    """One summand of a parameter's derivative.

    `mm`: operands[0] @ operands[1]. `rows`: rows operands[1] added at the indices operands[0].
    `dense`: operands[0] itself.
    """

    kind: str
    operands: tuple[str, ...]

    @property
    def is_one(self) -> bool:
        """Whether the term adds to no element more than once."""
        return self.kind != "rows"

    def add_to(self, total: Tensor, results: Mapping[str, Tensor], *, fresh: bool) -> None:
        """Accumulate in place, in the precision of `total`.

        Args:
            total: The sum so far.
            results: Results of a subprogram, by name.
            fresh: Nothing has been added yet, and `total` holds no particular values.
        """
        values = [results[name] for name in self.operands]
        if self.kind == "mm":
            add_product(total, values[0], values[1], fresh=fresh)
            return
        if fresh:
            total.zero_()
        if self.kind == "rows":
            ids, rows = values
            rows = rows.reshape(-1, rows.shape[-1]).to(total.dtype)
            # On a GPU index_add_ adds in any order; this sorts first.
            total.index_put_((ids.reshape(-1),), rows, accumulate=True)
        else:
            total += values[0]


def add_product(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool) -> None:
    """Total += left @ right; the GEMM's own accumulator holds the sum and rounds once.

    Where the operands are wider than the total, their product is made first, and then rounded.

    Args:
        total: The sum so far, (m, n); changed.
        left: (m, k).
        right: (k, n).
        fresh: Nothing has been added yet, and `total` holds no particular values.
    """
    widens = total.is_cuda and total.dtype == torch.float32
    if total.dtype != left.dtype and not widens:
        dtype = torch.promote_types(total.dtype, left.dtype)
        left, right = left.to(dtype), right.to(dtype)
    if total.dtype.itemsize < left.dtype.itemsize:
        product = left @ right
        total.copy_(product if fresh else product.add_(total))
    elif total.dtype == left.dtype:
        if fresh:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif fresh:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class Accumulator(ABC):
    """Takes the derivatives of a block's parameters, as executors hand them out."""

    @abstractmethod
    def add(self, name: str, terms: Sequence[GradientTerm], results: Mapping[str, Tensor]) -> None:
        """Take terms of a parameter's derivative; their operands are among the results."""

    @abstractmethod
    def add_dense(self, parts: Mapping[str, Tensor]) -> None:
        """Take tensors of the parameters' size, by the parameters' names."""


@final
class Sums(Accumulator):
    """Adds up the derivatives of a block's parameters.

    Derivatives of 16 bits are summed in 32 bits: a view of 16 bits takes a single term as it is,
    and more than one by way of a float32 tensor that lives until the block's end.

    Args:
        views: Tensors to add to, by the parameters' names.
        fresh: Names to which nothing has been added, whose tensors hold no particular values.
            Shared by all blocks of a product: a tied tensor is written by more than one.
    """

    def __init__(self, views: Mapping[str, Tensor], fresh: set[str]):
        self._views, self._fresh = views, fresh
        self._wide: dict[str, Tensor] = {}

    def add(self, name: str, terms: Sequence[GradientTerm], results: Mapping[str, Tensor]) -> None:
        """See Accumulator."""
        for term in terms:
            fresh = name in self._fresh
            term.add_to(self._total(name, fresh and term.is_one), results, fresh=fresh)
            self._fresh.discard(name)

    def add_dense(self, parts: Mapping[str, Tensor]) -> None:
        """See Accumulator."""
        for name, part in parts.items():
            fresh = name in self._fresh
            total = self._total(name, fresh)
            if fresh:
                total.copy_(part)
                self._fresh.discard(name)
            else:
                total.add_(part)

    def _total(self, name: str, alone: bool) -> Tensor:
        """The tensor to add to.

        Args:
            name: Name of the parameter.
            alone: Nothing was added before, and now at most once to each element.
        """
        view = self._views[name]
        if alone or view.dtype.itemsize >= torch.float32.itemsize:
            return view
        if name not in self._wide:
            self._wide[name] = view.float()
        return self._wide[name]

    def settle(self) -> None:
        """Round into the views what was summed in 32 bits; called when the block is through."""
        for name, total in self._wide.items():
            self._views[name].copy_(total)
        self._wide.clear()
