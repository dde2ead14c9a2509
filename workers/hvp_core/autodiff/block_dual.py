"""One block's products under each retention: which phases run when, and what is kept between them.

A product's passes take a block through *legs*: forward and backward, each for the primal half, the
tangent half, or both at once. Between the subprograms of a leg the block's attentions are called.

    tangent, pair        fast      forward both │ backward both
                         lean      forward both ┆ again both, backward both
                         shared    forward primal, tangent │ backward primal, tangent
    tangent, cotangent   fast      forward both │ backward primal, of the cotangent H_out J v, say
    value, cotangent     fast      forward primal │ backward primal

Values that cross │ are kept. Of those that cross ┆ only the block's input and its attentions'
outputs are. In `shared`, primal legs run once for any number of tangents: those of several probes,
whose attention is computed together, and, if the primal half is kept, those of several products.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from hvp_core.attention.rule import Attention, Output, Pattern, Point, Qkv, Span
from hvp_core.autodiff.passes import Passes, Retention
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.subprograms import Group, Subprogram, partition
from hvp_core.autodiff.trace import Phase, Trace, dotted, phases

Half = Literal["primal", "tangent"]
Collect = Callable[[Subprogram, Env], None]

_QKV = ("q", "k", "v")
_OUTPUT = ("o", "lse")


@final
@dataclass(frozen=True)
class LegSpec:
    """A leg before it is cut into subprograms."""

    backward: bool
    halves: tuple[Half, ...]
    parameters: str = ""  # `p_bar`, `p_bar_dot`, or none
    again: bool = False  # a backward leg that first does the forward leg's work again


_BOTH: tuple[Half, ...] = ("primal", "tangent")


def _legs(passes: Passes, way: Retention) -> list[list[LegSpec]]:
    """The legs of a product, in runs: no residuals are kept from one run for the next."""
    primal, tangent = LegSpec(False, ("primal",)), LegSpec(False, ("tangent",))
    if passes.forward == "value":
        forward = [primal]
    else:
        forward = [primal, tangent] if way == "shared" else [LegSpec(False, _BOTH)]
    if passes.backward == "none":
        return [forward]
    if way == "shared" and passes.backward == "pair":
        return [[*forward, LegSpec(True, ("primal",)), LegSpec(True, ("tangent",), "p_bar_dot")]]
    again = way == "lean"
    backward = (
        LegSpec(True, _BOTH, "p_bar_dot", again)
        if passes.backward == "pair"
        else LegSpec(True, ("primal",), "p_bar", again)
    )
    return [forward, [backward]] if again else [[*forward, backward]]


@final
@dataclass(frozen=True)
class AttentionCall:
    """How one of a block's attentions is computed."""

    place: int  # among the attentions of the block, in the order of their calls
    rule: Attention
    pattern: Pattern
    span: Span | None

    def forward(self, envs: Sequence[Env], halves: tuple[Half, ...]) -> list[Env]:
        """The output o and the log-sum-exps, or their tangents, from q, k, v.

        Args:
            envs: Values by name: one mapping, or for tangents alone one for each probe.
            halves: The halves to compute.
        """
        if halves == ("tangent",):
            at = Output(_heads_first(self._of(envs[0], "o")), self._of(envs[0], "lse"))
            x_dots = [self._qkv(env, "_dot") for env in envs]
            found = self.rule.tangents(self._qkv(envs[0]), x_dots, at, self.pattern, self.span)
            return [self._output(each, "_dot") for each in found]
        (env,) = envs
        x = self._qkv(env)
        if halves == ("primal",):
            return [self._output(self.rule.forward(x, self.pattern, self.span), "")]
        y, y_dot = self.rule.dual(x, self._qkv(env, "_dot"), self.pattern, self.span)
        return [self._output(y, "") | self._output(y_dot, "_dot")]

    def backward(self, envs: Sequence[Env], halves: tuple[Half, ...]) -> list[Env]:
        """Cotangents of q, k, v, or their tangents, from the cotangent of o.

        Args:
            envs: Values by name: one mapping, or for tangents alone one for each probe.
            halves: The halves to compute.
        """
        at = self._point(envs[0])
        if halves == ("tangent",):
            dots = [self._point(env, "_dot") for env in envs]
            found = self.rule.backward_tangents(at, dots, self.pattern, self.span)
            return [self._bars(each, "_dot") for each in found]
        (env,) = envs
        if halves == ("primal",):
            return [self._bars(self.rule.backward(at, self.pattern, self.span), "")]
        at_dot = self._point(env, "_dot")
        cotangents, bars_dot = self.rule.backward_dual(at, at_dot, self.pattern, self.span)
        return [self._bars(cotangents, "") | self._bars(bars_dot, "_dot")]

    def _of(self, env: Env, name: str) -> Tensor:
        return env[f"{name}/{self.place}"]

    def _point(self, env: Env, suffix: str = "") -> Point:
        o, lse, o_bar = (self._of(env, name + suffix) for name in ("o", "lse", "o_bar"))
        return Point(self._qkv(env, suffix), Output(_heads_first(o), lse), _heads_first(o_bar))

    def _qkv(self, env: Env, suffix: str = "") -> Qkv:
        return Qkv(*[self._of(env, name + suffix) for name in _QKV])

    def _output(self, y: Output, suffix: str) -> Env:
        names = f"o{suffix}/{self.place}", f"lse{suffix}/{self.place}"
        return dict(zip(names, (_heads_first(y.o), y.lse), strict=True))

    def _bars(self, x: Qkv, suffix: str) -> Env:
        return {
            f"{name}_bar{suffix}/{self.place}": each for name, each in zip(_QKV, x, strict=True)
        }


