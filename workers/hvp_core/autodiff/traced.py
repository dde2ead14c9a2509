"""A block taken through a product by its trace."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.block_dual import AttentionCall, BlockDual, Leg
from hvp_core.autodiff.executor import (
    BlockExecutor,
    Bytes,
    Cotangents,
    HeadExecutor,
    ParamsAndTangents,
    Residuals,
)
from hvp_core.autodiff.head_dual import HeadDual
from hvp_core.autodiff.passes import VALUE, Passes, Retention
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.reference import Params
from hvp_core.autodiff.subprograms import Subprogram
from hvp_core.autodiff.sums import Accumulator
from hvp_core.autodiff.trace import dotted, is_parameters


@final
class TracedExecutor(BlockExecutor):
    """Takes a block through a product by its trace.

    Args:
        dual: Subprograms of the block at this shape; they name its parameters by place.
        names: Names of the block's parameters, in the order of those places.
        selected: Names of the parameters that the block was traced as a function of.
        constants: Constants of this micro-batch, by name.
        attentions: Calls of this micro-batch's attentions, at which the block is cut.
    """

    def __init__(
        self,
        dual: BlockDual,
        names: Sequence[str],
        selected: Collection[str],
        constants: Env,
        attentions: Sequence[AttentionCall],
    ):
        self.dual, self._names = dual, tuple(names)
        self._place_of = places(names, selected)
        self._constants, self._attentions = constants, attentions

    @property
    def key(self) -> Hashable:
        """See BlockExecutor."""
        return self.dual.key

    def kept_bytes(self, passes: Passes, num_probes: int) -> Bytes:
        """Memory that legs behind the forward ones read."""
        shared, cached = self.dual.kept_bytes(passes, "shared"), self.dual.shared_bytes(passes)
        return Bytes(
            self.dual.kept_bytes(passes, "lean") * num_probes,
            self.dual.kept_bytes(passes, "fast"),
            shared * num_probes,
            cached,
        )

    def _env(self, weights: ParamsAndTangents, probe: int | None = None) -> Env:
        """The values that every leg reads: parameters, their tangents in a probe, constants."""
        found = values_at(self._place_of, weights.p)
        if probe is not None:
            found |= tangents_at(self._place_of, weights.v[probe])
        return found | self._constants

    def value(self, p: Params, x: Tensor) -> Tensor:
        """The block's output, by the leg of the loss."""
        leg = self.dual.plan(VALUE, "fast").legs[0]
        return leg.run(self._env(ParamsAndTangents(p, [])) | self._input(x), self._attentions)["y"]

    def like(self, p: Params, x: Tensor) -> Tensor:
        """Zeros of y's shape and dtype.

        Later blocks that cannot be traced are run with them, and must not see uninitialised memory.
        """
        shape, dtype = self.dual.output
        return torch.zeros(shape, dtype=dtype, device=x.device)

    def _input(self, x: Tensor, x_dot: Tensor | None = None) -> Env:
        return {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}

    def forward(
        self,
        passes: Passes,
        way: Retention,
        weights: ParamsAndTangents,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        kept: Residuals | None,
    ) -> tuple[Tensor, list[Tensor | None], Residuals]:
        """See BlockExecutor: the block's forward legs."""
        plan = self.dual.plan(passes, way)
        legs = [leg for leg in plan.legs if not leg.spec.backward]
        if "primal" in legs[0].spec.halves and legs[0].spec.halves != ("primal",):
            residuals = Residuals()  # this plan keeps nothing from product to product
            names = plan.kept(legs[0])
            y_dots: list[Tensor | None] = []
            for probe, x_dot in enumerate(x_dots):
                env = self._env(weights, probe) | self._input(x, x_dot)
                found = legs[0].run(env, self._attentions)
                y, y_dot = found["y"], found["y_dot"]
                y_dots.append(y_dot.contiguous())
                residuals.tangents.append(_only(names, env | found))
            return y.contiguous(), y_dots, residuals
        residuals = kept or Residuals()
        if not residuals.complete:
            env = self._env(weights) | self._input(x)
            found = legs[0].run(env, self._attentions)
            residuals.primal = _only(plan.kept(legs[0]), env | found) | {
                "y": found["y"].contiguous()
            }
        y_dots, residuals.tangents = [], []
        names = plan.kept(legs[1]) - set(residuals.primal) if x_dots else frozenset[str]()
        for probes in self._groups(len(x_dots), legs[-1]):
            envs = [
                self._env(weights, probe) | residuals.primal | self._input(x, x_dots[probe])
                for probe in probes
            ]
            results = legs[1].run_all(envs, self._attentions, [None for _ in envs])
            for env, found in zip(envs, results, strict=True):
                y_dots.append(found["y_dot"].contiguous())
                residuals.tangents.append(_only(names, env | found))
        return residuals.primal["y"], y_dots, residuals

    def _groups(self, count: int, leg: Leg) -> Iterator[range]:
        """The probes that go through a leg together: as many as its attentions take at once."""
        size = 1
        if self._attentions and leg.spec.halves == ("tangent",):
            size = min(each.rule.together for each in self._attentions)
        for first in range(0, count, size):
            yield range(first, min(first + size, count))

    def backward(
        self,
        passes: Passes,
        way: Retention,
        weights: ParamsAndTangents,
        residuals: Residuals,
        cotangents: Cotangents,
        sums: Sequence[Accumulator],
    ) -> Cotangents:
        """See BlockExecutor: the block's backward legs."""
        plan = self.dual.plan(passes, way)
        legs = [leg for leg in plan.legs if leg.spec.backward]
        if passes.forward == "value":
            env = self._env(weights) | residuals.primal
            alone = [
                legs[0].run(env | _bar(y_bar), self._attentions, adder(sum_, self._names))
                for y_bar, sum_ in zip(cotangents.dots, sums, strict=True)
            ]
            return Cotangents(None, [found.get("x_bar") for found in alone])
        pair = passes.backward == "pair"
        x_bar = residuals.primal.get("x_bar")
        if len(legs) == 2 and not residuals.complete:
            env = self._env(weights) | residuals.primal | _bar(cotangents.primal)
            found = legs[0].run(env, self._attentions)
            residuals.primal |= _only(plan.kept(legs[0]), env | found)
            if "x_bar" in found:
                x_bar = residuals.primal["x_bar"] = found["x_bar"]
        dots: list[Tensor | None] = []
        for probes in self._groups(len(cotangents.dots), legs[-1]):
            envs = []
            for probe in probes:
                env = self._env(weights, probe) | residuals.primal | residuals.tangents[probe]
                y_bar_dot = cotangents.dots[probe]
                env |= _bar(cotangents.primal, y_bar_dot) if pair else _bar(y_bar_dot)
                envs.append(env)
                residuals.tangents[probe] = {}
            adders = [adder(sums[probe], self._names) for probe in probes]
            for found in legs[-1].run_all(envs, self._attentions, adders):
                dots.append(found.get("x_bar_dot" if pair else "x_bar"))
                if pair:
                    x_bar = found.get("x_bar", x_bar)
        return Cotangents(x_bar, dots)


