"""How one block is taken through a product: by its trace, or, without one, by torch itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.block_dual import AttentionCall, BlockDual, Leg, Way
from hvp_core.autodiff.dual import Function, Params, backward_dual, forward_dual, held, pull_back
from hvp_core.autodiff.parts import Part
from hvp_core.autodiff.product_spec import LOSS, Passes
from hvp_core.autodiff.shards import Sums
from hvp_core.autodiff.trace import Env, dotted


@final
@dataclass
class Tape:
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
class Bars:
    """Cotangents of one micro-batch between two blocks.

    Attributes:
        primal: ȳ of a pair; None where it is kept on a tape, or nothing is a pair.
        dots: For each probe ȳ̇ of a pair, or the one cotangent that a product has.
    """

    primal: Tensor | None
    dots: list[Tensor | None]


@final
@dataclass(frozen=True)
class Weights:
    """A block's parameters, and tangents of the selected ones in each probe."""

    p: Params
    v: Sequence[Params]


class Route(ABC):
    """Takes one block, with the constants of one micro-batch, forward and backward.

    Law: all routes give the same numbers, to rounding.
    """

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
        way: Way,
        weights: Weights,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        kept: Tape | None,
    ) -> tuple[Tensor, list[Tensor | None], Tape]:
        """(y, ẏ of each probe, tape); `kept` is the tape of an earlier product at the same θ."""

    @abstractmethod
    def backward(
        self,
        passes: Passes,
        way: Way,
        weights: Weights,
        tape: Tape,
        bars: Bars,
        sums: Sequence[Sums],
    ) -> Bars:
        """Cotangents of x; adds the parameters' derivatives to `sums`, one for each probe."""


@final
class Traced(Route):
    """By its trace.

    Args:
        dual: Of the block at this shape; its parameters are named by their place.
        names: Of the block's parameters, in the order of those places.
        selected: Of these, the ones that it was traced as a function of.
        constants: Of this micro-batch, by name.
        attention: Of this micro-batch, if the block is cut.
    """

    def __init__(
        self,
        dual: BlockDual,
        names: Sequence[str],
        selected: Collection[str],
        constants: Env,
        attention: AttentionCall | None,
    ):
        self.dual, self._names = dual, tuple(names)
        self._place_of = places(names, selected)
        self._constants, self._attention = constants, attention

    def _env(self, weights: Weights, probe: int | None = None) -> Env:
        """Parameters, tangents of the selected ones in a probe, and constants."""
        found = values_at(self._place_of, weights.p)
        if probe is not None:
            found |= tangents_at(self._place_of, weights.v[probe])
        return found | self._constants

    def value(self, p: Params, x: Tensor) -> Tensor:
        """By the leg of the loss."""
        leg = self.dual.plan(LOSS.passes, "fast").legs[0]
        return leg.run(self._env(Weights(p, [])) | self._input(x), self._attention)["y"]

    def like(self, p: Params, x: Tensor) -> Tensor:
        """Zeros: blocks that cannot be traced are run with it, and must not see mere memory."""
        shape, dtype = self.dual.output
        return torch.zeros(shape, dtype=dtype, device=x.device)

    def _input(self, x: Tensor, x_dot: Tensor | None = None) -> Env:
        return {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}

    def forward(
        self,
        passes: Passes,
        way: Way,
        weights: Weights,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        kept: Tape | None,
    ) -> tuple[Tensor, list[Tensor | None], Tape]:
        """Its forward legs."""
        plan = self.dual.plan(passes, way)
        legs = [leg for leg in plan.legs if not leg.spec.backward]
        if "primal" in legs[0].spec.halves and legs[0].spec.halves != ("primal",):
            tape = Tape()  # this plan keeps nothing from product to product
            names = plan.kept(legs[0])
            y_dots: list[Tensor | None] = []
            for probe, x_dot in enumerate(x_dots):
                env = self._env(weights, probe) | self._input(x, x_dot)
                found = legs[0].run(env, self._attention)
                y, y_dot = found["y"], found["y_dot"]
                y_dots.append(y_dot.contiguous())
                tape.tangents.append(_only(names, env | found))
            return y.contiguous(), y_dots, tape
        tape = kept or Tape()
        if not tape.complete:
            env = self._env(weights) | self._input(x)
            found = legs[0].run(env, self._attention)
            tape.primal = _only(plan.kept(legs[0]), env | found) | {"y": found["y"].contiguous()}
        y_dots, tape.tangents = [], []
        names = plan.kept(legs[1]) - set(tape.primal) if x_dots else frozenset[str]()
        for probes in self._groups(len(x_dots), legs[-1]):
            envs = [
                self._env(weights, probe) | tape.primal | self._input(x, x_dots[probe])
                for probe in probes
            ]
            results = legs[1].run_all(envs, self._attention, [None for _ in envs])
            for env, found in zip(envs, results, strict=True):
                y_dots.append(found["y_dot"].contiguous())
                tape.tangents.append(_only(names, env | found))
        return tape.primal["y"], y_dots, tape

    def _groups(self, count: int, leg: Leg) -> Iterator[range]:
        """Probes that go through a leg together: as many as its attention does at once."""
        size = 1
        if self._attention is not None and leg.spec.halves == ("tangent",):
            size = self._attention.rule.together
        for first in range(0, count, size):
            yield range(first, min(first + size, count))

    def backward(
        self,
        passes: Passes,
        way: Way,
        weights: Weights,
        tape: Tape,
        bars: Bars,
        sums: Sequence[Sums],
    ) -> Bars:
        """Its backward legs."""
        plan = self.dual.plan(passes, way)
        legs = [leg for leg in plan.legs if leg.spec.backward]
        if passes.forward == "value":
            env = self._env(weights) | tape.primal
            alone = [
                legs[0].run(env | _bar(y_bar), self._attention, adder(sum_, self._names))
                for y_bar, sum_ in zip(bars.dots, sums, strict=True)
            ]
            return Bars(None, [found.get("x_bar") for found in alone])
        pair = passes.backward == "pair"
        x_bar = tape.primal.get("x_bar")
        if len(legs) == 2 and not tape.complete:
            env = self._env(weights) | tape.primal | _bar(bars.primal)
            found = legs[0].run(env, self._attention)
            tape.primal |= _only(plan.kept(legs[0]), env | found)
            if "x_bar" in found:
                x_bar = tape.primal["x_bar"] = found["x_bar"]
        dots: list[Tensor | None] = []
        for probes in self._groups(len(bars.dots), legs[-1]):
            envs = []
            for probe in probes:
                env = self._env(weights, probe) | tape.primal | tape.tangents[probe]
                y_bar_dot = bars.dots[probe]
                env |= _bar(bars.primal, y_bar_dot) if pair else _bar(y_bar_dot)
                envs.append(env)
                tape.tangents[probe] = {}
            adders = [adder(sums[probe], self._names) for probe in probes]
            for found in legs[-1].run_all(envs, self._attention, adders):
                dots.append(found.get("x_bar_dot" if pair else "x_bar"))
                if pair:
                    x_bar = found.get("x_bar", x_bar)
        return Bars(x_bar, dots)


