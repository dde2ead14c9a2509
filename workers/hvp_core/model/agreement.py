"""Checks that the chain is the model: its loss is compared with that of the model's own code."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hvp_core.blame import working_on
from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Chain, MicroBatch, canonical_names, unchanged
from hvp_core.model.family import ModelFacts, ModelFamily
from hvp_core.precision import exact, exact_products
from hvp_core.vectors.space import ParameterSpace

_POSITIONS_AT_ONCE = 5  # so that the head is seen to work position by position


@exact_products()
def disagreement(
    family: ModelFamily,
    facts: ModelFacts,
    model: nn.Module,
    chain: Chain,
    space: ParameterSpace,
    parameters: torch.Tensor,
    loss: Callable[[MicroBatch], float],
) -> CurvatureError | None:
    """Why the chain is not the model; None where both give one loss on an example, to rounding.

    The model takes two rows at once and the chain one by one, so that a model whose rows depend on
    one another is seen too. Called by all ranks together; memory: two blocks.

    Args:
        family: Family of the model.
        facts: Facts about the model.
        model: The model as built, its parameters on the meta device.
        chain: The chain that was cut from the model.
        space: Space of the model's parameters.
        parameters: θ, this rank's shard.
        loss: Gives the mean loss of the chain at θ on a batch whose rows are taken one by one.

    Raises:
        CurvatureError: NON_FINITE, naming the block, where neither gives a number: that is the
            parameters' fault, and says nothing of the chain. TASK_UNSUPPORTED: the model is not
            what its family is for. OUT_OF_MEMORY; INTERNAL.
    """
    batch = family.example(facts)
    name = type(model).__name__
    given = {
        key: each.to(space.device, space.dtype if each.is_floating_point() else None)
        for key, each in batch.items()
    }
    try:
        with (
            torch.no_grad(),
            working_on(name, "its own loss"),
            unchanged(model),
            exact(),
            _OnDemand(model, space, parameters),
        ):
            theirs = float(family.own_loss(model, facts, given))
        chain.positions_at_once = _POSITIONS_AT_ONCE
        try:
            ours = loss(family.micro_batch(facts, batch))
        finally:
            chain.positions_at_once = None
    except CurvatureError as error:
        # A chain that was cut wrongly may fail where the model does not.
        own_fault = error.reason in ("OUT_OF_MEMORY", "INTERNAL", "TASK_UNSUPPORTED")
        no_number = error.reason == "NON_FINITE"
        if own_fault or (no_number and not math.isfinite(theirs)):
            raise
        if not no_number:
            return error
        ours = math.nan
    # Tight enough to see an auxiliary loss of a thousandth.
    tolerance = max(100 * torch.finfo(space.dtype).eps, 1e-12)
    if abs(ours - theirs) <= tolerance * max(1.0, abs(theirs)):  # false where one is no number
        return None
    return CurvatureError(
        "MODEL_UNSUPPORTED",
        f"{name}'s own loss is {theirs:.6g}, and the mean of {facts.head.loss!r} of its outputs, "
        f"row by row, {ours:.6g}; only models whose loss is that are served",
        {"block": name, "operation": "its own loss"},
    )


@final
class _OnDemand(TorchFunctionMode):
    """Gives every operation the values of the parameters that it is called with.

    The caller does not matter: a model's code may read the weights of any of its modules anywhere.

    Args:
        model: The model, its parameters on the meta device.
        space: Space of the model's parameters.
        parameters: θ, this rank's shard. At most two segments are gathered at a time.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, parameters: torch.Tensor):
        super().__init__()
        self._space, self._parameters = space, parameters
        names = canonical_names(model)
        #: The parameters themselves are kept: an id is good for as long as its object lives.
        self._own = {
            id(parameter): (names[name], parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._segment_of = {
            parameter.name: segment
            for segment in space.layout.segments
            for parameter in segment.parameters
        }
        self._latest: OrderedDict[int, dict[str, torch.Tensor]] = OrderedDict()

    def _value(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.device.type != "meta":
            return x
        if id(x) not in self._own:
            return x  # which `exact` refuses
        name, _ = self._own[id(x)]
        segment = self._segment_of[name]
        if segment.start not in self._latest:
            while len(self._latest) > 1:
                self._latest.popitem(last=False)
            place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
            flat = self._space.collective.gather(self._parameters[place])
            self._latest[segment.start] = segment.views(flat)
        self._latest.move_to_end(segment.start)
        return self._latest[segment.start][name]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(self._value, (args, kwargs or {}))
        return func(*args, **kwargs)
