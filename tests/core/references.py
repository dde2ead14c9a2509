"""Second implementations to compare with: models written out by hand, and dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear, silu

Params = Mapping[str, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention by its definition; (b, h, s, d). A query that may look nowhere gets zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    anywhere = allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed & anywhere, -torch.inf).softmax(-1)
    return (weights * anywhere) @ v


def allowed_positions(ids: Tensor, mask: Tensor | None) -> Tensor:
    """(b, 1, s, s): causal, and only where the key is a real token."""
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return causal[None, None] & real[:, None, None, :]


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions, halves convention, in the model's float32 angles."""
    width, length = x.shape[-1], x.shape[-2]
    frequency = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def llama(p: Params, ids: Tensor, mask: Tensor | None, config: object) -> Tensor:
    """Logits of a Llama with tied embeddings."""
    c = vars(config)
    x = embedding(ids, p["model.embed_tokens.weight"])
    allowed = allowed_positions(ids, mask)
    base = c["rope_parameters"]["rope_theta"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        y = rms_norm(x, p[at + "input_layernorm.weight"], c["rms_norm_eps"])
        q = heads(linear(y, p[at + "self_attn.q_proj.weight"]), c["num_attention_heads"])
        k = heads(linear(y, p[at + "self_attn.k_proj.weight"]), c["num_key_value_heads"])
        v = heads(linear(y, p[at + "self_attn.v_proj.weight"]), c["num_key_value_heads"])
        o = attend(rotate(q, base), rotate(k, base), v, allowed).transpose(1, 2).flatten(2)
        x = x + linear(o, p[at + "self_attn.o_proj.weight"])
        y = rms_norm(x, p[at + "post_attention_layernorm.weight"], c["rms_norm_eps"])
        gate = silu(linear(y, p[at + "mlp.gate_proj.weight"]))
        up = linear(y, p[at + "mlp.up_proj.weight"])
        x = x + linear(gate * up, p[at + "mlp.down_proj.weight"])
    x = rms_norm(x, p["model.norm.weight"], c["rms_norm_eps"])
    return linear(x, p["model.embed_tokens.weight"])


def gpt2(p: Params, ids: Tensor, mask: Tensor | None, config: object) -> Tensor:
    """Logits of a GPT-2, whose embeddings are tied."""
    c = vars(config)
    eps = c["layer_norm_epsilon"]
    x = embedding(ids, p["transformer.wte.weight"])
    x = x + p["transformer.wpe.weight"][: ids.shape[1]]
    allowed = allowed_positions(ids, mask)
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        y = norm(x, p[at + "ln_1.weight"], p[at + "ln_1.bias"], eps)
        qkv = y @ p[at + "attn.c_attn.weight"] + p[at + "attn.c_attn.bias"]
        q, k, v = (heads(part, c["n_head"]) for part in qkv.chunk(3, -1))
        o = attend(q, k, v, allowed).transpose(1, 2).flatten(2)
        x = x + o @ p[at + "attn.c_proj.weight"] + p[at + "attn.c_proj.bias"]
        y = norm(x, p[at + "ln_2.weight"], p[at + "ln_2.bias"], eps)
        y = gelu(y @ p[at + "mlp.c_fc.weight"] + p[at + "mlp.c_fc.bias"], approximate="tanh")
        x = x + y @ p[at + "mlp.c_proj.weight"] + p[at + "mlp.c_proj.bias"]
    x = norm(x, p["transformer.ln_f.weight"], p["transformer.ln_f.bias"], eps)
    return linear(x, p["transformer.wte.weight"])


def flatten(p: Params) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in p.values()])


def unflatten(flat: Tensor, like: Params) -> dict[str, Tensor]:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def token_loss(
    logits: Callable[[Params], Tensor], labels: Tensor, like: Params
) -> Callable[[Tensor], Tensor]:
    """Mean cross-entropy over the labels that are not -100, of the flat parameters."""
    counted = labels[:, 1:] != -100

    def loss(flat: Tensor) -> Tensor:
        z = logits(unflatten(flat, like))[:, :-1]
        picked = z.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        each = torch.log(torch.exp(z - z.detach().amax(-1, keepdim=True)).sum(-1))
        each = each + z.detach().amax(-1) - picked
        return (each * counted).sum() / counted.sum()

    return loss


def gauss_newton(
    logits: Callable[[Params], Tensor], labels: Tensor, like: Params, flat: Tensor
) -> Tensor:
    """(n, n): Jᵀ H_out J of the mean cross-entropy over the labels that are not -100."""
    counted = labels[:, 1:] != -100

    def outputs(flat: Tensor) -> Tensor:
        return logits(unflatten(flat, like))[:, :-1][counted]

    jacobian = torch.func.jacrev(outputs)(flat)  # (targets, vocabulary, n)
    p = outputs(flat).softmax(-1)
    h_out = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("tvn,tvw,twm->nm", jacobian, h_out, jacobian) / counted.sum()


def empirical_fisher(
    logits: Callable[[Params], Tensor], labels: Tensor, like: Params, flat: Tensor, unit: str
) -> Tensor:
    """(n, n): Σ_u g_u g_uᵀ / W by the gradient of each unit's summed cross-entropy.

    Units are labels that are not -100, or rows of labels; W is the number of such labels.
    """
    counted = labels[:, 1:] != -100

    def losses(flat: Tensor) -> Tensor:
        z = logits(unflatten(flat, like))[:, :-1].log_softmax(-1)
        picked = -z.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return picked[counted] if unit == "token" else (picked * counted).sum(1)

    gradients = torch.func.jacrev(losses)(flat)
    return gradients.T @ gradients / counted.sum()


def relative_error(found: Tensor, true: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - true) / torch.linalg.vector_norm(true))
