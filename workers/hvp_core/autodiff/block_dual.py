"""One block's products, by schedule: which stages run when, and what is kept between.

A product's passes take a block through *legs*: forward and backward, each for the primal half, the
tangent half, or both at once. Between the two parts of a leg the attention is called.

    tangent, pair        fast      forward both │ backward both
                         lean      forward both ┆ again both, backward both
                         shared    forward primal, tangent │ backward primal, tangent
    tangent, cotangent   fast      forward both │ backward primal, of the cotangent H_out J v, say
    value, cotangent     fast      forward primal │ backward primal

What crosses │ is kept; what crosses ┆ is not, but for the block's input and its attention's
output. In `shared`, primal legs run once for any number of tangents: of several probes, whose
attention is computed together, and, kept, of several products.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from hvp_core.attention.rule import Attention, Output, Pattern, Point, Qkv, Span
from hvp_core.autodiff.parts import Group, Part, split
from hvp_core.autodiff.passes import Passes, Way
from hvp_core.autodiff.trace import Env, Stage, Trace

Half = Literal["primal", "tangent"]
Collect = Callable[[Part, Env], None]

_QKV = ("q", "k", "v")
_OUTPUT = ("o", "lse")


@final
@dataclass(frozen=True)
class LegSpec:
    """A leg before it is traced out into parts."""

    backward: bool
    halves: tuple[Half, ...]
    parameters: str = ""  # `p_bar`, `p_bar_dot`, or none
    again: bool = False  # a backward leg that first does the forward leg's work again


_BOTH: tuple[Half, ...] = ("primal", "tangent")


def _legs(passes: Passes, way: Way) -> list[list[LegSpec]]:
    """The legs of a product, in runs: nothing is kept from one run for the next."""
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
    """How a block's attention is computed."""

    rule: Attention
    pattern: Pattern
    span: Span | None

    def forward(self, envs: Sequence[Env], halves: tuple[Half, ...]) -> list[Env]:
        """O, L or their tangents from q, k, v; tangents of several probes at once."""
        if halves == ("tangent",):
            at = Output(_heads_first(envs[0]["o"]), envs[0]["lse"])
            x_dots = [_qkv(env, "_dot") for env in envs]
            found = self.rule.tangents(_qkv(envs[0]), x_dots, at, self.pattern, self.span)
            return [_output(each, "_dot") for each in found]
        (env,) = envs
        x = _qkv(env)
        if halves == ("primal",):
            return [_output(self.rule.forward(x, self.pattern, self.span), "")]
        y, y_dot = self.rule.dual(x, _qkv(env, "_dot"), self.pattern, self.span)
        return [_output(y, "") | _output(y_dot, "_dot")]

    def backward(self, envs: Sequence[Env], halves: tuple[Half, ...]) -> list[Env]:
        """Cotangents of q, k, v or their tangents from that of O; tangents of several at once."""
        at = _point(envs[0])
        if halves == ("tangent",):
            dots = [_point(env, "_dot") for env in envs]
            found = self.rule.backward_tangents(at, dots, self.pattern, self.span)
            return [_bars(each, "_dot") for each in found]
        (env,) = envs
        if halves == ("primal",):
            return [_bars(self.rule.backward(at, self.pattern, self.span), "")]
        bars, bars_dot = self.rule.backward_dual(at, _point(env, "_dot"), self.pattern, self.span)
        return [_bars(bars, "") | _bars(bars_dot, "_dot")]


def _heads_first(o: Tensor) -> Tensor:
    return o.transpose(1, 2)


def _point(env: Env, suffix: str = "") -> Point:
    o, lse, o_bar = (env[name + suffix] for name in ("o", "lse", "o_bar"))
    return Point(_qkv(env, suffix), Output(_heads_first(o), lse), _heads_first(o_bar))


def _qkv(env: Env, suffix: str = "") -> Qkv:
    return Qkv(*[env[name + suffix] for name in _QKV])


def _output(y: Output, suffix: str) -> Env:
    return {f"o{suffix}": _heads_first(y.o), f"lse{suffix}": y.lse}


def _bars(x: Qkv, suffix: str) -> Env:
    return {f"{name}_bar{suffix}": each for name, each in zip(_QKV, x, strict=True)}


@final
@dataclass(frozen=True)
class Leg:
    """A leg, ready to run."""

    spec: LegSpec
    parts: tuple[Part, ...]
    needs: frozenset[str]  # what it reads of earlier legs, parameters and constants aside

    def run(self, env: Env, attention: AttentionCall | None, collect: Collect | None = None) -> Env:
        """Everything it computes, by name.

        Args:
            env: Everything it needs.
            attention: What lies between its two parts, if it has two.
            collect: Takes derivatives of parameters out of a part's results.
        """
        return self.run_all([env], attention, [collect])[0]

    def run_all(
        self,
        envs: Sequence[Env],
        attention: AttentionCall | None,
        collects: Sequence[Collect | None],
    ) -> list[Env]:
        """The tangents of several probes: as `run` of each, but the attention does all at once."""
        found: list[Env] = [{} for _ in envs]
        for index, part in enumerate(self.parts):
            if index:
                assert attention is not None
                step = attention.backward if self.spec.backward else attention.forward
                known = [{**env, **results} for env, results in zip(envs, found, strict=True)]
                for results, made in zip(found, step(known, self.spec.halves), strict=True):
                    results |= made
            for env, results, collect in zip(envs, found, collects, strict=True):
                results |= _run_part(part, {**env, **results}, collect)
        return found


def _run_part(part: Part, env: Env, collect: Collect | None) -> Env:
    """Its results, without those that only parameters' derivatives are made of."""
    results = part(env)
    if not part.terms:
        return results
    assert collect is not None
    collect(part, results)
    operands = {name for terms in part.terms.values() for term in terms for name in term.operands}
    return {name: each for name, each in results.items() if name not in operands}


