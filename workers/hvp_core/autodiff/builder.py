"""Finding the executor of every block: traced, cut, compiled and checked, or by torch itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hvp_core.attention import choice, seam
from hvp_core.autodiff.block_dual import AttentionCall, BlockDual
from hvp_core.autodiff.cache import Cache
from hvp_core.autodiff.compiler import COMPILER
from hvp_core.autodiff.eager import EagerExecutor, EagerHead
from hvp_core.autodiff.executor import BlockExecutor, HeadExecutor
from hvp_core.autodiff.head_dual import HeadDual
from hvp_core.autodiff.looks import MADE_INSIDE, Look, Looks, Placed, asked, signature
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.programs import trace_block, trace_head, trace_value
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.selected_parameters import Link
from hvp_core.autodiff.traced import TracedExecutor, TracedHead, places
from hvp_core.blame import whose
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import Loss
from hvp_core.model.chain import Body, Chain, function_of
from hvp_core.precision import listening
from hvp_core.settings import ComputeSettings

logger = logging.getLogger(__name__)

_DUALS_KEPT = 64  # programs, not tensors: a few hundred kilobytes each

#: Blocks of one program share a dual, whatever chain they are of.
_duals: Cache[Any] = Cache(_DUALS_KEPT)
#: All operators of a chain share what a look at its blocks has shown.
_looks: WeakKeyDictionary[Chain, Looks] = WeakKeyDictionary()


@final
class ExecutorBuilder:
    """Makes the executors of one operator.

    Args:
        chain: The model.
        settings: Whether subprograms are compiled, and the precision of matrix products.
    """

    def __init__(self, chain: Chain, settings: ComputeSettings):
        self._settings = settings
        #: What programs and their kernels depend on, of the settings.
        self._kind = settings.compile, settings.deterministic
        self._prepare = COMPILER if settings.compile else None
        self._looks = _looks.setdefault(chain.origin, Looks())
        #: For each block that is not cut or not traced, why.
        self.fallbacks: dict[str, str] = {}
        #: For each block whose code calls for a remark, the remark.
        self.remarks: dict[str, str] = {}

    def of(
        self,
        link: Link,
        bodies: Callable[[bool], Body],
        p: Mapping[str, Tensor],
        x: Tensor,
    ) -> BlockExecutor:
        """The executor of a block, not the last, for one micro-batch.

        Args:
            link: The block in its place.
            bodies: Gives the block's body; with masks as tensors if called with True.
            p: The block's parameters. Of these and x only shapes, dtypes and devices matter.
            x: The block's input.
        """
        for cut in (True, False) if self._settings.trace else ():
            try:
                return self._traced(link, bodies(not cut), p, x, cut=cut)
            except _UncutError as error:
                self.record_fallback(
                    link.name, f"its attention is taken as plain operations: {error}"
                )
            except Exception as error:
                self._untraced(link.name, error)
                break
        return EagerExecutor(function_of(bodies(True)), link.selected)

    def _traced(
        self,
        link: Link,
        body: Body,
        p: Mapping[str, Tensor],
        x: Tensor,
        *,
        cut: bool,
    ) -> BlockExecutor:
        values, inputs, constants = _inputs(link, p, x, body.constants)
        f = _placed(body, link.parameters)
        look = self._looks.at(
            link.name, (body.settings, cut, self._kind), f, values, inputs, constants, body.masks
        )
        attentions = _attentions(look, body, self._settings) if cut else []

        def make() -> BlockDual:
            with listening() as remarks:
                g, at, still = f, dict(inputs), dict(constants)
                if attentions:  # a block that is not cut has calls too
                    g = _cut_open(f, len(attentions))
                    for call, moves, each in zip(look.calls, look.moves, attentions, strict=True):
                        (at if moves else still)[f"o/{each.place}"] = _output(call, x.device)
                trace = trace_block(g, values, at, still) if link.moves else trace_value(g, still)
            return BlockDual(trace, of, remarks, self._prepare)

        of = look.text, len(attentions), link.takes_data
        dual = _duals.get((of, signature(values | inputs | constants), self._kind), make)
        self.remark(link.name, dual.remarks)
        return TracedExecutor(dual, link.parameters, link.selected, body.constants, attentions)

    def head(
        self,
        spec: ProductSpec,
        link: Link,
        body: Body,
        loss: Loss,
        p: Mapping[str, Tensor],
        x: Tensor,
        target: Tensor,
        scale: float,
    ) -> HeadExecutor:
        """The executor of the last block and a product's rule, for one piece of a micro-batch.

        Args:
            spec: The product.
            link: The last block in its place.
            body: The block's body.
            loss: The loss at the end of the chain.
            p: The block's parameters. Of these and x only shapes, dtypes and devices matter.
            x: Input of the piece.
            target: Targets of the piece.
            scale: Factor of the cotangents.
        """
        values, inputs, constants = _inputs(link, p, x, body.constants)
        factor = torch.tensor(scale, dtype=_loss_dtype(x, p), device=target.device)
        own = {"c/target": target, "c/scale": factor}
        constants |= own
        f = _placed(body, link.parameters)
        try:
            look = self._looks.at(
                link.name,
                (body.settings, False, self._kind),
                f,
                values,
                inputs,
                constants,
                body.masks,
            )
            of = look.text, loss, spec.program, link.takes_data

            def make() -> HeadDual:
                with listening() as remarks:
                    trace = trace_head(f, loss, spec, values, inputs, constants)
                return HeadDual(trace, spec.passes, of, remarks, self._prepare)

            dual = _duals.get((of, signature(values | inputs | constants), self._kind), make)
        except Exception as error:
            self._untraced(link.name, error)
            return EagerHead(function_of(body), link.selected, spec, loss, target, scale)
        self.remark(link.name, dual.remarks)
        return TracedHead(dual, link.parameters, link.selected, body.constants | own)

    def _untraced(self, name: str, error: Exception) -> None:
        """Note that a block cannot be traced, unless that is no property of the block.

        Raises:
            Exception: The error itself, where it has a reason, or is a lack of memory or a bug of
                this library.
        """
        if isinstance(error, CurvatureError) or whose(error) != "model":
            raise error
        self.record_fallback(name, f"it is differentiated line by line: {_words(error)}")

    def remark(self, name: str, remarks: AbstractSet[str]) -> None:
        """Note remarks on a block's code."""
        if remarks:
            self.remarks[name] = "; ".join(sorted(remarks))

    def record_fallback(self, name: str, why: str) -> None:
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


