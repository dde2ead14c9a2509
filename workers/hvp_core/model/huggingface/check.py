"""Is the chain the model? Its loss is compared with the one that the model's own code computes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from hvp_core.blame import working_on
from hvp_core.errors import CurvatureError
from hvp_core.model.chain import MicroBatch, canonical_names
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.decoder import DecoderChain
from hvp_core.model.huggingface.decoder_blocks import unchanged
from hvp_core.precision import exact, exact_products
from hvp_core.vectors.space import Space

_TOKENS = 16
_POSITIONS_AT_ONCE = 5  # so that the head is seen to work position by position


@exact_products()
def disagreement(
    model: PreTrainedModel,
    chain: DecoderChain,
    space: Space,
    parameters: torch.Tensor,
    loss: Callable[[MicroBatch], float],
) -> CurvatureError | None:
    """Why the chain is not the model; None where both give one loss on a few tokens, to rounding.

    The model takes two rows at once and the chain one by one, so that a model whose rows depend on
    one another is seen too. Called by all ranks together; memory: two blocks.

    Args:
        model: As built, on the meta device.
        chain: Cut from it.
        space: Of its parameters.
        parameters: θ, this rank's shard.
        loss: Gives the mean loss of the chain at θ on a batch whose rows are taken one by one.

    Raises:
        CurvatureError: NON_FINITE, naming the block, where neither gives a number: that is the
            parameters' fault, and says nothing of the chain. OUT_OF_MEMORY; INTERNAL.
    """
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or _TOKENS
    length = max(2, min(_TOKENS, longest))
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(text.vocab_size, rows), (2, length), generator=generator)
    name = type(model).__name__
    try:
        with working_on(name, "its own loss"):
            theirs = _own_loss(model, space, parameters, ids)
        chain.positions_at_once = _POSITIONS_AT_ONCE
        try:
            ours = loss(token_batch(ids))
        finally:
            chain.positions_at_once = None
    except CurvatureError as error:
        # A chain that was cut wrongly may fail where the model does not.
        own_fault = error.reason in ("OUT_OF_MEMORY", "INTERNAL")
        if own_fault or (error.reason == "NON_FINITE" and not math.isfinite(theirs)):
            raise
        return error
    # Tight enough to see an auxiliary loss of a thousandth.
    tolerance = max(100 * torch.finfo(space.dtype).eps, 1e-12)
    if abs(ours - theirs) <= tolerance * max(1.0, abs(theirs)):  # false where one is no number
        return None
    return CurvatureError(
        "MODEL_UNSUPPORTED",
        f"{name}'s own loss is {theirs:.6g}, and the mean cross-entropy of its logits, row by row, "
        f"{ours:.6g}; only models whose loss is that are served",
        {"block": name, "operation": "its own loss"},
    )


@torch.no_grad()
def _own_loss(
    model: PreTrainedModel, space: Space, parameters: torch.Tensor, ids: torch.Tensor
) -> float:
    ids = ids.to(space.device)
    with unchanged(model), exact(), _OnDemand(model, space, parameters):
        ours = model.config._attn_implementation
        attention.use(model, "eager")  # the one that every architecture has
        try:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        finally:
            attention.use(model, ours)
    return float(loss)


@final
class _OnDemand(TorchFunctionMode):
    """Gives an operation the values of the parameters that it is called with.

    Whoever calls it: a model's code may read the weights of any of its modules anywhere.

    Args:
        model: Its parameters on the meta device.
        space: Of its parameters.
        parameters: θ, this rank's shard. Of it two segments at most are gathered at a time.
    """

    def __init__(self, model: PreTrainedModel, space: Space, parameters: torch.Tensor):
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
