"""Is the chain the model? Compare its loss with the one that the model's own code computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hvp_core.chain import canonical_names
from hvp_core.data import token_batch
from hvp_core.decoder import DecoderChain
from hvp_core.precision import exact
from hvp_core.space import Space
from hvp_core.walk import Curvature

logger = logging.getLogger(__name__)

_TOKENS = 16
_POSITIONS_AT_ONCE = 5  # so that the head is seen to work position by position


def chain_agrees(
    model: PreTrainedModel, chain: DecoderChain, space: Space, parameters: torch.Tensor
) -> bool:
    """Whether chain and model give one loss on a few tokens, to rounding.

    A loss that is not finite says nothing about the chain and passes: the first real call names
    the block at fault. Called by all ranks together; memory: one block.

    Args:
        model: As built, on the meta device.
        chain: Cut from it.
        space: Of its parameters.
        parameters: θ, this rank's shard.
    """
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or _TOKENS
    length = max(2, min(_TOKENS, longest))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (2, length), generator=generator)
    try:
        theirs = _own_loss(model, space, parameters, ids)
    except Exception:  # it computes with weights in ways that only a whole model allows
        logger.exception("the model's own loss cannot be computed block by block")
        return False
    if theirs - theirs != 0:
        return True
    chain.positions_at_once = _POSITIONS_AT_ONCE
    try:
        ours = Curvature(chain, space, parameters, token_batch(ids), 1).loss()
    finally:
        chain.positions_at_once = None
    # Tight enough to see an auxiliary loss of a thousandth.
    tolerance = max(100 * torch.finfo(space.dtype).eps, 1e-12)
    return abs(ours - theirs) <= tolerance * max(1.0, abs(theirs))


@torch.no_grad()
def _own_loss(
    model: PreTrainedModel, space: Space, parameters: torch.Tensor, ids: torch.Tensor
) -> float:
    ids = ids.to(space.device)
    with _gathered_on_call(model, space, parameters), exact():
        ours = model.config._attn_implementation
        model.set_attn_implementation("eager")  # the one that every architecture has
        try:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        finally:
            model.set_attn_implementation(ours)
    return float(loss)


@contextmanager
def _gathered_on_call(
    model: PreTrainedModel, space: Space, parameters: torch.Tensor
) -> Iterator[None]:
    """Give every module its weights when it is called and take them away afterwards."""
    names = canonical_names(model)
    segment_of = {
        parameter.name: segment
        for segment in space.layout.segments
        for parameter in segment.parameters
    }
    latest: dict[int, dict[str, torch.Tensor]] = {}

    def value(name: str) -> torch.Tensor:
        segment = segment_of[name]
        if segment.start not in latest:
            latest.clear()
            place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
            latest[segment.start] = segment.views(space.collective.gather(parameters[place]))
        return latest[segment.start][name]

    handles = []
    for prefix, module in model.named_modules():
        own = {
            local: names[f"{prefix}.{local}" if prefix else local]
            for local, parameter in module._parameters.items()
            if parameter is not None
        }
        if not own:
            continue
        empty = dict(module._parameters)

        def give(module: nn.Module, args: Any, own: dict[str, str] = own) -> None:
            for local, name in own.items():
                module._parameters[local] = nn.Parameter(value(name), requires_grad=False)

        def take(module: nn.Module, args: Any, output: Any, empty: dict[str, Any] = empty) -> None:
            module._parameters.update(empty)

        handles += [
            module.register_forward_pre_hook(give),
            module.register_forward_hook(take, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
