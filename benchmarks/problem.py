"""One model, one batch and the probes: what all contestants share."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

from benchmarks.counts import Product, flops
from benchmarks.shapes import Precision, Shape

#: Compared and added up in float64, so many elements at a time.
_PIECE = 1 << 24


_CAUSAL = "causal"


def _causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of rows without padding.

    The stock one makes a mask when it is compiled, and then may not use the fastest kernels.
    """
    o = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return o.transpose(1, 2).contiguous(), None


AttentionInterface.register(_CAUSAL, _causal)
AttentionMaskInterface.register(_CAUSAL, lambda *_, **__: None)


@final
class Problem:
    """The mean next-token loss of a model on a batch, at fixed weights.

    With bf16 the weights are numbers of bfloat16, for contestants that compute in float32 too.

    Args:
        shape: Which model and batch.
        device: Where everything lives.
        precision: Of the operands of matrix products. Contestants without a setting of their own
            get a bfloat16 model, or torch's tf32 switch.
        compiled: Let contestants use torch.compile.
    """

    def __init__(self, shape: Shape, device: torch.device, precision: Precision, compiled: bool):
        self.shape = shape
        self.device = device
        self.precision = precision
        self.compiled = compiled
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        logging.disable_progress_bar()
        checkpoint = shape.checkpoint_dir()
        self.weights_from = "checkpoint" if checkpoint else "seed 0"
        self.model = self._load(checkpoint)
        self.parameters = list(self.model.parameters())
        self.numel = sum(parameter.numel() for parameter in self.parameters)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(
            self.config.vocab_size, (shape.rows, shape.tokens), generator=generator
        ).to(device)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        #: What contestants of one heat share.
        self.memo: dict[str, Any] = {}

    def _load(self, checkpoint: Path | None) -> Any:
        if checkpoint:
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=self.dtype, attn_implementation=_CAUSAL
            )
            return model.to(self.device).eval()
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(
                self.shape.build_config(), dtype=self.dtype, attn_implementation=_CAUSAL
            )
        return model.eval()

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.model.config

    def save_config(self) -> tempfile.TemporaryDirectory[str]:
        """A folder with config.json, for those who build the model themselves."""
        folder = tempfile.TemporaryDirectory(prefix="hvp-bench-")
        self.config.save_pretrained(folder.name)
        return folder

    # The loss -----------------------------------------------------------------------------------

    @property
    def targets(self) -> Tensor:
        """Of every position but the last, (rows · (tokens − 1),)."""
        return self.ids[:, 1:].reshape(-1)

    def logits(self, model: Any = None) -> Tensor:
        """In float32, (rows · (tokens − 1), vocabulary)."""
        out = (model or self.model)(input_ids=self.ids, use_cache=False).logits
        kept: Tensor = out[:, :-1].reshape(-1, out.shape[-1]).float()
        return kept

    def loss(self) -> Tensor:
        """L(θ)."""
        return nn.functional.cross_entropy(self.logits(), self.targets)

    # Vectors ------------------------------------------------------------------------------------

    def probe(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Entries ±1, exact in every dtype: flat (n,), the same for all contestants of a run."""
        generator = torch.Generator(self.device).manual_seed(index + 1)
        bits = torch.randint(
            2, (self.numel,), dtype=torch.int8, device=self.device, generator=generator
        )
        return bits.to(dtype or self.dtype).mul_(2).sub_(1)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector, shaped as the parameters."""
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [
            piece.view_as(parameter)
            for piece, parameter in zip(pieces, self.parameters, strict=True)
        ]

    def theta(self, dtype: torch.dtype) -> Tensor:
        """The weights as one flat vector."""
        flat = torch.empty(self.numel, dtype=dtype, device=self.device)
        for part, parameter in zip(self.parts(flat), self.parameters, strict=True):
            part.copy_(parameter.detach())
        return flat

    # Counts -------------------------------------------------------------------------------------

    @property
    def weights_bytes(self) -> int:
        """Of the model that contestants share."""
        return int(self.numel * self.dtype.itemsize)

    @property
    def multiplied(self) -> int:
        """Elements of the matrices that multiply activations."""
        looked_up = 0
        head = self.model.get_output_embeddings().weight
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) and module.weight is not head:
                looked_up += module.weight.numel()
        matrices = sum(p.numel() for p in self.parameters if p.dim() == 2)
        return int(matrices - looked_up)

    def flops(self, product: Product, probes: int = 1, cached: bool = False) -> float:
        """Of one product on this batch, see `counts`."""
        heads = self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return flops(
            product,
            weights=self.multiplied,
            rows=self.shape.rows,
            tokens=self.shape.tokens,
            layers=self.config.num_hidden_layers,
            width=heads * head_dim,
            probes=probes,
            cached=cached,
        )


def flattened(parts: Iterable[Tensor]) -> Tensor:
    """Tensors in canonical order as one vector."""
    return torch.cat([part.detach().reshape(-1) for part in parts])


def dot(left: Tensor, right: Tensor) -> float:
    """Inner product in float64."""
    pieces = zip(left.split(_PIECE), right.split(_PIECE), strict=True)
    return float(sum(a.double() @ b.to(a.device).double() for a, b in pieces))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64, wherever the two live."""
    squares = norms = torch.zeros((), dtype=torch.float64, device=found.device)
    for a, b in zip(found.split(_PIECE), exact.split(_PIECE), strict=True):
        b = b.to(a.device).double()
        squares = squares + (a.double() - b).square().sum()
        norms = norms + b.square().sum()
    return float((squares / norms).sqrt())


def asymmetry(u: Tensor, hu: Tensor, v: Tensor, hv: Tensor) -> float:
    """|uᵀHv − vᵀHu| / (‖u‖ ‖Hv‖): zero for a symmetric matrix."""
    return abs(dot(u, hv) - dot(v, hu)) / math.sqrt(dot(u, u) * dot(hv, hv))
