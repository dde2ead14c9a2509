"""The last block and the loss behind it, piece by piece: no tensor of all tokens × vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Sequence
from collections.abc import Set as AbstractSet
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.dual import (
    Backward,
    Function,
    Params,
    backward_dual,
    forward_dual,
    held,
    pull_back,
)
from hvp_core.autodiff.parts import Group, Part, split
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.route import Bars, Weights, adder, places, tangents_at, values_at
from hvp_core.autodiff.shards import Sums
from hvp_core.autodiff.trace import Env, Stage, Trace, is_parameters
from hvp_core.losses.loss import Loss, at_least_float32
from hvp_core.losses.output_rules import AtOutput


class Closing(ABC):
    """Takes one piece of a micro-batch through the last block and a product's rules.

    Law: all closings of one product give the same numbers, to rounding.
    """

    @abstractmethod
    def measure(self, weights: Weights, x: Tensor, x_dots: Sequence[Tensor | None]) -> list[Tensor]:
        """What the product measures of the piece, for each probe: (rows,), or like y.

        Args:
            weights: The block's.
            x: Input of the piece.
            x_dots: Its tangent in each probe.
        """

    @abstractmethod
    def run(
        self,
        weights: Weights,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Sums],
        *,
        wants_primal: bool,
        given: Sequence[Tensor] = (),
    ) -> Bars:
        """Cotangents of x; adds the parameters' derivatives to `sums`.

        Args:
            weights: The block's.
            x: Input of the piece.
            x_dots: Its tangent in each probe.
            sums: One for each probe; without tangents, for each thing that is given, or one.
            wants_primal: Of a pair x̄ is needed too; it does not change from product to product.
            given: For each probe what its cotangents are made of, where the product is given that.
        """


@final
class ClosingDual:
    """The parts of a closing block at one shape, for one product.

    Args:
        trace: Of `trace_closing`.
        spec: The product that is traced.
        key: What it was traced from: the block's program, the loss with its settings, the product.
        remarks: What is to be said of the block's code.
        prepare: Called once with each new part; may replace how it runs.
    """

    def __init__(
        self,
        trace: Trace,
        spec: ProductSpec,
        key: Hashable,
        remarks: AbstractSet[str] = frozenset(),
        prepare: Callable[[Part], None] | None = None,
    ):
        self._trace = trace
        self.spec = spec
        self.remarks = frozenset(remarks)
        self.key = key
        self._prepare = prepare
        self._parts: dict[tuple[bool, tuple[str, ...], tuple[str, ...]], list[Part]] = {}

    @property
    def suffix(self) -> str:
        """Of the names of what a probe's cotangents pull back to."""
        return "bar_dot" if self.spec.passes.backward == "pair" else "bar"

    @property
    def given_dtype(self) -> torch.dtype:
        """Of what the product is given."""
        dtype: torch.dtype = self._trace.arguments["given_dot"].meta["val"].dtype
        return dtype

    def measuring(self, shared: bool) -> list[Part]:
        """Parts that measure: one; or, `shared`, a primal one and one for each probe."""
        return self._split(shared, (), ("measure",))

    def parts(self, shared: bool, wants_primal: bool) -> list[Part]:
        """Parts that go back: one; or, `shared`, a primal one and one for each probe."""
        names = [
            name
            for name in self._trace.outputs
            if name == f"x_{self.suffix}" or name.partition("/")[0] == f"p_{self.suffix}"
        ]
        return self._split(shared, ("x_bar",) if wants_primal else (), tuple(names))

    def _split(self, shared: bool, primal: tuple[str, ...], rest: tuple[str, ...]) -> list[Part]:
        key = shared, primal, rest
        if key not in self._parts:
            first, second = frozenset([Stage(0, False)]), frozenset([Stage(0, True)])
            wanted = tuple(dict.fromkeys([*primal, *rest]))
            groups = (
                [Group(first, primal), Group(second, rest)]
                if shared
                else [Group(first | second, wanted)]
            )
            known = set(self._trace.outputs)
            groups = [
                Group(each.stages, tuple(name for name in each.outputs if name in known))
                for each in groups
            ]
            self._parts[key] = split(self._trace, groups)
            for part in self._parts[key]:
                if self._prepare is not None:
                    self._prepare(part)
        return self._parts[key]