def places(names: Sequence[str], selected: Collection[str]) -> dict[str, str]:
    """The trace's name for each of a block's parameters: `p/PLACE`, or `w/PLACE` for a constant."""
    return {name: f"{'p' if name in selected else 'w'}/{place}" for place, name in enumerate(names)}


def values_at(place_of: Mapping[str, str], p: Params) -> Env:
    """A block's parameters, by the names that its trace has for them."""
    return {place: p[name] for name, place in place_of.items()}


def tangents_at(place_of: Mapping[str, str], v: Params) -> Env:
    """Tangents of a block's selected parameters, by the names that its trace has for them."""
    return {dotted(place): v[name] for name, place in place_of.items() if place.startswith("p/")}


def adder(sums: Accumulator, names: Sequence[str]) -> Callable[[Subprogram, Env], None]:
    """A function that adds a subprogram's derivatives of parameters to their sums.

    Args:
        sums: Sums of the derivatives, by the parameters' names.
        names: Names of the block's parameters; a trace numbers them by their place here.
    """

    def add(subprogram: Subprogram, results: Env) -> None:
        for name, terms in subprogram.terms.items():
            sums.add(names[int(name.partition("/")[2])], terms, results)

    return add


def _only(names: frozenset[str], env: Env) -> Env:
    return {name: env[name] for name in names if name in env}


def _bar(y_bar: Tensor | None, y_bar_dot: Tensor | None = None) -> Env:
    found = {"y_bar": y_bar, "y_bar_dot": y_bar_dot}
    return {name: each.contiguous() for name, each in found.items() if each is not None}


@final
class TracedHead(HeadExecutor):
    """Takes a piece through the last block and the product's rules by their trace.

    Args:
        dual: Subprograms of block and rules, at this shape.
        names: Names of the block's parameters, by place.
        selected: Names of the parameters that the block was traced as a function of.
        constants: Constants of this piece, by name.
    """

    def __init__(
        self, dual: HeadDual, names: Sequence[str], selected: Collection[str], constants: Env
    ):
        self.dual, self._names, self._constants = dual, tuple(names), constants
        self._place_of = places(names, selected)

    @property
    def key(self) -> Hashable:
        """See HeadExecutor."""
        return self.dual.key

    def measure(
        self, weights: ParamsAndTangents, x: Tensor, x_dots: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """See HeadExecutor: the subprograms that measure."""
        shared = len(x_dots) > 1
        subprograms, env = self.dual.measuring(shared), self._primal(weights, x)
        if shared:
            env |= subprograms[0](env)
        return [
            subprograms[-1](env | self._along(weights, probe, x_dot))["measure"]
            for probe, x_dot in enumerate(x_dots)
        ]

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
        """See HeadExecutor: the subprograms that go back, one after the other."""
        passes = self.dual.passes
        wants_primal = wants_primal and passes.backward == "pair"
        shared = len(sums) > 1
        subprograms, env = self.dual.subprograms(shared, wants_primal), self._primal(weights, x)
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
            kept = subprograms[0](env)
            x_bar = kept.get("x_bar")
            env |= kept
        dots: list[Tensor | None] = []
        for along, sum_ in zip(more, sums, strict=True):
            found = self._step(subprograms[-1], env | along, sum_)
            if wants_primal:
                x_bar = found.get("x_bar", x_bar)
            dots.append(found.get(f"x_{self.dual.suffix}"))
        return Cotangents(x_bar, dots)

    def _primal(self, weights: ParamsAndTangents, x: Tensor) -> Env:
        return values_at(self._place_of, weights.p) | self._constants | {"x": x}

    def _along(self, weights: ParamsAndTangents, probe: int, x_dot: Tensor | None) -> Env:
        along = tangents_at(self._place_of, weights.v[probe])
        if x_dot is not None:
            along["x_dot"] = x_dot
        return along

    def _step(self, subprogram: Subprogram, env: Env, sum_: Accumulator) -> Env:
        found = subprogram(env)
        adder(sum_, self._names)(subprogram, found)
        return {name: each for name, each in found.items() if not is_parameters(name)}