def _heads_first(o: Tensor) -> Tensor:
    return o.transpose(1, 2)


@final
@dataclass(frozen=True)
class Between:
    """An attention between two subprograms of a leg.

    Attributes:
        place: Place of the attention among the block's, in the order of their calls.
        halves: The halves of the leg in which the attention is computed.
    """

    place: int
    halves: tuple[Half, ...]

    def needs(self, backward: bool) -> set[str]:
        """Names of the values that the attention reads."""
        names = {*_QKV}
        if backward:
            names |= {*_OUTPUT, "o_bar"}
        if "tangent" in self.halves:
            names |= {f"{name}_dot" for name in names}
        if self.halves == ("tangent",):
            names |= {*_OUTPUT}
        return {f"{name}/{self.place}" for name in names}

    def makes(self, backward: bool) -> set[str]:
        """Names of the values that the attention gives."""
        names = [f"{name}_bar" for name in _QKV] if backward else list(_OUTPUT)
        return _of_halves(self.halves, [f"{name}/{self.place}" for name in names])

    def before(self, backward: bool) -> set[str]:
        """Names of the values that the subprogram before the attention hands to it."""
        names = ("o_bar",) if backward else _QKV
        return _of_halves(self.halves, [f"{name}/{self.place}" for name in names])


def _of_halves(halves: tuple[Half, ...], names: Iterable[str]) -> set[str]:
    """Values, tangents or both of these names."""
    return {dotted(name) if half == "tangent" else name for half in halves for name in names}


