"""Small problems with everything a test wants to know of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.losses.loss import Loss
from hvp_core.model.chain import Chain, MicroBatch, ModuleChain, parameter_values
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.settings import ComputeSettings
from hvp_core.sharding.collective import Alone, Collective
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.core import references

CPU = torch.device("cpu")
VOCABULARY = 24


@dataclass(frozen=True)
class Problem:
    """A chain at a point, a batch, and the same loss written by hand."""

    chain: Chain
    parameters: dict[str, Tensor]
    batch: MicroBatch
    loss: Callable[[Tensor], Tensor] | None = None

    @property
    def flat(self) -> Tensor:
        return references.flatten(self.parameters)

    def curvature(
        self,
        micro_batch_size: int,
        collective: Collective | None = None,
        *,
        strict: bool = True,
        selected: Collection[str] | None = None,
    ) -> Curvature:
        """Strict: a block that takes a slower way is an error, unless that is what is tested."""
        collective = collective or Alone()
        layout = Layout(
            self.chain.shapes,
            [block.parameters for block in self.chain.blocks],
            collective.world_size,
        )
        space = ParameterSpace(layout, collective, self.flat.dtype, CPU)
        return Curvature(
            self.chain,
            space,
            space.from_flat(self.flat),
            self.batch,
            micro_batch_size,
            ComputeSettings(strict=strict),
            None if selected is None else space.part(selected),
        )


def module_problem(module: nn.Module, loss: Loss, x: Tensor, targets: Tensor) -> Problem:
    module = module.eval()
    return Problem(
        ModuleChain(module, loss),
        parameter_values(module),
        MicroBatch(inputs={"x": x}, targets=targets),
    )


def ragged_tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Five sequences of six: padding left and right, ignored labels, unequal numbers of targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (5, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, 4:] = 0
    labels = ids.clone()
    labels[mask == 0] = -100
    labels[2, :5] = -100
    labels[4, 1:3] = -100
    return ids, labels, mask


def scatter(model: nn.Module, seed: int = 1) -> None:
    """Parameters of size one: norms away from one, biases away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(
                noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * noise
            )


def llama_config(pad_token_id: int | None = None) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=pad_token_id,
        attn_implementation=attention.NAME,
    )


def gpt2_config(pad_token_id: int | None = None) -> GPT2Config:
    return GPT2Config(
        n_embd=4,
        n_layer=2,
        n_head=2,
        n_positions=8,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=pad_token_id,
        attn_implementation=attention.NAME,
    )


def llama_problem(
    dtype: torch.dtype = torch.float64,
    pad_token_id: int | None = None,
    positions_at_once: int | None = None,
) -> Problem:
    chain = _chain("llama", dtype, pad_token_id, positions_at_once)
    return _problem(chain, references.llama)


def gpt2_problem(
    dtype: torch.dtype = torch.float64,
    pad_token_id: int | None = None,
    positions_at_once: int | None = None,
) -> Problem:
    chain = _chain("gpt2", dtype, pad_token_id, positions_at_once)
    return _problem(chain, references.gpt2)


@cache
def _chain(
    name: str, dtype: torch.dtype, pad_token_id: int | None, positions_at_once: int | None
) -> LayeredChain:
    """One chain for all tests that want it so, and what is traced of it is traced once."""
    attention.register()
    model: Any = (
        LlamaForCausalLM(llama_config(pad_token_id))
        if name == "llama"
        else GPT2LMHeadModel(gpt2_config(pad_token_id))
    )
    model = model.to(dtype).eval()
    scatter(model)
    chain = LayeredChain(model, dtype, CPU)
    chain.positions_at_once = positions_at_once
    return chain


def _problem(chain: LayeredChain, reference: Callable[..., Tensor]) -> Problem:
    """Parameters and batch are the caller's own, to be changed as a test likes."""
    model = chain._parts.model
    ids, labels, mask = ragged_tokens()
    parameters = {name: each.clone() for name, each in parameter_values(model).items()}
    return Problem(
        chain,
        parameters,
        token_batch(ids, labels, mask),
        references.token_loss(lambda p: reference(p, ids, mask, model.config), labels, parameters),
    )
