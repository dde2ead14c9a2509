"""What a block's forward shows before anything is differentiated: its program and its attentions.

Blocks of one program are one block: they share traces, checks and compiled code. A program is read
from a trace of the forward alone, which costs a tenth of a trace of the derivatives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch.fx as fx
from torch import Tensor

from hvp_core.attention import seam
from hvp_core.attention.mask import Mask
from hvp_core.autodiff.cache import Cache
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.trace import trace_graph

_KEPT = 512  # of one chain: tens of kilobytes each, and the blocks of a program share a text

#: A block: (parameters by place, differentiable inputs, constants) -> {"y": its output}.
Placed = Callable[[Env, Env, Env], Env]

MADE_INSIDE = -1


class Look(NamedTuple):
    """What the traced forward of a block shows.

    Attributes:
        text: The program.
        calls: The calls of the attention function, on fake tensors; without their masks.
        masks: For each call the place of its mask among the block's, `MADE_INSIDE`, or None where
            it has none.
        moves: For each call whether what it is given may have a derivative.
    """

    text: str
    calls: tuple[seam.Call, ...]
    masks: tuple[int | None, ...]
    moves: tuple[bool, ...]


@final
class Looks:
    """The looks at one chain's blocks. By law they do not change."""

    def __init__(self) -> None:
        self._of_block: Cache[Look] = Cache(_KEPT)

    def at(
        self,
        name: str,
        settings: Hashable,
        f: Placed,
        p: Env,
        inputs: Env,
        constants: Env,
        masks: Sequence[Mask],
    ) -> Look:
        """Look at a block's forward, without its attentions; once for micro-batches alike.

        Args:
            name: Name of the block.
            settings: Whatever else the block's program depends on.
            f: The block.
            p: Parameters by place. Of these and the others only what `signature` tells matters.
            inputs: `x`, if it may have a tangent.
            constants: What else the block computes with.
            masks: The block's masks.

        Raises:
            RuntimeError, torch errors: The block cannot be traced.
        """
        kind = signature(p | inputs | constants), len(p), len(inputs), settings

        return self._of_block.get((name, kind), lambda: _Run(f, p, inputs, constants).look(masks))


def signature(values: Mapping[str, Tensor]) -> Hashable:
    """What a program depends on of its arguments."""
    return tuple(
        (name, tuple(each.shape), each.dtype, each.stride(), each.device)
        for name, each in values.items()
    )


def asked(calls: Sequence[seam.Call]) -> Env:
    """What the attentions were called with: `q/j`, `k/j`, `v/j` of the j-th call."""
    return {
        f"{name}/{place}": each
        for place, call in enumerate(calls)
        for name, each in call.qkv._asdict().items()
    }


@final
class _Run:
    """A block's forward, with zeros in place of the outputs of its attentions."""

    def __init__(self, f: Placed, p: Env, inputs: Env, constants: Env):
        self._f, self._p, self._inputs, self._constants = f, p, inputs, constants
        self._arguments: Env = {f"p/{name}": each for name, each in p.items()} | inputs | constants
        self._calls: Sequence[seam.Call] = ()

    def _program(self, env: Env) -> Env:
        at = (
            {name: env[f"p/{name}"] for name in self._p},
            {name: env[name] for name in self._inputs},
            {name: env[name] for name in self._constants},
        )
        with seam.cut(None) as found:
            y = self._f(*at)
        self._calls = found.calls
        masks = {f"mask/{place}": call.mask for place, call in enumerate(found.calls)}
        tensors = {name: each for name, each in masks.items() if isinstance(each, Tensor)}
        return y | asked(found.calls) | tensors

    def look(self, masks: Sequence[Mask]) -> Look:
        """Trace the forward, with the masks that the block may call its attentions with."""
        graph, names = trace_graph(self._program, self._arguments)
        place_of = {id(mask): place for place, mask in enumerate(masks)}
        num_moving = len(self._p) + len(self._inputs)
        moves = [
            _reads(graph, names, tuple(f"{name}/{place}" for name in "qkv"), num_moving)
            for place in range(len(self._calls))
        ]
        return Look(
            sys.intern(str(graph) + _words(self._calls)),
            tuple(replace(each, mask=None) for each in self._calls),
            tuple(
                None if each.mask is None else place_of.get(id(each.mask), MADE_INSIDE)
                for each in self._calls
            ),
            # Behind one that moves, whatever is computed may.
            tuple(any(moves[: place + 1]) for place in range(len(self._calls))),
        )


def _words(calls: Sequence[seam.Call]) -> str:
    return "".join(f"{each.scale!r} {each.softcap!r} {each.causal}" for each in calls)


def _reads(graph: fx.Graph, names: Sequence[str], which: Sequence[str], count: int) -> bool:
    """Whether outputs of the names in `which` depend on any of the first `count` arguments."""
    wanted = [node for node in graph.nodes if node.op == "placeholder"][:count]
    output = next(node for node in graph.nodes if node.op == "output")
    stack = [node for name, node in zip(names, output.args[0], strict=True) if name in which]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return not seen.isdisjoint(wanted)