@final
@dataclass(frozen=True)
class Leg:
    """A leg, ready to run."""

    spec: LegSpec
    between: tuple[Between, ...]  # the attentions between its subprograms
    subprograms: tuple[Subprogram, ...]
    needs: frozenset[str]  # what it reads of earlier legs, parameters and constants aside

    def run(
        self, env: Env, attentions: Sequence[AttentionCall], collect: Collect | None = None
    ) -> Env:
        """Run the leg: all values that it computes, by name.

        Args:
            env: All values that the leg needs, by name.
            attentions: The attentions that the block is cut at.
            collect: Takes derivatives of parameters out of a subprogram's results.
        """
        return self.run_all([env], attentions, [collect])[0]

    def run_all(
        self,
        envs: Sequence[Env],
        attentions: Sequence[AttentionCall],
        collects: Sequence[Collect | None],
    ) -> list[Env]:
        """Run the leg for several probes: as `run` for each, but an attention takes all at once.

        Args:
            envs: All values that the leg needs, for each probe.
            attentions: The attentions that the block is cut at.
            collects: For each probe what takes derivatives of parameters out of results.
        """
        found: list[Env] = [{} for _ in envs]
        for index, subprogram in enumerate(self.subprograms):
            if index:
                between = self.between[index - 1]
                attention = attentions[between.place]
                step = attention.backward if self.spec.backward else attention.forward
                known = [{**env, **results} for env, results in zip(envs, found, strict=True)]
                for results, made in zip(found, step(known, between.halves), strict=True):
                    results |= made
            for env, results, collect in zip(envs, found, collects, strict=True):
                results |= _run_part(subprogram, {**env, **results}, collect)
        return found


def _run_part(subprogram: Subprogram, env: Env, collect: Collect | None) -> Env:
    """A subprogram's results, without the operands of parameters' derivatives."""
    results = subprogram(env)
    if not subprogram.terms:
        return results
    assert collect is not None
    collect(subprogram, results)
    operands = {
        name for terms in subprogram.terms.values() for term in terms for name in term.operands
    }
    return {name: each for name, each in results.items() if name not in operands}


@final
@dataclass(frozen=True)
class Plan:
    """The legs of one product through one block."""

    legs: tuple[Leg, ...]

    def leg(self, *, backward: bool, half: Half) -> Leg:
        """The leg, forward or backward, that computes this half."""
        return next(
            leg for leg in self.legs if leg.spec.backward == backward and half in leg.spec.halves
        )

    def kept(self, after: Leg) -> frozenset[str]:
        """Names of the values that later legs need, of all that are known after this leg."""
        later = self.legs[self.legs.index(after) + 1 :]
        return frozenset().union(*[leg.needs for leg in later])


