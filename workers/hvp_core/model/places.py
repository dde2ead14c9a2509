"""Places in a model where activations can be read, and the part of its chain between two of them.

The Jacobian of one activation by another is that of a chain which begins at the one and ends at the
other. Where a place is the end of a block, that chain consists of the model's own blocks. A
submodule inside a block is reached by hooks, which work under every transformation of the block's
code: one hands the activation in, in place of what the submodule gave, with the block's own input a
constant; another ends the block's run with what the submodule gives.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, final

from hvp_operations.wording import shown
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Block, Body, Chain, MicroBatch, ModuleBlock, canonical_names, rows

#: Fields of a section's micro-batches: the activation that it begins at, and the input of the block
#: which that lies in.
START, INTO = "section/start", "section/into"
_NEAREST = 5


@final
@dataclass(frozen=True)
class Place:
    """An activation of a model.

    Attributes:
        module: Name of a submodule.
        side: The submodule's output, or its own input.
    """

    module: str
    side: Literal["output", "input"] = "output"

    def __str__(self) -> str:
        return f"the {self.side} of {self.module}"


def submodule(chain: Chain, name: str) -> nn.Module:
    """The submodule of a name.

    Raises:
        CurvatureError: MODULE_NOT_FOUND, with the nearest names.
    """
    known = {each: module for each, module in chain.module.named_modules() if each}
    if name not in known:
        nearest = (
            difflib.get_close_matches(name, known, _NEAREST, cutoff=0.3) or [*known][:_NEAREST]
        )
        raise CurvatureError(
            "MODULE_NOT_FOUND",
            f"the model has no submodule {shown(name)}; the nearest are {', '.join(nearest)}",
            {"module": name, "nearest": ", ".join(nearest)[:1024]},
        )
    found: nn.Module = known[name]
    return found


class _StopRun(Exception):  # noqa: N818 (a signal, not an error)
    """Carries a submodule's output out of the run of its block."""

    def __init__(self, y: Tensor):
        self.y = y


def _tensor(name: str, found: Any, num_rows: int | None = None) -> Tensor:
    """What a submodule gave, if that is one tensor of floating numbers with a row for each row.

    Raises:
        CurvatureError: MODULE_UNSUPPORTED.
    """
    if not isinstance(found, Tensor):
        what = type(found).__name__
        if isinstance(found, list | tuple):
            what = f"{what} of {', '.join(type(each).__name__ for each in found)}"
        raise unsupported(name, f"gives a {what}")
    if not found.is_floating_point():
        raise unsupported(name, f"gives {str(found.dtype).removeprefix('torch.')}")
    if num_rows is not None and (found.dim() < 1 or len(found) != num_rows):
        raise unsupported(
            name, f"gives {tuple(found.shape)} for {num_rows} rows of the batch, not a row for each"
        )
    return found


def unsupported(name: str, why: str) -> CurvatureError:
    """The refusal of a submodule whose activation is no vector."""
    return CurvatureError(
        "MODULE_UNSUPPORTED",
        f"{name} {why}; a Jacobian is taken of a submodule that is called once and gives one "
        "tensor of floating numbers with a row for each row of the batch, as layers, norms and "
        "projections do",
        {"module": name},
    )


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """Run with a forward hook on a module."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@final
class Context(NamedTuple):
    """Constants of a micro-batch in a section: those of the chain, and a block's own input."""

    of_chain: Any
    into: Tensor | None