def places(names: Sequence[str], selected: Collection[str]) -> dict[str, str]:
    """What a trace calls a block's parameters: `p/PLACE`, or `w/PLACE` for a constant."""
    return {name: f"{'p' if name in selected else 'w'}/{place}" for place, name in enumerate(names)}


def values_at(place_of: Mapping[str, str], p: Params) -> Env:
    """A block's parameters as its trace calls them."""
    return {place: p[name] for name, place in place_of.items()}


def tangents_at(place_of: Mapping[str, str], v: Params) -> Env:
    """Tangents of the selected ones of a block's parameters as its trace calls them."""
    return {dotted(place): v[name] for name, place in place_of.items() if place.startswith("p/")}


def adder(sums: Sums, names: Sequence[str]) -> Callable[[Part, Env], None]:
    """Adds a part's derivatives of parameters, numbered by place, to where they belong."""

    def add(part: Part, results: Env) -> None:
        for name, terms in part.terms.items():
            sums.add(names[int(name.partition("/")[2])], terms, results)

    return add


def _only(names: frozenset[str], env: Env) -> Env:
    return {name: env[name] for name in names if name in env}


def _bar(y_bar: Tensor | None, y_bar_dot: Tensor | None = None) -> Env:
    found = {"y_bar": y_bar, "y_bar_dot": y_bar_dot}
    return {name: each.contiguous() for name, each in found.items() if each is not None}


@final
class Eager(Route):
    """By torch's own differentiation of the block: always lean.

    Args:
        f: The block.
        selected: The parameters that it is differentiated by.
    """

    def __init__(self, f: Function, selected: Collection[str]):
        self._f, self._selected = f, selected

    @torch.no_grad()
    def value(self, p: Params, x: Tensor) -> Tensor:
        """The block itself."""
        return self._f(p, x)

    def like(self, p: Params, x: Tensor) -> Tensor:
        """The value itself."""
        return self.value(p, x)

    def forward(
        self,
        passes: Passes,
        way: Way,
        weights: Weights,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        kept: Tape | None,
    ) -> tuple[Tensor, list[Tensor | None], Tape]:
        """The forward dual of each probe."""
        tape = Tape({"x": x})
        if passes.forward == "value":
            return self.value(weights.p, x), [], tape
        y_dots: list[Tensor | None] = []
        f, p = held(self._f, weights.p, self._selected)
        for v, x_dot in zip(weights.v, x_dots, strict=True):
            y, y_dot = forward_dual(f, p, v, x, x_dot)
            y_dots.append(y_dot)
            tape.tangents.append({} if x_dot is None else {"x_dot": x_dot})
        return y, y_dots, tape

    def backward(
        self,
        passes: Passes,
        way: Way,
        weights: Weights,
        tape: Tape,
        bars: Bars,
        sums: Sequence[Sums],
    ) -> Bars:
        """The backward dual of each probe, or a plain one."""
        x = tape.primal["x"]
        f, p = held(self._f, weights.p, self._selected)
        if passes.backward == "pair":
            dots = []
            for v, tangent, y_bar_dot, sum_ in zip(
                weights.v, tape.tangents, bars.dots, sums, strict=True
            ):
                pair = _constant_pair(bars.primal, y_bar_dot)
                x_dot = tangent.get("x_dot")
                found = backward_dual(f, p, v, x, x_dot, pair)
                sum_.add_dense(found.p_bar)
                dots.append(found.x_bar_dot)
            return Bars(found.x_bar, dots)
        cotangents = []
        for y_bar, sum_ in zip(bars.dots, sums, strict=True):
            found = pull_back(f, p, x, _constant(y_bar))
            sum_.add_dense(found.p_bar)
            cotangents.append(found.x_bar)
        return Bars(None, cotangents)


def _constant(y_bar: Tensor | None) -> Callable[[Tensor], Tensor]:
    assert y_bar is not None
    return lambda _: y_bar


def _constant_pair(
    y_bar: Tensor | None, y_bar_dot: Tensor | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    assert y_bar is not None
    assert y_bar_dot is not None
    return lambda *_: (y_bar, y_bar_dot)
