"""The same products in JAX: a Llama in sixty lines, forward over reverse, compiled whole by XLA.

It runs on the torch model's own weights, and takes its rotation tables. Attention is the formula:
the fused one that JAX has cannot be differentiated twice.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from benchmarks.contest import Contestant, Entry, SkippedError
from benchmarks.counts import Product
from benchmarks.peers import installed_version, load
from benchmarks.problem import Problem

_LAYER = "model.layers."
_PRECISION = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "default"}


def contestants() -> list[Contestant]:
    """JAX's gradient and its Hessian product."""
    table: tuple[tuple[str, str, Product], ...] = (
        ("jax-gradient", "jax: gradient", "gradient"),
        ("jax-hvp", "jax: Hv, forward over reverse", "hvp"),
    )
    return [
        Contestant(
            key=key,
            name=name,
            product=product,
            open=partial(_open, product),
            library="jax",
            version=installed_version("jax"),
        )
        for key, name, product in table
    ]


def _loss(jax: Any, config: Any, cos: Any, sin: Any, ids: Any, p: Any) -> Any:
    """Mean next-token loss; p: {"layers": {name: (layers, ...)}, other names: arrays}."""
    jnp = jax.numpy
    rows, tokens = ids.shape
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))

    def norm(x: Any, weight: Any) -> Any:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + config.rms_norm_eps)
        return weight * y.astype(x.dtype)

    def rotate(x: Any) -> Any:
        half = jnp.concatenate([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return x * cos + half * sin

    def layer(x: Any, q: Any) -> tuple[Any, None]:
        def split(name: str, count: int) -> Any:
            y = norm(x, q["input_layernorm.weight"]) @ q[f"self_attn.{name}_proj.weight"].T
            return y.reshape(rows, tokens, count, width).transpose(0, 2, 1, 3)

        query = rotate(split("q", heads)).reshape(rows, groups, heads // groups, tokens, width)
        key, value = rotate(split("k", groups)), split("v", groups)
        scores = jnp.einsum("bgrsd,bgtd->bgrst", query, key) * width**-0.5
        scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        mixed = jnp.einsum("bgrst,bgtd->bgrsd", weights, value)
        mixed = mixed.reshape(rows, heads, tokens, width).transpose(0, 2, 1, 3)
        x = x + mixed.reshape(rows, tokens, -1) @ q["self_attn.o_proj.weight"].T
        y = norm(x, q["post_attention_layernorm.weight"])
        gate = jax.nn.silu(y @ q["mlp.gate_proj.weight"].T)
        return x + (gate * (y @ q["mlp.up_proj.weight"].T)) @ q["mlp.down_proj.weight"].T, None

    x = jax.lax.scan(layer, p["model.embed_tokens.weight"][ids], p["layers"])[0]
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])
    logits = (norm(x, p["model.norm.weight"]) @ head.T)[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).mean()


def _open(product: Product, problem: Problem) -> Entry:
    if problem.shape.family != "llama":
        raise SkippedError("written for Llama only")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = load("jax", "jax")
    names = [name for name, _ in problem.model.named_parameters()]

    def array(tensor: Tensor) -> Any:
        return jax.dlpack.from_dlpack(tensor.detach().contiguous())

    def tree(parts: list[Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        layers: dict[str, list[Tensor]] = {}
        for name, part in zip(names, parts, strict=True):
            if name.startswith(_LAYER):
                layers.setdefault(name.removeprefix(_LAYER).partition(".")[2], []).append(part)
            else:
                found[name] = array(part)
        found["layers"] = {name: array(torch.stack(each)) for name, each in layers.items()}
        return found

    def flat(p: Any) -> Tensor:
        def part(name: str) -> Tensor:
            if not name.startswith(_LAYER):
                return torch.utils.dlpack.from_dlpack(p[name])
            index, _, local = name.removeprefix(_LAYER).partition(".")
            return torch.utils.dlpack.from_dlpack(p["layers"][local])[int(index)]

        return torch.cat([part(name).reshape(-1) for name in names])

    with torch.no_grad():
        positions = torch.arange(problem.shape.tokens, device=problem.device)[None]
        blank = torch.zeros(1, dtype=problem.dtype, device=problem.device)
        cos, sin = (array(each[0]) for each in problem.model.model.rotary_emb(blank, positions))
        theta = tree(problem.parts(problem.theta(problem.dtype)))
        v = tree(problem.parts(problem.probe(0)))
    ids = array(problem.ids.int())
    gradient = jax.grad(partial(_loss, jax, problem.config, cos, sin, ids))

    def multiply(p: Any, v: Any) -> Any:
        return gradient(p) if product == "gradient" else jax.jvp(gradient, (p,), (v,))[1]

    with jax.default_matmul_precision(_PRECISION[problem.precision]):
        compiled = jax.jit(multiply).lower(theta, v).compile()

    def memory() -> int:
        sizes = compiled.memory_analysis()
        held = 0 if problem.device.type == "cpu" else problem.weights_bytes  # of the probe
        return int(sizes.temp_size_in_bytes + sizes.output_size_in_bytes + held)

    def other(index: int) -> Any:
        return tree(problem.parts(problem.probe(index)))

    return Entry(
        run=lambda: jax.block_until_ready(compiled(theta, v)),
        product=lambda index: flat(compiled(theta, other(index))),
        own_weights=problem.weights_bytes,
        memory=memory,
    )