@final
class TracedClosing(Closing):
    """By the trace of block and rules.

    Args:
        dual: Of both, at this shape.
        names: Of the block's parameters, by place.
        selected: Of these, the ones that it was traced as a function of.
        constants: Of this piece.
    """

    def __init__(
        self, dual: ClosingDual, names: Sequence[str], selected: Collection[str], constants: Env
    ):
        self.dual, self._names, self._constants = dual, tuple(names), constants
        self._place_of = places(names, selected)

    def measure(self, weights: Weights, x: Tensor, x_dots: Sequence[Tensor | None]) -> list[Tensor]:
        """The parts that measure."""
        shared = len(x_dots) > 1
        parts, env = self.dual.measuring(shared), self._primal(weights, x)
        if shared:
            env |= parts[0](env)
        return [
            parts[-1](env | self._along(weights, probe, x_dot))["measure"]
            for probe, x_dot in enumerate(x_dots)
        ]

    def run(
        self,
        weights: Weights,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Sums],
        *,
        wants_primal: bool,
        given: Sequence[Tensor] = (),
    ) -> Bars:
        """The parts one after the other."""
        passes = self.dual.spec.passes
        wants_primal = wants_primal and passes.backward == "pair"
        shared = len(sums) > 1
        parts, env = self.dual.parts(shared, wants_primal), self._primal(weights, x)
        more: list[Env] = [{} for _ in sums]
        if given:
            more = [{"given_dot": each.to(self.dual.given_dtype)} for each in given]
        if passes.forward == "tangent":
            more = [
                each | self._along(weights, probe, x_dot)
                for probe, (each, x_dot) in enumerate(zip(more, x_dots, strict=True))
            ]
        x_bar = None
        if shared:
            kept = parts[0](env)
            x_bar = kept.get("x_bar")
            env |= kept
        dots: list[Tensor | None] = []
        for along, sum_ in zip(more, sums, strict=True):
            found = self._step(parts[-1], env | along, sum_)
            if wants_primal:
                x_bar = found.get("x_bar", x_bar)
            dots.append(found.get(f"x_{self.dual.suffix}"))
        return Bars(x_bar, dots)

    def _primal(self, weights: Weights, x: Tensor) -> Env:
        return values_at(self._place_of, weights.p) | self._constants | {"x": x}

    def _along(self, weights: Weights, probe: int, x_dot: Tensor | None) -> Env:
        along = tangents_at(self._place_of, weights.v[probe])
        if x_dot is not None:
            along["x_dot"] = x_dot
        return along

    def _step(self, part: Part, env: Env, sum_: Sums) -> Env:
        found = part(env)
        adder(sum_, self._names)(part, found)
        return {name: each for name, each in found.items() if not is_parameters(name)}


@final
class EagerClosing(Closing):
    """By torch's own differentiation of the block.

    Args:
        f: The block.
        selected: The parameters that it is differentiated by.
        spec: The product.
        loss: Behind the block.
        target: Of the piece.
        scale: What the cotangents are multiplied by.
    """

    def __init__(
        self,
        f: Function,
        selected: Collection[str],
        spec: ProductSpec,
        loss: Loss,
        target: Tensor,
        scale: float,
    ):
        self._f, self._selected = f, selected
        self._spec, self._loss, self._target = spec, loss, target
        self._scale = scale

    def measure(self, weights: Weights, x: Tensor, x_dots: Sequence[Tensor | None]) -> list[Tensor]:
        """A forward dual for each probe."""
        assert self._spec.measure is not None
        f, p = held(self._f, weights.p, self._selected)
        return [
            self._spec.measure(self._at(*forward_dual(f, p, v, x, x_dot)))
            for v, x_dot in zip(weights.v, x_dots, strict=True)
        ]

    def run(
        self,
        weights: Weights,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Sums],
        *,
        wants_primal: bool,
        given: Sequence[Tensor] = (),
    ) -> Bars:
        """A backward dual for each probe, or a plain one."""
        more: list[Tensor | None] = [*given] or [None for _ in sums]
        pair = self._spec.passes.backward == "pair"
        x_bar, dots = None, []
        f, p = held(self._f, weights.p, self._selected)
        for probe, (sum_, known) in enumerate(zip(sums, more, strict=True)):
            if pair:
                at = p, weights.v[probe], x, x_dots[probe]
                found = backward_dual(f, *at, self._pair)
                x_bar = found.x_bar
            elif self._spec.passes.forward == "tangent":
                at = p, weights.v[probe], x, x_dots[probe]
                found = self._pull_back(f, forward_dual(f, *at)[1], p, x, known)
            else:
                found = self._pull_back(f, None, p, x, known)
            sum_.add_dense(found.p_bar)
            dots.append(found.x_bar_dot if pair else found.x_bar)
        return Bars(x_bar, dots)

    def _pull_back(
        self, f: Function, y_dot: Tensor | None, p: Params, x: Tensor, given: Tensor | None
    ) -> Backward:
        def y_bar(y: Tensor) -> Tensor:
            return self._cotangents(y, torch.zeros_like(y) if y_dot is None else y_dot, given)[0]

        return pull_back(f, p, x, y_bar)

    def _at(self, y: Tensor, y_dot: Tensor, given: Tensor | None = None) -> AtOutput:
        y, y_dot = at_least_float32(y), at_least_float32(y_dot)
        return AtOutput(self._loss, y, y_dot, self._target, given)

    def _cotangents(self, y: Tensor, y_dot: Tensor, given: Tensor | None = None) -> list[Tensor]:
        assert self._spec.cotangents is not None
        found = self._spec.cotangents(self._at(y, y_dot, given))
        return [(each * self._scale).to(y.dtype) for each in found]

    def _pair(self, y: Tensor, y_dot: Tensor) -> tuple[Tensor, Tensor]:
        y_bar, y_bar_dot = self._cotangents(y, y_dot)
        return y_bar, y_bar_dot


def joined(bars: Sequence[Bars]) -> Bars:
    """Cotangents of pieces, one behind the other."""
    dots = [_cat([each.dots[probe] for each in bars]) for probe in range(len(bars[0].dots))]
    return Bars(_cat([each.primal for each in bars]), dots)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    return found[0] if len(found) == 1 else torch.cat(found, 1)