@final
@dataclass(frozen=True)
class Plan:
    """The legs of one product through one block."""

    legs: tuple[Leg, ...]

    def leg(self, *, backward: bool, half: Half) -> Leg:
        """The leg that does this half of this way."""
        return next(
            leg for leg in self.legs if leg.spec.backward == backward and half in leg.spec.halves
        )

    def kept(self, after: Leg) -> frozenset[str]:
        """What later legs need of everything up to and including this one."""
        later = self.legs[self.legs.index(after) + 1 :]
        return frozenset().union(*[leg.needs for leg in later])


@final
class BlockDual:
    """The derivatives of one kind of block at one shape.

    Args:
        trace: Of the block; one that takes `o` is cut at its attention.
        key: What it was traced from: the block's program.
        remarks: What is to be said of the block's code.
        prepare: Called once with each new part; may replace how it runs.
    """

    def __init__(
        self,
        trace: Trace,
        key: Hashable,
        remarks: AbstractSet[str] = frozenset(),
        prepare: Callable[[Part], None] | None = None,
    ):
        self._trace = trace
        self.remarks = frozenset(remarks)
        self.key = key
        self.is_cut = "o" in trace.arguments
        self._prepare = prepare
        self._plans: dict[tuple[Passes, Way], Plan] = {}

    @property
    def output(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of y."""
        value = self._trace.outputs["y"].meta["val"]
        return value.shape, value.dtype

    def plan(self, passes: Passes, way: Way) -> Plan:
        """The legs of the products of these passes."""
        if (passes, way) not in self._plans:
            legs: list[Leg] = []
            for run in _legs(passes, way):
                groups = [self._groups(spec) for spec in run]
                parts = split(self._trace, [each for pair in groups for each in pair])
                for spec, pair in zip(run, groups, strict=True):
                    mine, parts = tuple(parts[: len(pair)]), parts[len(pair) :]
                    for part in mine:
                        if self._prepare is not None:
                            self._prepare(part)
                    legs.append(Leg(spec, mine, self._needs(spec, mine)))
            self._plans[passes, way] = Plan(tuple(legs))
        return self._plans[passes, way]

    def _groups(self, spec: LegSpec) -> list[Group]:
        """The parts of a leg: before and behind the attention, or one."""
        first, second = (2, 3) if spec.backward else (0, 1)
        before = {0, 1, 2} if spec.again else {first}
        last = ("x_bar",) if spec.backward else ("y",)
        middle: tuple[str, ...] = ("o_bar",) if spec.backward else _QKV
        if spec.again:
            middle += _QKV
        names = [name for name in self._trace.terms if name.partition("/")[0] == spec.parameters]
        if not self.is_cut:
            return [self._group(before | {second}, last, spec, names)]
        early = [name for name in names if self._trace.time_of(name) < second]
        late = [name for name in names if name not in early]
        return [
            self._group(before, middle, spec, early),
            self._group({second}, last, spec, late),
        ]

    def _group(
        self, times: set[int], outputs: Iterable[str], spec: LegSpec, parameters: Sequence[str]
    ) -> Group:
        dots = [half == "tangent" for half in spec.halves]
        names = [f"{name}_dot" if dot else name for name in outputs for dot in dots]
        # Constants have no tangent, yet a tangent leg may compute with what is made of them alone.
        return Group(
            frozenset(Stage(time, dot) for time in times for dot in dots),
            (*[name for name in names if name in self._trace.outputs], *parameters),
        )

    def _needs(self, spec: LegSpec, parts: Sequence[Part]) -> frozenset[str]:
        made: set[str] = set()
        needs: set[str] = set()
        for index, part in enumerate(parts):
            if index:
                needs |= self._attention_needs(spec) - made
                made |= self._attention_makes(spec)
            needs |= set(part.inputs) - made
            made |= set(part.outputs)
        return frozenset(name for name in needs if not name.startswith(("p/", "p_dot/", "c/")))

    def _attention_needs(self, spec: LegSpec) -> set[str]:
        names = {*_QKV}
        if spec.backward:
            names |= {*_OUTPUT, "o_bar"}
        if "tangent" in spec.halves:
            names |= {f"{name}_dot" for name in names}
        if spec.halves == ("tangent",):
            names |= {*_OUTPUT}
        return names

    def _attention_makes(self, spec: LegSpec) -> set[str]:
        names = [f"{name}_bar" for name in _QKV] if spec.backward else list(_OUTPUT)
        return {
            f"{name}_dot" if half == "tangent" else name for half in spec.halves for name in names
        }

    def kept_bytes(self, passes: Passes, way: Way) -> int:
        """Memory between the forward and the backward legs of one product."""
        plan = self.plan(passes, way)
        forward = [leg for leg in plan.legs if not leg.spec.backward]
        return self._bytes(plan, plan.kept(forward[-1]))

    def shared_bytes(self, passes: Passes) -> int:
        """Memory that a shared plan keeps from one product to the next."""
        plan = self.plan(passes, "shared")
        names = frozenset[str]().union(*[leg.needs for leg in plan.legs])
        return self._bytes(plan, frozenset(name for name in names if not self.is_tangent(name)))

    def is_tangent(self, name: str) -> bool:
        """Whether a value changes from product to product."""
        if name.startswith("r/"):
            return self._trace.is_dotted(name.removeprefix("r/"))
        return name.partition("/")[0].endswith("_dot")

    def _bytes(self, plan: Plan, names: frozenset[str]) -> int:
        sizes = dict(self._trace.argument_bytes)
        for leg in plan.legs:
            for part in leg.parts:
                sizes |= part.bytes_of
        return sum(sizes.get(name, 0) for name in names)