@final
class Part(Block):
    """A block of the chain in a section; with hooks where the section begins or ends inside it.

    Args:
        block: The block.
        begins: The submodule whose output is handed in as x; "" where x is the block's own input.
        ends: The submodule whose output is the part's; "" for the block's own.
        chain: The chain, which has the submodules.
    """

    def __init__(self, block: Block, chain: Chain, begins: str = "", ends: str = ""):
        super().__init__(block.name, block.parameters)
        self._block, self._names = block, (begins, ends)
        modules = dict(chain.module.named_modules())
        self._begins = modules[begins] if begins else None
        self._ends = modules[ends] if ends else None

    def body(self, context: Context, dense: bool) -> Body:
        """The block's own body, with the hooks around its run."""
        body = self._block.body(context.of_chain, dense)
        if self._begins is None and self._ends is None:
            return body
        constants = dict(body.constants)
        if self._begins is not None:
            assert context.into is not None
            constants["c/into"] = context.into
        call = partial(self._call, body)
        return body._replace(
            constants=constants, call=call, settings=(body.settings, "hooks", self._names)
        )

    def _call(
        self, body: Body, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        given = {name: each for name, each in constants.items() if name != "c/into"}
        if self._begins is None:
            return self._run(body, params, x, given)
        with hooked(self._begins, lambda module, args, output: x):
            return self._run(body, params, constants["c/into"], given)

    def _run(
        self, body: Body, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        if self._ends is None:
            return body.call(params, x, constants)

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _StopRun(_tensor(self._names[1], output))

        with hooked(self._ends, stop):
            try:
                body.call(params, x, constants)
            except _StopRun as stopped:
                return stopped.y
        raise unsupported(self._names[1], "is not called by its block")


@final
class Alone(Block):
    """A submodule by itself, from its one input to its output."""

    def __init__(self, name: str, chain: Chain):
        module, names = submodule(chain, name), canonical_names(chain.module)
        local = [each for each, _ in module.named_parameters(remove_duplicate=False)]
        self._block = ModuleBlock(name, module, {each: names[f"{name}.{each}"] for each in local})
        super().__init__(name, self._block.parameters)

    def body(self, context: Context, dense: bool) -> Body:
        """The submodule with its parameters and buffers."""
        return self._block.body((), dense)


@final
class Identity(Block):
    """The end of a section that ends with a block of the chain, whose output it hands on."""

    def __init__(self) -> None:
        super().__init__("identity", ())

    def body(self, context: Context, dense: bool) -> Body:
        """The function y = x."""
        return Body({}, lambda params, x, constants: x.clone())


@final
class Section(Chain):
    """The part of a chain between two places, as a chain.

    Args:
        chain: The whole chain.
        blocks: The blocks of the part.
        begins: Whether it begins at an activation, `START` of a micro-batch's fields, by which
            derivatives are taken; otherwise at the model's data.
        ends_whole: Whether it ends with the chain's own outputs.
    """

    def __init__(self, chain: Chain, blocks: Sequence[Block], *, begins: bool, ends_whole: bool):
        self._chain, self.blocks = chain, blocks
        self.shapes, self.loss, self.notes = chain.shapes, chain.loss, chain.notes
        self.module, self.positions_at_once = chain.module, chain.positions_at_once
        self.input_moves, self.ends_in_loss = begins, False
        self._ends_whole = ends_whole

    @property
    def origin(self) -> Chain:
        """The whole chain: its blocks are the section's, whatever hooks their settings name."""
        return self._chain

    def first_input(self, batch: MicroBatch) -> Tensor:
        """The recorded activation, or the chain's own first input."""
        return batch.inputs[START] if self.input_moves else self._chain.first_input(batch)

    def context(self, batch: MicroBatch) -> Context:
        """The constants of the chain, and the input of the block that the section begins in."""
        return Context(self._chain.context(_data(batch)), batch.inputs.get(INTO))

    def sample_for_checks(self, batch: MicroBatch) -> MicroBatch:
        """A part of a row as the chain takes it, where the activations have its positions."""
        length = batch.sequence_length
        own = [each for name, each in batch.inputs.items() if name in (START, INTO)]
        if all(each.dim() > 1 and each.shape[1] == length for each in own):
            return self._chain.sample_for_checks(batch)
        return rows(batch, 0, 1)

    def pair(self, batch: MicroBatch) -> None:
        """None: the whole chain is checked for that when its loss is computed."""

    def pieces(self, x: Tensor) -> list[slice]:
        """Those of the chain, where the section ends with its outputs."""
        return self._chain.pieces(x) if self._ends_whole else []


def _data(batch: MicroBatch) -> MicroBatch:
    """The micro-batch without the fields that a section adds."""
    inputs = {name: each for name, each in batch.inputs.items() if name not in (START, INTO)}
    return MicroBatch(inputs=inputs, targets=batch.targets)


@final
class Observed(NamedTuple):
    """A block's input for one micro-batch, and activations inside it as they were made."""

    x: Tensor
    seen: Mapping[Place, Tensor]


@final
class Observer:
    """Sees what submodules are given and give while a block runs.

    Args:
        chain: The chain, which has the submodules.
        places: The activations to see.
        num_rows: Number of rows that go through the block.

    Attributes:
        seen: The activations, in the order in which the block's run made them.
    """

    def __init__(self, chain: Chain, places: Sequence[Place], num_rows: int):
        self._modules = [(place, submodule(chain, place.module)) for place in places]
        self._num_rows = num_rows
        self.seen: dict[Place, Tensor] = {}

    def run(self, body: Body, params: Mapping[str, Tensor], x: Tensor) -> None:
        """Run a block, and see.

        Raises:
            CurvatureError: MODULE_UNSUPPORTED: an activation is not one tensor, or there are
                several.
        """
        handles = [
            module.register_forward_hook(partial(self._see, place), with_kwargs=True)
            for place, module in self._modules
        ]
        try:
            body.run(params, x, body.constants)
        finally:
            for handle in handles:
                handle.remove()

    def _see(
        self, place: Place, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        name = place.module
        if place in self.seen:
            raise unsupported(name, "is called more than once")
        found = _tensor(name, output, self._num_rows)
        if place.side == "input":
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            if len(args) != 1 or len(tensors) != 1 or args[0] is not tensors[0] or kwargs:
                raise unsupported(
                    name,
                    f"takes {len(tensors)} tensors, and its own input is one that it takes alone",
                )
            found = _tensor(name, args[0], self._num_rows)
        self.seen[place] = found.detach().clone()
