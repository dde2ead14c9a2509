"""The derivatives of the last block with a product's rule behind it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet
from typing import final

import torch

from hvp_core.autodiff.passes import Passes
from hvp_core.autodiff.subprograms import Group, Subprogram, partition
from hvp_core.autodiff.trace import Phase, Trace


@final
class HeadDual:
    """The subprograms of the last block at one shape, for one product.

    Args:
        trace: The trace that `trace_head` makes.
        passes: The passes of the product that is traced.
        key: What the trace was made from: the block's program, the loss with its settings, the
            product.
        remarks: Remarks on the block's code.
        prepare: Called once with each new subprogram; may replace how it runs.
    """

    def __init__(
        self,
        trace: Trace,
        passes: Passes,
        key: Hashable,
        remarks: AbstractSet[str] = frozenset(),
        prepare: Callable[[Subprogram], None] | None = None,
    ):
        self._trace = trace
        self.passes = passes
        self.remarks = frozenset(remarks)
        self.key = key
        self._prepare = prepare
        self._subprograms: dict[
            tuple[bool, tuple[str, ...], tuple[str, ...]], list[Subprogram]
        ] = {}

    @property
    def suffix(self) -> str:
        """The suffix in the names of the derivatives that a probe's cotangents pull back to."""
        return "bar_dot" if self.passes.backward == "pair" else "bar"

    @property
    def given_dtype(self) -> torch.dtype:
        """The dtype of what the product is given."""
        dtype: torch.dtype = self._trace.arguments["given_dot"].meta["val"].dtype
        return dtype

    def measuring(self, shared: bool) -> list[Subprogram]:
        """The subprograms that measure: one; if `shared`, a primal one and one for each probe."""
        return self._split(shared, (), ("measure",))

    def subprograms(self, shared: bool, wants_primal: bool) -> list[Subprogram]:
        """The subprograms that go back: one; if `shared`, a primal one and one for each probe."""
        names = [
            name
            for name in self._trace.outputs
            if name == f"x_{self.suffix}" or name.partition("/")[0] == f"p_{self.suffix}"
        ]
        return self._split(shared, ("x_bar",) if wants_primal else (), tuple(names))

    def _split(
        self, shared: bool, primal: tuple[str, ...], rest: tuple[str, ...]
    ) -> list[Subprogram]:
        key = shared, primal, rest
        if key not in self._subprograms:
            first, second = frozenset([Phase(0, False)]), frozenset([Phase(0, True)])
            wanted = tuple(dict.fromkeys([*primal, *rest]))
            groups = (
                [Group(first, primal), Group(second, rest)]
                if shared
                else [Group(first | second, wanted)]
            )
            known = set(self._trace.outputs)
            groups = [
                Group(each.phases, tuple(name for name in each.outputs if name in known))
                for each in groups
            ]
            self._subprograms[key] = partition(self._trace, groups)
            for subprogram in self._subprograms[key]:
                if self._prepare is not None:
                    self._prepare(subprogram)
        return self._subprograms[key]