@final
class BlockDual:
    """The derivatives of one kind of block at one shape.

    Args:
        trace: Trace of the block. One that takes `o/0` and so on is cut at its attentions.
        key: What the trace was made from: the block's program.
        remarks: Remarks on the block's code.
        prepare: Called once with each new subprogram; may replace how it runs.
    """

    def __init__(
        self,
        trace: Trace,
        key: Hashable,
        remarks: AbstractSet[str] = frozenset(),
        prepare: Callable[[Subprogram], None] | None = None,
    ):
        self._trace = trace
        self.remarks = frozenset(remarks)
        self.key = key
        calls = range(trace.num_calls)
        #: For each attention that the block is cut at, whether its output has a tangent.
        self._moves = [f"o_dot/{place}" in trace.arguments for place in calls]
        self._prepare = prepare
        self._plans: dict[tuple[Passes, Retention], Plan] = {}

    @property
    def output(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of y."""
        value = self._trace.outputs["y"].meta["val"]
        return value.shape, value.dtype

    def plan(self, passes: Passes, way: Retention) -> Plan:
        """The legs of the products of these passes."""
        if (passes, way) not in self._plans:
            legs: list[Leg] = []
            for run in _legs(passes, way):
                between = [self._between(spec) for spec in run]
                groups = [self._groups(*each) for each in zip(run, between, strict=True)]
                subprograms = partition(self._trace, [each for some in groups for each in some])
                for spec, calls, some in zip(run, between, groups, strict=True):
                    mine, subprograms = tuple(subprograms[: len(some)]), subprograms[len(some) :]
                    for subprogram in mine:
                        if self._prepare is not None:
                            self._prepare(subprogram)
                    legs.append(Leg(spec, calls, mine, self._needs(spec.backward, calls, mine)))
            self._plans[passes, way] = Plan(tuple(legs))
        return self._plans[passes, way]

    def _between(self, spec: LegSpec) -> tuple[Between, ...]:
        """The attentions of a leg in the order in which it calls them.

        An attention may read nothing that has a tangent: then only its value is computed, and
        nothing goes back through it.
        """
        found = []
        for place, moves in enumerate(self._moves):
            still = () if spec.backward or "primal" not in spec.halves else ("primal",)
            halves: tuple[Half, ...] = spec.halves if moves else still  # type: ignore[assignment]
            if halves:
                found.append(Between(place, halves))
        return tuple(reversed(found) if spec.backward else found)

    def _groups(self, spec: LegSpec, between: tuple[Between, ...]) -> list[Group]:
        """The subprograms of a leg: up to each attention that it calls, and behind the last."""
        count = len(self._moves) + 1  # of phases each way
        first = count if spec.backward else 0
        start = 0 if spec.again else first
        # An attention's phase ends the subprogram before it.
        ends = [2 * count - 2 - each.place if spec.backward else each.place for each in between]
        names = [name for name in self._trace.terms if name.partition("/")[0] == spec.parameters]
        groups = []
        for index, end in enumerate([*ends, first + count - 1]):
            if index < len(between):
                outputs = between[index].before(spec.backward)
            else:
                outputs = _of_halves(spec.halves, ["x_bar" if spec.backward else "y"])
            if spec.again and index == 0:
                for each in between:
                    outputs |= each.before(backward=False)
            mine = [name for name in names if self._trace.time_of(name) <= end]
            names = [name for name in names if name not in mine]
            groups.append(self._group(range(start, end + 1), sorted(outputs), spec, mine))
            start = end + 1
        return groups

    def _group(
        self, times: Iterable[int], outputs: Iterable[str], spec: LegSpec, parameters: Sequence[str]
    ) -> Group:
        """Phases of a leg, with the outputs and the parameters' derivatives wanted of them."""
        # Constants have no tangent, yet a tangent leg may compute with what is made of them alone.
        every = [phases(times, dotted=half == "tangent") for half in spec.halves]
        return Group(
            frozenset[Phase]().union(*every),
            (*[name for name in outputs if name in self._trace.outputs], *parameters),
        )

    def _needs(
        self, backward: bool, between: tuple[Between, ...], subprograms: Sequence[Subprogram]
    ) -> frozenset[str]:
        """Names of the values that a leg reads of earlier ones, parameters and constants aside."""
        made: set[str] = set()
        needs: set[str] = set()
        for index, subprogram in enumerate(subprograms):
            if index:
                needs |= between[index - 1].needs(backward) - made
                made |= between[index - 1].makes(backward)
            needs |= set(subprogram.inputs) - made
            made |= set(subprogram.outputs)
        return frozenset(
            name for name in needs if not name.startswith(("p/", "p_dot/", "w/", "c/"))
        )

    def kept_bytes(self, passes: Passes, way: Retention) -> int:
        """Bytes that are kept between the forward and the backward legs of one product."""
        plan = self.plan(passes, way)
        forward = [leg for leg in plan.legs if not leg.spec.backward]
        return self._bytes(plan, plan.kept(forward[-1]))

    def shared_bytes(self, passes: Passes) -> int:
        """Bytes that a shared plan keeps from one product to the next."""
        plan = self.plan(passes, "shared")
        names = frozenset[str]().union(*[leg.needs for leg in plan.legs])
        return self._bytes(plan, frozenset(name for name in names if not self.is_tangent(name)))

    def is_tangent(self, name: str) -> bool:
        """Whether a value, by its name, changes from product to product."""
        if name.startswith("r/"):
            return self._trace.is_dotted(name.removeprefix("r/"))
        return name.partition("/")[0].endswith("_dot")

    def _bytes(self, plan: Plan, names: frozenset[str]) -> int:
        sizes = dict(self._trace.argument_bytes)
        for leg in plan.legs:
            for subprogram in leg.subprograms:
                sizes |= subprogram.bytes_of
        return sum(sizes.get(name, 0) for name in names)