def _inputs(link: Link, p: Mapping[str, Tensor], x: Tensor, own: Env) -> tuple[Env, Env, Env]:
    """What a block is a function of: (parameters by place, inputs); and its constants."""
    values, constants = {}, dict(own)
    for name, place in places(link.parameters, link.selected).items():
        if place.startswith("p/"):
            values[place.removeprefix("p/")] = p[name]
        else:
            constants[place] = p[name]
    if not link.takes_data:
        return values, {"x": x}, constants
    return values, {}, {**constants, "x": x}


def _placed(body: Body, names: Sequence[str]) -> Placed:
    """The block with its parameters named by their place, as all blocks of its kind name them."""

    def f(p: Env, inputs: Env, constants: Env) -> Env:
        given = {
            name: p[str(place)] if str(place) in p else constants[f"w/{place}"]
            for place, name in enumerate(names)
        }
        held = {name: each for name, each in constants.items() if name in body.constants}
        x = inputs["x"] if "x" in inputs else constants["x"]
        return {"y": body.run(given, x, held)}

    return f


def _output(call: seam.Call, device: torch.device) -> Tensor:
    """Zeros like an attention's output, (b, s, h, e)."""
    q, _, v = call.qkv
    shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    return torch.zeros(shape, dtype=v.dtype, device=device)


def _cut_open(f: Placed, num_calls: int) -> Placed:
    """The block with its attentions' outputs as inputs."""
    names = [f"o/{place}" for place in range(num_calls)]

    def g(p: Env, inputs: Env, constants: Env) -> Env:
        with seam.cut([(inputs if name in inputs else constants)[name] for name in names]) as found:
            y = f(p, inputs, constants)
        return asked(found.calls) | y

    return g


def _attentions(look: Look, body: Body, settings: ComputeSettings) -> list[AttentionCall]:
    """How a block's attentions are computed, in the order of their calls.

    Raises:
        _UncutError: An attention has an irregular mask, or one that is made inside the layer.
    """
    found = []
    for place, (call, of_mask) in enumerate(zip(look.calls, look.masks, strict=True)):
        if of_mask == MADE_INSIDE:
            raise _UncutError("its mask is made inside the layer")
        shape = call.shape(None if of_mask is None else body.masks[of_mask])
        if shape is None:
            raise _UncutError("its mask is irregular")
        pattern, span = shape
        rule = choice.choose(call.qkv, pattern, span, settings.precision)
        found.append(AttentionCall(place, rule, pattern, span))
    return found
