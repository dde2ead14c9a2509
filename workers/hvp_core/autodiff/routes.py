"""Finding the route of every block: traced, cut, compiled and checked, or by torch itself."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hvp_core.attention import choice, seam
from hvp_core.attention.mask import Mask
from hvp_core.autodiff.block_dual import AttentionCall, BlockDual
from hvp_core.autodiff.closing_dual import ClosingDual
from hvp_core.autodiff.compiler import COMPILER
from hvp_core.autodiff.eager import Eager, EagerClosing
from hvp_core.autodiff.executor import Closing, Route
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.programs import trace_block, trace_closing
from hvp_core.autodiff.trace import Env, trace_graph
from hvp_core.autodiff.traced import X_DATA, Traced, TracedClosing
from hvp_core.blame import whose
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import Loss
from hvp_core.model.chain import Body, Chain, function_of
from hvp_core.policy import Policy
from hvp_core.precision import listening

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DUALS_KEPT = 64  # programs, not tensors: a few hundred kilobytes each
_LOOKS_KEPT = 512  # of one chain: tens of kilobytes each, and the blocks of a program share a text


class _Cache:
    """What was made last, by what it is made of."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._found: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._found:
            self._found[key] = make()
            while len(self._found) > self._kept:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        found: T = self._found[key]
        return found


#: Blocks of one program share a dual, whatever chain they are of.
_duals = _Cache(_DUALS_KEPT)
#: All operators of a chain share what a look at its blocks has shown: by law they do not change.
_looks: WeakKeyDictionary[Chain, _Cache] = WeakKeyDictionary()


class _Look(NamedTuple):
    """What one look at a block's forward shows."""

    text: str  # the program; blocks of one text are one block
    calls: tuple[seam.Call, ...]  # of the attention function, on fake tensors; without their masks
    masks: tuple[int | None, ...]  # places of their masks among the block's, or made in the block


_MADE_INSIDE = -1


@final
class Routes:
    """Makes the routes of one operator.

    Args:
        chain: Whose blocks they go through.
        policy: Whether to compile, and with what precision.
    """

    def __init__(self, chain: Chain, policy: Policy):
        self._policy = policy
        self._prepare = COMPILER if policy.compile else None
        self._looks = _looks.setdefault(chain, _Cache(_LOOKS_KEPT))
        #: Blocks that are not cut or not traced, and why.
        self.fallbacks: dict[str, str] = {}
        #: Blocks of whose code something is to be said.
        self.remarks: dict[str, str] = {}

    def of(
        self,
        name: str,
        parameters: Sequence[str],
        bodies: Callable[[bool], Body],
        p: Mapping[str, Tensor],
        x: Tensor,
        is_data: bool,
    ) -> Route:
        """The route of a block, not the last, for one micro-batch.

        Args:
            name: Of the block.
            parameters: Their names.
            bodies: The block; with masks as tensors if called with True.
            p: The block's parameters. Of these and x only shapes matter.
            x: Its input.
            is_data: The input is the first block's, and has no derivative.
        """
        for cut in (True, False):
            try:
                return self._traced(name, parameters, bodies(not cut), p, x, is_data, cut=cut)
            except _UncutError as error:
                self.say(name, f"its attention is taken as plain operations: {error}")
            except Exception as error:
                self._untraced(name, error)
                break
        return Eager(function_of(bodies(True)))

    def _traced(
        self,
        name: str,
        names: Sequence[str],
        body: Body,
        p: Mapping[str, Tensor],
        x: Tensor,
        is_data: bool,
        *,
        cut: bool,
    ) -> Route:
        values = {str(place): p[name] for place, name in enumerate(names)}
        inputs, constants = _inputs(x, is_data, body.constants)
        f = _placed(body, names)
        look = self._look(name, body, f, values, inputs, constants, cut)
        call = _attention(look, body, self._policy) if look.calls and cut else None

        def make() -> BlockDual:
            with listening() as remarks:
                if call is None:
                    trace = trace_block(f, values, inputs, constants)
                else:
                    q, _, v = look.calls[0].qkv
                    shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
                    o = torch.zeros(shape, dtype=v.dtype, device=x.device)
                    trace = trace_block(_cut_open(f), values, {**inputs, "o": o}, constants)
            return BlockDual(trace, of, remarks, self._prepare)

        of = look.text, call is not None
        dual = _duals.get((of, _signature(values | inputs | constants), self._policy.compile), make)
        self.remark(name, dual.remarks)
        return Traced(dual, names, constants, call)

    def _look(
        self,
        name: str,
        body: Body,
        f: Placed,
        p: Env,
        inputs: Env,
        constants: Env,
        cut: bool,
    ) -> _Look:
        """Trace the forward alone, its attentions left out; once for all micro-batches alike."""
        key = (name, _signature(p | inputs | constants), body.settings, cut)
        return self._looks.get(key, lambda: _look(f, p, inputs, constants, body.masks))

    def closing(
        self,
        spec: ProductSpec,
        name: str,
        parameters: Sequence[str],
        body: Body,
        loss: Loss,
        p: Mapping[str, Tensor],
        x: Tensor,
        is_data: bool,
        target: Tensor,
        scale: float,
    ) -> Closing:
        """The route of the last block and a product's rule for one piece of a micro-batch."""
        values = {str(place): p[each] for place, each in enumerate(parameters)}
        inputs, constants = _inputs(x, is_data, body.constants)
        factor = torch.tensor(scale, dtype=_loss_dtype(x, values), device=target.device)
        constants = {**constants, "c/target": target, "c/scale": factor}
        f = _placed(body, parameters)
        try:
            look = self._look(name, body, f, values, inputs, constants, False)
            of = look.text, loss, spec

            def make() -> ClosingDual:
                with listening() as remarks:
                    trace = trace_closing(f, loss, spec, values, inputs, constants)
                return ClosingDual(trace, spec.passes, of, remarks, self._prepare)

            dual = _duals.get(
                (of, _signature(values | inputs | constants), self._policy.compile), make
            )
        except Exception as error:
            self._untraced(name, error)
            return EagerClosing(function_of(body), spec, loss, target, scale)
        self.remark(name, dual.remarks)
        return TracedClosing(dual, parameters, constants)

    def _untraced(self, name: str, error: Exception) -> None:
        """Note that a block cannot be traced, unless that is no property of the block.

        Raises:
            Exception: This one, where it has a reason, or is a lack of memory or a bug of ours.
        """
        if isinstance(error, CurvatureError) or whose(error) != "model":
            raise error
        self.say(name, f"it is differentiated line by line: {_words(error)}")

    def remark(self, name: str, remarks: AbstractSet[str]) -> None:
        """Note what is to be said of a block's code."""
        if remarks:
            self.remarks[name] = "; ".join(sorted(remarks))

    def say(self, name: str, why: str) -> None:
        """Note why a block is slower than it could be; the first time, warn."""
        if name not in self.fallbacks:
            if not self.fallbacks:
                logger.warning("block %s is slower than it could be: %s", name, why)
            self.fallbacks[name] = why


