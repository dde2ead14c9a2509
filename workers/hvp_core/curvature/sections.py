"""Jacobians of activations: the curvature of the part of a chain that lies between two places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, final

from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Block, Chain
from hvp_core.model.places import (
    INTO,
    START,
    Alone,
    Identity,
    Observed,
    Part,
    Place,
    Section,
    submodule,
    unsupported,
)
from hvp_core.vectors.output_space import OutputSpace
from hvp_core.vectors.space import ParameterSpace


class Whole(Protocol):
    """What is asked of a model on a batch (`Curvature`)."""

    chain: Chain
    space: ParameterSpace
    theta_space: ParameterSpace

    @property
    def output_space(self) -> OutputSpace:
        """The space of the model's outputs on the batch."""

    def observe(self, index: int, places: Sequence[Place]) -> list[Observed]:
        """A block's input, and activations inside it, of each of this rank's micro-batches."""

    def space_of_rows(self, shape: Sequence[int] | None) -> OutputSpace:
        """The space of tensors with a row of this shape for each row of the batch."""


@final
class _Spot(NamedTuple):
    """Where a place is in a chain.

    Attributes:
        block: Index of the block that it is in.
        is_block: It is the block's own output, or input.
        observed: Of each of this rank's micro-batches the block's input, and the activation.
    """

    block: int
    is_block: bool
    observed: Sequence[Observed]


@final
class Between(NamedTuple):
    """A section at a point, as `Curvature` takes it.

    Attributes:
        chain: The section.
        space: Space of all parameters, for its blocks.
        selected: Space of the parameters that it is differentiated by; none by an activation.
        recorded: Fields of each of this rank's micro-batches.
    """

    chain: Section
    space: ParameterSpace
    selected: ParameterSpace
    recorded: Sequence[Mapping[str, Tensor]]


def section_of(
    whole: Whole,
    output: Place | None,
    input: Place | None,  # noqa: A002 (what it is)
) -> Between:
    """The part of a model whose derivative is that of an activation, by another or by parameters.

    Cost: a pass forward up to the places. All ranks call it together.

    Args:
        whole: The model on the batch; its selected parameters are those that derivatives are taken
            by, where they are taken by parameters.
        output: The activation that is differentiated; None for the model's outputs.
        input: The activation that derivatives are taken by; None for the parameters.

    Raises:
        CurvatureError: MODULE_NOT_FOUND; MODULE_UNSUPPORTED: a submodule does not give one tensor,
            or is not called once; MODULES_OUT_OF_ORDER: the output does not depend on the input.
    """
    chain, last = whole.chain, len(whole.chain.blocks) - 1
    end = _Spot(last, True, ()) if output is None else _spot(whole, output)
    recorded: list[Mapping[str, Tensor]] = []
    blocks: list[Block] = []
    if input is not None and input == _own(output) and not end.is_block:
        start = _spot(whole, input)
        recorded = [{START: each.seen[input]} for each in start.observed]
        blocks = [Alone(input.module, chain)]
    else:
        first, begins = 0, ""
        if input is not None:
            first, begins, recorded = _beginning(whole, input)
            if first > end.block or (begins and first == end.block and not end.is_block):
                _check_order(whole, input, output, end)
        for index in range(first, end.block + 1):
            ends = "" if output is None or end.is_block or index < end.block else output.module
            blocks.append(Part(chain.blocks[index], chain, begins if index == first else "", ends))
        if end.is_block and end.block < last:
            blocks.append(Identity())
    section = Section(
        chain, blocks, begins=input is not None, ends_whole=end.is_block and end.block == last
    )
    users = [block.parameters for block in blocks]
    space = whole.theta_space
    selected = whole.space if input is None else space.part(())
    return Between(section, space.for_blocks(users), selected.for_blocks(users), recorded)


def activation_space(whole: Whole, place: Place) -> OutputSpace:
    """The space of an activation's vectors on the batch. All ranks call it together.

    Args:
        whole: The model on the batch.
        place: The activation.

    Raises:
        CurvatureError: MODULE_NOT_FOUND, MODULE_UNSUPPORTED.
    """
    spot = _spot(whole, place)
    if not spot.is_block:
        found = [each.seen[place] for each in spot.observed]
    else:
        after = spot.block + (place.side == "output")
        if after == len(whole.chain.blocks):
            return whole.output_space
        found = [each.x for each in whole.observe(after, [])]
    return whole.space_of_rows(found[0].shape[1:] if found else None)


def _own(output: Place | None) -> Place | None:
    """The input of the submodule whose output it is."""
    return None if output is None else Place(output.module, "input")


def _spot(whole: Whole, place: Place) -> _Spot:
    """Find a place in a chain.

    Raises:
        CurvatureError: MODULE_NOT_FOUND, MODULE_UNSUPPORTED.
    """
    chain = whole.chain
    submodule(chain, place.module)
    for index in chain.blocks_with(place.module):
        if chain.blocks[index].name == place.module:
            return _Spot(index, True, ())
        observed = whole.observe(index, [place])
        if _anywhere(whole, place, observed):
            return _Spot(index, False, observed)
    raise unsupported(place.module, "is not called when the model runs on this batch")


def _anywhere(whole: Whole, place: Place, observed: Sequence[Observed]) -> bool:
    """Whether a rank has seen an activation."""
    own = any(place in each.seen for each in observed)
    return any(whole.space.collective.gather_objects(own))


def _beginning(whole: Whole, place: Place) -> tuple[int, str, list[Mapping[str, Tensor]]]:
    """The first block of a section, the submodule in it that it begins at, and what is recorded.

    Raises:
        CurvatureError: MODULE_NOT_FOUND, MODULE_UNSUPPORTED.
    """
    spot = _spot(whole, place)
    if not spot.is_block:
        return (
            spot.block,
            place.module,
            [{START: each.seen[place], INTO: each.x} for each in spot.observed],
        )
    first = spot.block + (place.side == "output")
    if first == len(whole.chain.blocks):
        return first, "", []  # nothing comes after it
    observed = whole.observe(first, [])
    whole_numbers = any(not each.x.is_floating_point() for each in observed)
    if any(whole.space.collective.gather_objects(whole_numbers)):
        raise unsupported(place.module, "takes whole numbers, which have no derivative")
    return first, "", [{START: each.x} for each in observed]


def _check_order(whole: Whole, start: Place, output: Place | None, end: _Spot) -> None:
    """Refuse an output that is made before the input is.

    Raises:
        CurvatureError: MODULES_OUT_OF_ORDER.
    """
    name = "the model's outputs" if output is None else str(output)
    if output is not None and not end.is_block and output != start:
        seen = [list(each.seen) for each in whole.observe(end.block, [start, output])]
        orders = [order for own in whole.space.collective.gather_objects(seen) for order in own]
        if orders and orders[0] == [start, output]:
            return
    raise CurvatureError(
        "MODULES_OUT_OF_ORDER",
        f"{name} is not made after {start}, so that this Jacobian is zero, or the identity; "
        "exchange them, or take another",
        {"output": name, "input": str(start)},
    )