class _UncutError(Exception):
    """A block that has an attention, and not one that can be cut out."""


def _loss_dtype(x: Tensor, values: Mapping[str, Tensor]) -> torch.dtype:
    """The precision of the loss: that of the block, at least float32."""
    dtypes = [each.dtype for each in (x, *values.values()) if each.is_floating_point()]
    return torch.promote_types(dtypes[0], torch.float32) if dtypes else torch.float32


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _inputs(x: Tensor, is_data: bool, constants: Env) -> tuple[Env, Env]:
    """What has a tangent, and what has none."""
    if not is_data:
        return {"x": x}, dict(constants)
    return {}, {**constants, X_DATA: x}


Placed = Callable[[Env, Env, Env], Env]


def _placed(body: Body, names: Sequence[str]) -> Placed:
    """The block with its parameters named by their place, as all blocks of its kind name them."""

    def f(p: Env, inputs: Env, constants: Env) -> Env:
        given = {name: p[str(place)] for place, name in enumerate(names)}
        held = {name: each for name, each in constants.items() if name in body.constants}
        x = inputs["x"] if "x" in inputs else constants[X_DATA]
        return {"y": body.run(given, x, held)}

    return f


def _cut_open(f: Placed) -> Placed:
    """The block with its attention's output as an input."""

    def g(p: Env, inputs: Env, constants: Env) -> Env:
        with seam.cut(inputs["o"]) as found:
            y = f(p, inputs, constants)
        q, k, v = found.calls[0].qkv
        return {"q": q, "k": k, "v": v, **y}

    return g


def _look(f: Placed, p: Env, inputs: Env, constants: Env, masks: Sequence[Mask]) -> _Look:
    """Trace the forward with zeros for what its attentions return, and all that they are given."""
    calls: list[seam.Call] = []
    arguments = {f"p/{name}": each for name, each in p.items()} | inputs | constants

    def program(env: Env) -> Env:
        at = ({name: env[f"p/{name}"] for name in p}, {name: env[name] for name in inputs})
        with seam.cut(None) as found:
            y = f(*at, {name: env[name] for name in constants})
        calls[:] = found.calls
        for place, call in enumerate(calls):
            y |= {f"{name}/{place}": each for name, each in call.qkv._asdict().items()}
            if isinstance(call.mask, Tensor):
                y[f"mask/{place}"] = call.mask
        return y

    graph, _ = trace_graph(program, arguments)
    places = {id(mask): place for place, mask in enumerate(masks)}
    text = str(graph) + "".join(f"{each.scale!r} {each.softcap!r} {each.causal}" for each in calls)
    return _Look(
        sys.intern(text),
        tuple(replace(each, mask=None) for each in calls),
        tuple(
            None if each.mask is None else places.get(id(each.mask), _MADE_INSIDE) for each in calls
        ),
    )


def _attention(look: _Look, body: Body, policy: Policy) -> AttentionCall:
    """How a block's attention is computed.

    Raises:
        _UncutError: It is called more than once, or has an irregular mask.
    """
    if len(look.calls) != 1:
        raise _UncutError(f"it is called {len(look.calls)} times in a block")
    call, place = look.calls[0], look.masks[0]
    if place == _MADE_INSIDE:
        raise _UncutError("its mask is made inside the layer")
    shape = call.shape(None if place is None else body.masks[place])
    if shape is None:
        raise _UncutError("its mask is irregular")
    pattern, span = shape
    return AttentionCall(choice.choose(call.qkv, pattern, span, policy.precision), pattern, span)


def _signature(values: Mapping[str, Tensor]) -> Hashable:
    return tuple(
        (name, tuple(each.shape), each.dtype, each.stride(), each.device)
        for name, each in values.items()
    )
